"""Measure correctness, memory, time and ratios; then write the table, the JSON and the picture."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alignkit_kernels.bench import cases, chart, measure, report
from alignkit_kernels.bench.cases import Case, Contender, Shape
from alignkit_kernels.bench.contenders import OWN, eager, own, planned_path, ways
from alignkit_kernels.bench.exact import Error, errors, exact_results, results
from alignkit_kernels.bench.rivals import APPROXIMATE, rivals

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIMIT, RIVALS_LIMIT = 2.0, 20.0  # times eager's error
Row = dict[str, Any]


@dataclass
class Bench:
    """The settings of one run, and its results."""

    device: torch.device
    seconds: float
    compiled: bool
    deadline: float
    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    products: dict[tuple[int, ...], float] = field(default_factory=dict)  # FLOP/s on a CPU by shape
    sweep: list[Row] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)  # operations measured so far, of any shape

    def skip(self, case: Case, contender: str, why: str) -> None:
        """Record a contender that does not take part in a case."""
        self.skipped.append({"case": case.label, "contender": contender, "why": why})

    def measure(self, case: Case, without: Sequence[str] = ()) -> list[Row]:
        """Check and time every contender of a case and measure its memory; return the rows, alignkit's first."""
        if time.monotonic() > self.deadline:
            self.skip(case, "all", "out of time")
            return []
        try:
            return self._measured(case, without)
        except Exception as error:  # the cases after this one are still measured
            self.skip(case, "all", f"{type(error).__name__}: {error}".split("\n")[0][:200])
            return []

    def _measured(self, case: Case, without: Sequence[str]) -> list[Row]:
        uncompiled = None if self.compiled else "left out; add --compile to include it on a CPU"
        if case.name in self.seen:
            uncompiled = uncompiled or "measured only in the first shape of an operation, because compiling takes long"
        self.seen.add(case.name)
        others, reasons = rivals(case, uncompiled)
        for name, why in reasons.items():
            if name not in without:
                self.skip(case, name, why)
        contenders = {"alignkit": own(case), "eager": eager(case), **ways(case), **others}
        contenders = {name: c for name, c in contenders.items() if name not in without}
        inputs = cases.make(case, 0)
        rows = self._checked(case, contenders, inputs)
        size = sum(t.nbytes for t in inputs.values())
        sets = [inputs]
        for seed in range(1, max(1, min(4, measure.FLUSH_BYTES // (4 * size)))):
            sets.append(cases.make(case, seed))
        kept = sum(inputs[name].nbytes for name in case.wanted)
        green = [row for row in rows if row["red"] is None]
        for row in green:
            contender = contenders[row["contender"]]
            peak = measure.peak_bytes(lambda c=contender: results(case, c, inputs), case.device)  # type: ignore[misc]
            if peak is not None:
                row["peak_mib"] = peak / measure.MIB
                row["peak_beyond_gradients_mib"] = max(0, peak - kept) / measure.MIB
        calls = {
            row["contender"]: (lambda i, c=contenders[row["contender"]]: results(case, c, sets[i % len(sets)]))
            for row in green
        }
        for name, times in measure.alternate(calls, case.device, self.seconds).items():
            row = next(r for r in rows if r["contender"] == name)
            row["ms"], row["ms_min"], row["ms_max"] = times
        compare(rows, self._floor_ms(case))
        return rows

    def _checked(self, case: Case, contenders: Mapping[str, Contender], inputs: cases.Inputs) -> list[Row]:
        """Return one row per contender that runs, red when it is wrong, without figures so far."""
        exact = exact_results(case, inputs)
        found: dict[str, dict[str, Error]] = {}
        precision: dict[str, float] = {}
        for name in sorted(contenders, key=lambda n: n != "eager"):
            try:
                got = results(case, contenders[name], inputs)
                found[name] = errors(got, exact)
                precision = precision or {k: torch.finfo(t.dtype).eps for k, t in got.items()}
            except Exception as error:  # a rival may reject a case in any way
                self.skip(case, name, f"fails: {type(error).__name__}: {error}".split("\n")[0][:200])
            got = {}
        rows = []
        for name in (n for n in contenders if n in found):
            limit = LIMIT if name in OWN else RIVALS_LIMIT
            red = verdict(found[name], found.get("eager"), limit, precision) if name != "eager" else None
            if name == "alignkit" and red is None and (path := planned_path(case)) != case.path:
                red = f"expected path {case.path}, but the plan is path {path}"
            rows.append(blank(case, name, found[name], found.get("eager"), red))
        return rows

    def _floor_ms(self, case: Case) -> float | None:
        """Return the least time of a case on this device; None when its rates are not known."""
        known = measure.rates(case.device)
        if known and (not case.flop or case.dtype in (torch.bfloat16, torch.float16)):
            return 1000 * max(case.flop / known[0], case.bytes / known[1])
        if case.device.type == "cpu" and case.flop:
            shape = (case.sizes.get("N") or case.sizes["S"] * case.sizes["T"], case.sizes["H"], case.sizes["V"])
            if shape not in self.products:
                self.products[shape] = measure.matmul_rate(*shape, case.dtype, case.device)
            return 1000 * case.flop / self.products[shape]
        return None


def verdict(
    mine: dict[str, Error], eagers: dict[str, Error] | None, limit: float, precision: dict[str, float]
) -> str | None:
    """Return which result has more than `limit` times eager's error and half a unit in the last place, else None."""
    for name, error in mine.items():
        least = eagers[name].relative if eagers else precision.get(name, 0.0)
        allowed = limit * least + precision.get(name, 0.0) / 2
        if not error.relative <= allowed:
            return f"{name}: error {error.relative:.2g}, allowed {allowed:.2g}"
    return None


def blank(case: Case, name: str, mine: dict[str, Error], eagers: dict[str, Error] | None, red: str | None) -> Row:
    """Return a row with its errors, without figures so far."""
    # no ratio when eager is exact
    ratios = [e.relative / eagers[k].relative for k, e in mine.items() if eagers and eagers[k].relative > 0]
    return {
        "case": case.name, "contender": name, "shape": case.sizes, "dtype": str(case.dtype)[6:],
        "ms": None, "ms_min": None, "ms_max": None, "peak_mib": None, "peak_beyond_gradients_mib": None,
        "floor_ms": None, "to_floor": None, "time_to": {}, "least_to": {}, "peak_to": {},
        "error": max(e.relative for e in mine.values()), "largest_error": max(e.largest for e in mine.values()),
        "error_to_eager": max(ratios, default=None), "errors": {k: e._asdict() for k, e in mine.items()},
        "approximate": name in APPROXIMATE, "red": red,
    }  # fmt: skip


def compare(rows: list[Row], floor_ms: float | None) -> None:
    """Fill in the ratios of one case's rows: to the floor, and to every other contender that has figures."""
    for row in rows:
        row["floor_ms"] = floor_ms
        if row["ms"] and floor_ms:
            row["to_floor"] = row["ms"] / floor_ms
        for other in rows:
            if other is row:
                continue
            pairs = (("ms", row["time_to"]), ("ms_min", row["least_to"]), ("peak_mib", row["peak_to"]))
            for figure, ratios in pairs:
                if row[figure] is not None and other[figure]:
                    ratios[other["contender"]] = row[figure] / other[figure]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="alignkit bench kernels", description=__doc__)
    parser.add_argument("--shapes", help="N x H x V, comma-separated, such as 8192x2048x128256")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--only", help=f"cases, comma-separated: {', '.join(cases.NAMES)}")
    parser.add_argument("--quick", "--tiny", action="store_true", help="tiny shapes: check that everything runs")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile on a CPU too")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    parser.add_argument("--minutes", type=float, default=60.0, help="skip the cases that have not started by then")
    parser.add_argument("--json", type=Path, help="file for rows and versions")
    parser.add_argument("--png", type=Path, help="file for the picture: time and memory by vocabulary and tokens")
    args = parser.parse_args(argv)
    args.names = args.only.split(",") if args.only else list(cases.NAMES)
    if unknown := [n for n in args.names if n not in cases.NAMES]:
        parser.error(f"--only: unknown case '{unknown[0]}'; choose from {', '.join(cases.NAMES)}")
    try:
        args.shapes = [tuple(int(x) for x in s.split("x")) for s in args.shapes.split(",")] if args.shapes else None
        if any(len(s) != 3 or min(s) < 1 for s in args.shapes or ()):
            raise ValueError
    except ValueError:
        parser.error("--shapes must be N x H x V, each at least 1, such as 2048x512x32000,512x128x8000")
    for option, path in (("--json", args.json), ("--png", args.png)):
        if path is not None and (why := unwritable(path)):
            parser.error(f"{option} {path}: {why}")
    return args


def unwritable(path: Path) -> str | None:
    """Return why a file cannot be written there; None when it can."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    if path.is_dir():
        return "is a folder, not a file"
    return None if os.access(path if path.exists() else path.parent, os.W_OK) else "is not writable"


def plan(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """Return the cases in order: those with bars on every shape, then the others."""
    cuda = device.type == "cuda"
    dtype = DTYPES[args.dtype or ("bfloat16" if cuda else "float32")]
    shapes: Sequence[Shape] = args.shapes or (cases.GPU_SHAPES if cuda else cases.CPU_SHAPES)
    if args.quick and not args.shapes:
        shapes = cases.QUICK_SHAPES
    planned = []
    foremost = [name for name in args.names if name in cases.FOREMOST]
    for names in (foremost, [name for name in args.names if name not in foremost]):
        for (i, shape), name in itertools.product(enumerate(shapes), names):
            if i == 0 or name not in cases.VECTORS:
                planned.append(cases.build(name, shape, dtype, device))
    return planned


def swept(bench: Bench, dtype: torch.dtype | None, quick: bool, save: Callable[[], None]) -> None:
    """Measure paths 1 and 3 at several vocabularies and numbers of tokens, for the picture; save after each."""
    cuda = bench.device.type == "cuda"
    bench.seconds = min(bench.seconds, 0.5 if cuda else 1.0)
    tokens, h, vocabularies = cases.QUICK_SWEEP if quick else cases.GPU_SWEEP if cuda else cases.CPU_SWEEP
    middle_n, middle_v = tokens[len(tokens) // 2], vocabularies[len(vocabularies) // 2]
    points = [("V", (middle_n, h, v)) for v in vocabularies] + [("N", (n, h, middle_v)) for n in tokens]
    for name, (axis, shape) in itertools.product(chart.TITLES, points):
        case = cases.build(name, shape, dtype or (torch.bfloat16 if cuda else torch.float32), bench.device)
        print(f"sweep: {case.label} ...", file=sys.stderr, flush=True)
        logits = shape[0] * shape[2] * case.dtype.itemsize / measure.MIB
        # compiling for each point would take longer than the rest
        bench.sweep += [{**row, "axis": axis, "logits_mib": logits} for row in bench.measure(case, ["torch.compile"])]
        save()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 when alignkit is wrong or missing in a case, or the run was stopped."""
    args = arguments(argv)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and device.type == "cpu":
        print("no GPU is available", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    seconds = 0.05 if args.quick else 1.5 if device.type == "cuda" else 10.0
    deadline = time.monotonic() + 60 * args.minutes
    bench = Bench(device, seconds, device.type == "cuda" or args.compile, deadline)
    about = measure.machine(device, args.threads)
    ended = False
    with suppress(KeyboardInterrupt):  # a stopped run reports its measurements until then
        for case in plan(args, device):
            print(f"{case.label} ...", file=sys.stderr, flush=True)
            bench.rows += bench.measure(case)
            write(args.json, about, bench, [])
        ended = True
    bars = report.bars(bench.rows, about["device"])
    print(report.table(bench.rows, bench.skipped, bars, about))
    if args.png and ended and chart.drawable():
        ended = False
        with suppress(KeyboardInterrupt):
            dtype = DTYPES[args.dtype] if args.dtype else None
            swept(bench, dtype, args.quick, lambda: write(args.json, about, bench, bars))
            ended = True
    if args.png:
        print(chart.draw(args.png, bench.sweep, about))
    write(args.json, about, bench, bars)
    wrong = [r for r in bench.rows if r["contender"] in OWN and r["red"]]
    absent = [s for s in bench.skipped if s["contender"] in ("alignkit", "all")]
    if not ended:
        print("stopped before its end", file=sys.stderr)
    return int(bool(wrong or absent or not ended))


def write(path: Path | None, about: dict[str, Any], bench: Bench, bars: list[str]) -> None:
    """Write the figures so far, so that a stopped run leaves them, and one killed while it writes those before."""
    if path is not None:
        found = {"machine": about, "rows": bench.rows, "skipped": bench.skipped, "bars": bars, "sweep": bench.sweep}
        unfinished = path.with_name(path.name + ".new")
        unfinished.write_text(json.dumps(found, indent=1))
        unfinished.replace(path)
