"""Sampling several completions of a prompt: alignkit, transformers' generate, and its continuous batching, in one run.

    python benchmarks/rollout.py --json rollout.json
    python benchmarks/rollout.py --tiny              a tiny model, in seconds: does everything run?

The 28 M-parameter Llama of engine.py, untrained, in float32 on the CPU: 2 prompts of 120 to 180 tokens, 8 completions
of 64 tokens each. The contenders take turns, the first turn warms up, and figures are medians of the others. A
contender that fails is reported with its error, and the exit code is 1.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

PROMPTS, GROUP, TOKENS = 2, 8, 64
TINY_GROUP, TINY_TOKENS = 2, 8
BASELINE = "alignkit, generate"


def load_start(tiny: bool) -> tuple[Any, Any, list[list[int]]]:
    """Return the model, a tokenizer for its end-of-sequence token, and prompts of random tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        common.write_start(Path(folder), ["a"], tiny)
        model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    draw, low, high = random.Random(0), *((12, 18) if tiny else (120, 180))
    ids = range(1, model.config.vocab_size)
    return model.eval(), tokenizer, [draw.choices(ids, k=draw.randint(low, high)) for _ in range(PROMPTS)]


def with_generate(model: Any, tokenizer: Any, prompts: list[list[int]], group: int, tokens: int, seed: int) -> Any:
    """Sample with transformers alone: padded prompts, each of them computed once for every completion."""
    import torch

    torch.manual_seed(seed)
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    return model.generate(
        **padded, do_sample=True, top_k=0, num_return_sequences=group, max_new_tokens=tokens,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def contenders(tiny: bool) -> dict[str, Callable[[int], Any]]:
    """Return the contenders by name: functions of the turn, which is the seed."""
    from alignkit.config import Sampling
    from alignkit.rollout import sample

    model, tokenizer, prompts = load_start(tiny)
    group, tokens = (TINY_GROUP, TINY_TOKENS) if tiny else (GROUP, TOKENS)

    def own(backend: Any) -> Callable[[int], Any]:
        how = Sampling(max_new_tokens=tokens)
        return lambda turn: sample(model, tokenizer, prompts, how, n=group, seed=turn, backend=backend)

    return {
        BASELINE: own("generate"),
        "alignkit, continuous": own("continuous"),
        "transformers, generate": lambda turn: with_generate(model, tokenizer, prompts, group, tokens, turn),
    }


def measure(running: dict[str, Callable[[int], Any]], turns: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the seconds of every turn by contender, and the reasons of those that failed."""
    running, failed = dict(running), dict[str, str]()
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(turns):
        for name, run in list(running.items()):
            started = time.perf_counter()
            try:
                run(turn)
            except Exception as error:
                traceback.print_exc()
                failed[name] = common.reason(error)
                del running[name], seconds[name]
            else:
                seconds[name].append(time.perf_counter() - started)
    return seconds, failed


def main() -> int:
    """Parse arguments, measure the contenders in turn, print and write."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--repeat", type=int, help="turns that count (default 3, tiny 1)")
    args = common.parsed(parser)
    common.hide_scripts()
    import torch

    torch.set_num_threads(args.threads)
    seconds, failed = measure(contenders(args.tiny), (args.repeat or (1 if args.tiny else 3)) + 1)
    medians = {name: statistics.median(s[1:]) for name, s in seconds.items()}
    sampled = PROMPTS * (TINY_GROUP * TINY_TOKENS if args.tiny else GROUP * TOKENS)
    rows = [
        [name, f"{s:.2f}", f"{sampled / s:.0f}", common.shown(common.ratio(s, medians.get(BASELINE)), ".2f")]
        for name, s in medians.items()
    ]
    lines = [common.table(["contender", "seconds", "tokens/s", f"x {BASELINE}"], rows)]
    return common.finish(args, lines, failed, {"medians": medians, "seconds": seconds})


if __name__ == "__main__":
    sys.exit(main())
