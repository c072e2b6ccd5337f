"""Sampling several completions of a prompt: alignkit, transformers' generate, continuous batching, vLLM, in one run.

    python benchmarks/rollout.py --json rollout.json
    python benchmarks/rollout.py --threads 1 --vllm ENVIRONMENT/bin/vllm     servers on the same core
    python benchmarks/rollout.py --tiny              a tiny model, in seconds: does everything run?

The 28 M-parameter Llama of engine.py, untrained, on the CPU, in float32, and by vLLM in bfloat16 too: 8 prompts of 120
to 180 tokens, 8 completions of 64 tokens each. The contenders take turns, the first turn warms up, and figures are
medians of the others. With --vllm, all processes are held to as many cores as --threads says, and each server gets new
weights before each of its turns, which is timed apart, per GB of the folder. A contender that fails is reported with
its error, and the exit code is 1.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common

PROMPTS, GROUP, TOKENS = 8, 8, 64
TINY_GROUP, TINY_TOKENS = 2, 8
BASELINE = "alignkit, generate"
DTYPES = ("float32", "bfloat16")  # of vLLM


def load_start(tiny: bool, folder: Path) -> tuple[Any, Any, list[list[int]]]:
    """Return the model in a folder, a tokenizer for its end-of-sequence token, and prompts of random tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common.write_start(folder, ["a"], tiny, **({"head_dim": 32} if tiny else {}))  # vLLM knows no smaller heads
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


def contenders(tiny: bool, folder: Path) -> dict[str, Callable[[int], Any]]:
    """Return the contenders of this process by name: functions of the turn, which is the seed."""
    from alignkit.rollout import sample
    from alignkit.rollout_settings import Sampling

    model, tokenizer, prompts = load_start(tiny, folder)
    group, tokens = (TINY_GROUP, TINY_TOKENS) if tiny else (GROUP, TOKENS)

    def own(backend: Any) -> Callable[[int], Any]:
        how = Sampling(max_new_tokens=tokens)
        return lambda turn: sample(model, tokenizer, prompts, how, n=group, seed=turn, backend=backend)

    return {
        BASELINE: own("generate"),
        "alignkit, continuous": own("continuous"),
        "transformers, generate": lambda turn: with_generate(model, tokenizer, prompts, group, tokens, turn),
    }


class ByServer:
    """A contender that samples by a vLLM server. syncs: seconds and bytes of each time that it got new weights."""

    def __init__(self, url: str, tiny: bool, folder: Path) -> None:
        from alignkit.rollout import Request, Setup
        from alignkit.rollout.vllm import Vllm
        from alignkit.rollout_settings import Rollout, Sampling

        self.model, tokenizer, prompts = load_start(tiny, folder)
        group, tokens = (TINY_GROUP, TINY_TOKENS) if tiny else (GROUP, TOKENS)
        rollout = Rollout(backend="vllm", urls=[url])
        self.sampler = Vllm(Setup(self.model, tokenizer, [tokenizer.eos_token_id], rollout, folder / "run"))
        self.request = lambda turn: Request(prompts, Sampling(max_new_tokens=tokens), group, turn, range(len(prompts)))
        self.syncs: list[tuple[float, int]] = []

    def prepare(self, turn: int) -> None:
        """Send new weights."""
        started = time.perf_counter()
        self.sampler.update(turn, self.model)
        seconds = time.perf_counter() - started
        folder = next(self.sampler.sync.folder.iterdir())
        self.syncs.append((seconds, sum(file.stat().st_size for file in folder.iterdir())))

    def __call__(self, turn: int) -> Any:
        return self.sampler.sample(self.request(turn))


@contextlib.contextmanager
def servers(program: Path | None, tiny: bool, folder: Path) -> Iterator[dict[str, ByServer]]:
    """Run one vLLM server for each data type; yield the contenders that sample by them, none without a program."""
    from alignkit.config import RunConfig
    from alignkit.rollout.serving import Servers, plan

    found = dict[str, ByServer]()
    with contextlib.ExitStack() as stack:
        for dtype in DTYPES if program else ():
            load_start(tiny, folder / dtype)
            given = {"method": "-", "data": "-", "model": str(folder / dtype), "device": "cpu"}
            made = plan(RunConfig(**given, max_prompt_tokens=440, sampling={"max_new_tokens": TOKENS}), str(program), 1,
                        [], dtype, [])  # fmt: skip
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            running = stack.enter_context(Servers(made, "127.0.0.1", port, 1, folder / "logs"))
            running.wait_until_ready(900)
            found[f"alignkit, vllm {dtype}"] = one = ByServer(running.urls[0], tiny, folder / dtype)
            stack.callback(one.sampler.close)
        yield found


def measure(running: dict[str, Callable[[int], Any]], turns: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the seconds of every turn by contender, and the reasons of those that failed."""
    running, failed = dict(running), dict[str, str]()
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(turns):
        for name, run in list(running.items()):
            try:
                getattr(run, "prepare", lambda turn: None)(turn)
                started = time.perf_counter()
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
    parser.add_argument("--vllm", type=Path, help="the program `vllm`; without it vLLM does not take part")
    args = common.parsed(parser)
    common.hide_scripts()
    import torch

    torch.set_num_threads(args.threads)
    if args.vllm:
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(args.threads)}
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # the servers' too
    with tempfile.TemporaryDirectory() as folder, servers(args.vllm, args.tiny, Path(folder)) as by_server:
        running = {**contenders(args.tiny, Path(folder) / "own"), **by_server}
        seconds, failed = measure(running, (args.repeat or (1 if args.tiny else 3)) + 1)
    syncs = {name: one.syncs[1:] for name, one in by_server.items() if name in seconds}
    medians = {name: statistics.median(s[1:]) for name, s in seconds.items()}
    sampled = PROMPTS * (TINY_GROUP * TINY_TOKENS if args.tiny else GROUP * TOKENS)
    rows = [
        [name, f"{s:.2f}", f"{sampled / s:.0f}", common.shown(common.ratio(s, medians.get(BASELINE)), ".2f")]
        for name, s in medians.items()
    ]
    lines = [common.table(["contender", "seconds", "tokens/s", f"x {BASELINE}"], rows)]
    for name, timed in syncs.items():
        took, size = statistics.median(s for s, _ in timed), timed[0][1] / 1e9
        lines.append(f"{name}: new weights by a folder of {size:.3f} GB in {took:.2f} s, {took / size:.2f} s/GB")
    return common.finish(args, lines, failed, {"medians": medians, "seconds": seconds, "syncs": syncs})


if __name__ == "__main__":
    sys.exit(main())
