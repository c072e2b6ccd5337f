"""GRPO at the shape of Qwen3-0.6B, sampling and learning apart: alignkit, and TRL's GRPOTrainer.

    python benchmarks/online_gpu.py --json online-gpu.json
    python benchmarks/online_gpu.py --tiny           a tiny model, on a CPU too, in seconds: does everything run?

Random weights, bfloat16, full training: 8 prompts a step with 8 completions of exactly 128 tokens each, one update, and
a reference. "alignkit" samples by its own loop over tokens, "alignkit-transformers" by transformers' `generate`. TRL
takes part with --trl-python, an interpreter that has it, without gradient checkpointing and with it, its default;
ratios are to the former. The most informative contenders run first, each in its own process, on the same prompts in the
same order. Figures are medians over the steps after the first, which compiles and warms up. Peak memory is the
allocator's on a GPU, the resident set of the process on a CPU. A contender that fails is reported with its error, and
the exit code is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import common
import contest
import dpo
import engine_gpu
import sampled

MODEL = "qwen3-0.6b"
CONTENDERS = ("alignkit", "trl", "alignkit-transformers", "trl-checkpointing")


class Size(NamedTuple):
    """Prompts of a step, completions of each, and their tokens."""

    prompts: int = 8
    group: int = 8
    tokens: int = 128


TINY = Size(2, 2, 8)


def prepare(args: argparse.Namespace, work: Path) -> None:
    """Write the model, a byte-level BPE tokenizer of the prompts, and the prompts in the order of alignkit's seed 0."""
    from alignkit.demo.base import tokenizer_from

    prompts = (TINY if args.tiny else Size()).prompts
    rows: list[Any] = [{"prompt": row["prompt"]} for row in dpo.made_up_pairs(prompts * args.steps, args.tiny)]
    common.write_jsonl(work / "rows.jsonl", rows)
    common.write_jsonl(work / "in-order.jsonl", (rows[i] for i in common.visited(len(rows), prompts, args.steps)))
    engine_gpu.build_model(MODEL, args.tiny).save_pretrained(work / "start")
    tokenizer_from([row["prompt"] for row in rows], common.VOCABULARY).save_pretrained(work / "start")


def contend(name: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run one contender in this process and return its figures."""
    import torch

    cuda, size = torch.cuda.is_available(), TINY if args.tiny else Size()
    sizes: tuple[Any, ...] = ("grpo", work, args.steps, size.group, size.tokens)
    which, _, kind = name.partition("-")
    dtype = "bfloat16" if cuda else "float32"
    if which == "trl":
        changes: dict[str, Any] = {"gradient_checkpointing": kind == "checkpointing", "use_cpu": not cuda, "bf16": cuda}
        changes["per_device_train_batch_size"] = size.prompts * size.group
        figures = sampled.run_trl(*sizes, dtype, **changes)
    else:
        rollout = {"backend": kind or "generate"}
        changes = {"dtype": dtype, "device": "auto", "precision": "auto", "max_tokens": 16384}  # all rows in one pass
        figures = sampled.run_alignkit(*sizes, rollout=rollout, batch_size=size.prompts, **changes)
    if set(figures["length"]) != {size.tokens}:
        raise RuntimeError(f"learned from completions of {figures['length']} tokens; all must have {size.tokens}")
    return figures


def summarise(runs: dict[str, list[dict[str, Any]]], size: Size) -> dict[str, dict[str, Any]]:
    """Return each contender's medians over the steps after the first, with ratios to TRL without checkpointing."""
    rows: dict[str, dict[str, Any]] = {}
    for name, (figures,) in runs.items():
        steps = figures["seconds"][1:]
        row = {phase: statistics.median(step[phase] for step in steps) for phase in sampled.PHASES}
        row["sampled_per_second"] = size.prompts * size.group * size.tokens / row["sampling"]
        rows[name] = {**row, "peak_mib": figures["peak_mib"]}
    trl = rows.get("trl", {})
    for row in rows.values():
        row |= {f"{p}_to_trl": common.ratio(trl.get(p), row[p]) for p in ("sampling", "learning", "step")}
        row["memory_to_trl"] = common.ratio(row["peak_mib"], trl.get("peak_mib"))
    return rows


def report(rows: dict[str, dict[str, Any]]) -> str:
    """Lay out the figures; a ratio of speed above 1 is faster than TRL."""
    forms = {
        "sampling": ("sampling s", ".2f"), "scoring": ("scoring s", ".3f"), "learning": ("learning s", ".3f"),
        "step": ("step s", ".2f"), "sampled_per_second": ("sampled/s", ".0f"), "peak_mib": ("peak MiB", ".0f"),
        "sampling_to_trl": ("x sampling", ".2f"), "learning_to_trl": ("x learning", ".2f"),
        "step_to_trl": ("x step", ".2f"), "memory_to_trl": ("memory/trl", ".2f"),
    }  # fmt: skip
    cells = [[name, *(common.shown(row[key], form) for key, (_, form) in forms.items())] for name, row in rows.items()]
    return common.table(["contender", *(head for head, _ in forms.values())], cells)


def main() -> int:
    """Parse arguments, run the contenders in turn, print and write."""
    parser = common.parser_of(__doc__, trl=True)
    parser.add_argument("--steps", type=int, help="steps, the first not counted (default 4, tiny 2)")
    parser.add_argument("--only", help=f"contenders, comma-separated, of {', '.join(CONTENDERS)}")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this time; contenders left over fail")
    args = common.parsed(parser)
    args.steps = args.steps or (2 if args.tiny else 4)
    if args.child:
        return contest.answer(args, prepare, contend)
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first is not counted")
    names = common.contenders(parser, args, CONTENDERS)
    deadline = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        ran = contest.Contest(__file__, args, Path(folder), steps=args.steps)
        ran.run(names, deadline=deadline)
    rows = summarise(ran.runs, TINY if args.tiny else Size())
    return common.finish(args, [report(rows)], ran.failed, {"steps": args.steps, "table": rows, "runs": ran.runs})


if __name__ == "__main__":
    sys.exit(main())
