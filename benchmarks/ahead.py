"""Seconds a step of GRPO with sampling one step ahead of learning (rollout.ahead), against one after the other.

    python benchmarks/ahead.py --json ahead.json
    python benchmarks/ahead.py --tiny              a tiny model, in seconds: does everything run?

The sampler is a double that sleeps and returns random tokens, as a server with cores of its own would: it takes none of
this process. Learning is real: the 28 M-parameter Llama of engine.py, untrained, in float32 on the CPU; 4 prompts, 2
completions of 32 tokens. It is measured with a sampler that takes no time; then the sampler sleeps for half, once and
twice as long. Figures are means over the steps after the first two, since the first one has nothing to overlap with;
"the longer" is that of each step, so that a busy machine, on which steps differ, does not change the comparison.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import common

from alignkit.rollout import Request, Sampled, Sampler

PROMPTS, GROUP, TOKENS, FIRST = 4, 2, 32, 2


def _length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


class Sleeping(Sampler):
    """Returns `tokens` random tokens for each completion, after `seconds`."""

    def __init__(self, vocabulary: int, tokens: int, seconds: float) -> None:
        self.vocabulary, self.tokens, self.seconds = vocabulary, tokens, seconds

    def update(self, version: int, model: Any) -> None:
        """Note the version: it has no weights."""
        self.version = version

    def sample(self, request: Request) -> list[list[Sampled]]:
        """Sleep, and return what it drew uniformly."""
        time.sleep(self.seconds)
        draw = random.Random(request.seed)
        logps = [-math.log(self.vocabulary)] * self.tokens
        ids = range(1, self.vocabulary)
        return [
            [Sampled(draw.choices(ids, k=self.tokens), False, logps) for _ in range(request.n)] for _ in request.prompts
        ]


def steps_of(folder: Path, tiny: bool, ahead: int, seconds: float, n: int) -> list[tuple[float, float]]:
    """Return the seconds of n steps, and those of each in which it learned and scored."""
    from alignkit.engine.phases import Run
    from alignkit.rollout import backends

    tokens = 8 if tiny else TOKENS
    rows = [{"prompt": f"What is {i} and {i + 1}?"} for i in range(PROMPTS)]
    settings: dict[str, Any] = {
        "model": str(folder / "start"), "data": rows, "output": folder / "runs", "max_steps": FIRST + n, "epochs": 100,
        "batch_size": PROMPTS, "group_size": GROUP, "beta": 0.0, "reward": _length, "device": "cpu", "quiet": True,
        "sampling": {"max_new_tokens": tokens}, "health": {"enabled": False}, "save_minutes": 1e6,
        "rollout": {"backend": "sleeping", "ahead": ahead},
    }  # fmt: skip

    def as_plugin(name: str) -> Any:
        return lambda setup: Sleeping(setup.model.config.vocab_size, tokens, seconds)

    with mock.patch.object(backends, "_factory", as_plugin), Run("grpo", **settings) as run:
        run.read()
        parts = run.build().parts
        assert parts.online is not None
        parts.online.open(run.state.folder, 0, -1)
        found = []
        for step in range(FIRST + n):
            started = time.perf_counter()
            values = run.loop.step(step, FIRST + n)
            took = time.perf_counter() - started
            found.append((took, took - values["seconds/sampling"]))
        parts.online.close()
    return found[FIRST - 1 : -1]  # the last one has no next step to sample


def main() -> int:
    """Parse arguments, measure, print and write."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--steps", type=int, help="steps that count (default 8, tiny 3)")
    args = common.parsed(parser)
    common.hide_scripts()
    import torch

    torch.set_num_threads(args.threads)
    n, lines, found = args.steps or (3 if args.tiny else 8), [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "start").mkdir()
        common.write_start(folder / "start", ["What is 1 and 2?"], args.tiny)
        alone = statistics.fmean(took for took, _ in steps_of(folder, args.tiny, 0, 0.0, n))
        for times in (0.5, 1.0, 2.0):
            sampling = times * alone
            for ahead in (0, 1):
                steps = steps_of(folder, args.tiny, ahead, sampling, n)
                seconds, learning = (statistics.fmean(values) for values in zip(*steps, strict=True))
                longer = statistics.fmean(max(sampling, learned) for _, learned in steps)
                one = {"ahead": ahead, "sampling": sampling, "learning": learning, "step": seconds, "longer": longer}
                found.append(one)
                cells = [f"{x:.3f}" for x in (sampling, learning, seconds)]
                lines.append([f"ahead {ahead}", *cells, f"{seconds / longer:.2f}"])
    head = ["setting", "sampling s", "learning s", "step s", "x the longer"]
    return common.finish(args, [common.table(head, lines)], {}, {"steps": found})


if __name__ == "__main__":
    sys.exit(main())
