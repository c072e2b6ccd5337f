"""What more rows cost: seconds a pair while training, and resident memory, from a thousand rows to 200 thousand.

    python benchmarks/growth.py --json growth.json --png growth.png
    python benchmarks/growth.py --tiny                two small sizes: does everything run?

SimPO with a tiny model, so that reading, shuffling and packing rows weigh as much as they can. Each size has its own
process (with --tiny they share one, so memory says nothing there); rounds alternate. A pair's seconds are the median
step's; memory is what the resident set has grown by from before the rows are read to after the last step, above the
smallest size's growth, in bytes for each further token. The picture shows both against the rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import contest
import dpo
import pictures

SIZES, TINY_SIZES = (1_000, 20_000, 200_000), (40, 120)
BATCH = 8
KEYS = ("read_seconds", "pair_ms", "grown_bytes", "tokens")


def prepare(args: argparse.Namespace, work: Path) -> None:
    """Write the model, and a file of rows for each size; all rows of a smaller size begin the larger ones."""
    rows = dpo.made_up_pairs(max(sizes(args)), tiny=True)
    common.write_start(work / "start", [row["prompt"] + row["chosen"] for row in rows[:1000]], tiny=True)
    for size in sizes(args):
        common.write_jsonl(work / f"{size}.jsonl", rows[:size])


def sizes(args: argparse.Namespace) -> tuple[int, ...]:
    """Return the numbers of rows."""
    return TINY_SIZES if args.tiny else SIZES


def contend(name: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Train on as many rows as the name says, and return its figures."""
    from alignkit.engine.phases import Run

    run = Run(
        "simpo", model=str(work / "start"), data=str(work / f"{name}.jsonl"), output=work / "runs", batch_size=BATCH,
        max_steps=args.steps + 1, learning_rate=1e-5, eval_fraction=0.0, device="cpu", seed=0, rows_cache=False,
    )  # fmt: skip
    before, started = resident(), time.perf_counter()
    rows = run.read().train
    read = time.perf_counter() - started
    total = run.build().total_steps
    taken = []
    for i in range(args.steps + 1):
        started = time.perf_counter()
        run.loop.step(i, total)
        taken.append(time.perf_counter() - started)
    grown = resident() - before
    return {
        "read_seconds": read, "pair_ms": 1000 * statistics.median(taken[1:]) / BATCH, "grown_bytes": grown,
        "tokens": sum(example.n_tokens for example in rows),
    }  # fmt: skip


def resident() -> int:
    """Return the bytes of this process's memory that are in use now."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the medians of each size, with what it adds to the smallest one."""
    rows: dict[str, dict[str, Any]] = {
        name: {key: statistics.median(figures[key] for figures in some) for key in KEYS} for name, some in runs.items()
    }
    smallest = next(iter(rows.values()), {})
    for row in rows.values():
        row["slower"] = common.ratio(row["pair_ms"], smallest["pair_ms"])
        more = row["tokens"] - smallest["tokens"]
        row["bytes_a_token"] = common.ratio(row["grown_bytes"] - smallest["grown_bytes"], more)
    return rows


def panels(rows: dict[str, dict[str, Any]]) -> list[pictures.Panel]:
    """Return what the picture shows: milliseconds a pair and resident memory, against the rows."""
    shown = {"milliseconds a pair": ("pair_ms", 1), "resident memory grown by, MiB": ("grown_bytes", 2**20)}
    return [
        pictures.Panel("rows", label, {"alignkit": [(int(name), row[key] / unit) for name, row in rows.items()]}, "log")
        for label, (key, unit) in shown.items()
    ]


def main() -> int:
    """Parse arguments, run the sizes in turn, print and write."""
    parser = common.parser_of(__doc__, trl=True, png=True)
    parser.add_argument("--steps", type=int, help="steps that are timed (default 300, tiny 3)")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; the medians are reported (default 1)")
    args = common.parsed(parser)
    args.steps = args.steps or (3 if args.tiny else 300)
    if args.child:
        return contest.answer(args, prepare, contend)
    with tempfile.TemporaryDirectory() as folder:
        ran = contest.Contest(__file__, args, Path(folder))
        for i in range(args.repeat):
            ran.run([str(size) for size in sizes(args)], i)
    rows = summarise(ran.runs)
    head = ["rows", "tokens", "reading s", "ms a pair", "x smallest", "grown MiB", "bytes a token"]
    cells = [
        [
            name, f"{row['tokens']:.0f}", f"{row['read_seconds']:.2f}", f"{row['pair_ms']:.3f}",
            common.shown(row["slower"], ".2f"), f"{row['grown_bytes'] / 2**20:.1f}",
            common.shown(row["bytes_a_token"], ".1f"),
        ]
        for name, row in rows.items()
    ]  # fmt: skip
    lines = [common.table(head, cells), *pictures.drawn(args, "SimPO with a tiny model", panels(rows))]
    return common.finish(args, lines, ran.failed, {"table": rows, "runs": ran.runs})


if __name__ == "__main__":
    sys.exit(main())
