"""DPO on real preference pairs: the packed forest, padded concatenation, and TRL's DPOTrainer, in one run.

    python benchmarks/engine.py --data hh_pairs.jsonl --pairs 256 --json engine.json
    python benchmarks/engine.py --tiny                made-up rows and a tiny model, in seconds: does everything run?

Every contender has its own process, the same rows in the same order, the same 28 M-parameter Llama in float32 on the
CPU and the same optimiser: 8 pairs a step, a reference pass for every row. "forest-warm" finds the reference cache that
"forest" left. "...-bf16" is the same in bfloat16: `precision: bf16`, and TRL's `bf16`; it is compared with TRL in bf16.
Peak memory is the largest resident set of the process. TRL takes part with --trl-python, an interpreter
that has it. A contender that fails is reported with its error, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import contest
import dpo

CONTENDERS = ("forest", "forest-warm", "padded", "forest-bf16", "trl", "trl-checkpointing", "trl-bf16")


def prepare(args: argparse.Namespace, work: Path) -> None:
    """Write the rows and the start model."""
    texts = dpo.prepare_rows(args.data, args.pairs, args.tiny, work)
    common.write_start(work / "start", texts, args.tiny)


def contend(name: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run one contender in this process and return its figures."""
    bf16 = name.endswith("-bf16")
    if common.is_trl(name):
        figures = dpo.run_trl(work, checkpointing=name == "trl-checkpointing", bf16=bf16)
    else:
        layout = name.split("-")[0]
        cache = work / f"{layout}{'-bf16' * bf16}-{args.round}.sqlite"
        if name == "forest-warm" and not cache.exists():
            raise RuntimeError("needs the reference cache of 'forest', which did not run before")
        figures = dpo.run_alignkit(work, cache, layout=layout, device="cpu", precision="bf16" if bf16 else "fp32")
    return {**figures, "pairs_per_second": figures["pairs"] / figures["seconds"]}


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the medians of each contender's rounds, with ratios to padded rows and to TRL, None without those."""
    rows: dict[str, dict[str, Any]] = {
        name: {
            "pairs_per_second": statistics.median(f["pairs_per_second"] for f in figures),
            "peak_mib": statistics.median(f["peak_mib"] for f in figures),
            "first_loss": figures[0]["losses"][0],
            "last_loss": figures[0]["losses"][-1],
        }
        for name, figures in runs.items()
    }
    padded = rows.get("padded", {})
    for name, row in rows.items():
        trl = rows.get("trl-bf16" if name.endswith("-bf16") else "trl", {})
        row["speed_to_padded"] = common.ratio(row["pairs_per_second"], padded.get("pairs_per_second"))
        row["speed_to_trl"] = common.ratio(row["pairs_per_second"], trl.get("pairs_per_second"))
        row["memory_to_trl"] = common.ratio(row["peak_mib"], trl.get("peak_mib"))
    return rows


def largest_difference(runs: dict[str, list[dict[str, Any]]], name: str, other: str) -> float | None:
    """Return the largest difference of two contenders' losses over the steps, None when one is missing."""
    if name not in runs or other not in runs:
        return None
    return max(abs(a - b) for a, b in zip(runs[name][0]["losses"], runs[other][0]["losses"], strict=True))


def main() -> int:
    """Parse arguments, run the contenders in turn, print and write."""
    parser = common.parser_of(__doc__, trl=True)
    parser.add_argument("--data", type=Path, help="JSONL of preference pairs (with --tiny by default: made-up text)")
    parser.add_argument("--pairs", type=int, help="rows to train on, once (default 256; with --tiny 16)")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; the medians are reported (default 1)")
    parser.add_argument("--only", help=f"contenders, comma-separated, of {', '.join(CONTENDERS)}")
    args = common.parsed(parser)
    args.pairs = args.pairs or (16 if args.tiny else 256)
    if args.child:
        return contest.answer(args, prepare, contend)
    if args.data is None and not args.tiny:
        parser.error("--data is needed: a JSONL file of preference pairs")
    names = common.contenders(parser, args, CONTENDERS)
    with tempfile.TemporaryDirectory() as folder:
        ran = contest.Contest(__file__, args, Path(folder))
        for i in range(args.repeat):
            ran.run(names, i)
    rows = summarise(ran.runs)
    head = ["contender", "pairs/s", "peak MiB", "x padded", "x TRL", "memory/TRL", "last loss"]
    keys = ["pairs_per_second", "peak_mib", "speed_to_padded", "speed_to_trl", "memory_to_trl", "last_loss"]
    forms = [".2f", ".0f", ".2f", ".2f", ".2f", ".6f"]
    cells = [[name, *(common.shown(row[k], f) for k, f in zip(keys, forms, strict=True))] for name, row in rows.items()]
    difference = largest_difference(ran.runs, "forest", "padded")
    warm = common.ratio(*(rows.get(name, {}).get("pairs_per_second") for name in ("forest-warm", "forest")))
    bf16 = common.ratio(*(rows.get(name, {}).get("pairs_per_second") for name in ("forest-bf16", "forest")))
    rounding = largest_difference(ran.runs, "forest", "forest-bf16")
    lines = [
        common.table(head, cells),
        f"pairs a second in bf16, in units of float32: {common.shown(bf16, '.2f')}",
        f"largest difference of a step's loss, float32 to bf16: {common.shown(rounding, '.2g')}",
        f"largest difference of a step's loss, forest to padded: {common.shown(difference, '.2g')}",
        f"pairs a second with a warm cache, in units of a cold one: {common.shown(warm, '.2f')}",
    ]
    found = {
        "pairs": args.pairs,
        "table": rows,
        "forest_to_padded_loss": difference,
        "warm_to_cold": warm,
        "bf16_to_fp32": bf16,
    }
    found["fp32_to_bf16_loss"] = rounding
    return common.finish(args, lines, ran.failed, {**found, "runs": ran.runs})


if __name__ == "__main__":
    sys.exit(main())
