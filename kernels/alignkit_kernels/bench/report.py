"""The table, and the bars (limits) that the figures must meet."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from alignkit_kernels.bench.cases import CPU_SHAPES, GPU_SHAPES, VECTORS
from alignkit_kernels.bench.contenders import OWN
from alignkit_kernels.bench.rivals import APPROXIMATE

Row = dict[str, Any]

# path: (times eager's time, times eager's peak memory), two cores, N 2048, H 512, V 32000, float32
CPU_BARS = {"path1": (1.0, 0.25), "path2": (1.0, 0.6), "path3": (1.35, 0.25), "path4": (1.0, 0.25)}
# times the floor, H200, bfloat16
GPU_BARS = {"path1": 1.3, "path2": 1.25, "path3": 1.25, "path4": 1.2, "selective_logps": 1.3}
GPU_PEAK_MIB = 1024  # beyond the gradients
LEAN = ("path1", "path3", "path4")
HEAD = ["case", "contender", "ms", "least", "most", "peak MiB", "- grads", "x floor", "x eager", "error", "of eager's"]


def bars(rows: list[Row], device: str) -> list[str]:
    """Judge alignkit's rows of the shapes that have bars; one line per bar, which ends in "holds" or "BROKEN"."""
    judge = _gpu_bars if device.startswith("NVIDIA H200") else _cpu_bars if device.startswith("CPU") else None
    lines = []
    for row in rows:
        if judge and row["contender"] == "alignkit" and _has_bars(row):
            where = f"{row['case']} {sizes(row)}"
            lines += [f"{where}: red, {row['red']}: BROKEN"] if row["red"] else judge(row, where)
    return lines


def _has_bars(row: Row) -> bool:
    """Small shapes only show that everything runs; the device determines the shapes of the ragged operations."""
    shapes = GPU_SHAPES if row["dtype"] == "bfloat16" else CPU_SHAPES
    known = [dict(zip("NHV", shape, strict=True)) for shape in shapes]
    return row["case"] in VECTORS or any(row["shape"].items() <= k.items() for k in known)


def _verdict(holds: bool) -> str:
    return "holds" if holds else "BROKEN"


def _cpu_bars(row: Row, where: str) -> list[str]:
    if row["case"] not in CPU_BARS or "eager" not in row["time_to"]:
        return []
    time_bar, peak_bar = CPU_BARS[row["case"]]
    time, peak = row["time_to"]["eager"], row["peak_to"].get("eager")
    line = f"{where}: {time:.2f}x eager's time (bar {time_bar:.2f}; least times {row['least_to']['eager']:.2f}x)"
    if peak is not None:
        line += f", {peak:.2f}x its peak (bar {peak_bar:.2f})"
    return [f"{line}: {_verdict(time <= time_bar and (peak is None or peak <= peak_bar))}"]


def _gpu_bars(row: Row, where: str) -> list[str]:
    lines = []
    if row["dtype"] == "bfloat16" and row["case"] in GPU_BARS and row["to_floor"]:
        bar = GPU_BARS[row["case"]]
        lines.append(f"{where}: {row['to_floor']:.2f}x its floor (bar {bar:.2f}): {_verdict(row['to_floor'] <= bar)}")
    for rival, ratio in row["time_to"].items():
        if rival not in APPROXIMATE | OWN:
            lines.append(f"{where}: {ratio:.2f}x {rival}'s time (bar 1.00): {_verdict(ratio <= 1)}")
    if row["case"] in LEAN and row["peak_beyond_gradients_mib"] is not None:
        peak = row["peak_beyond_gradients_mib"]
        lines.append(
            f"{where}: {peak:.0f} MiB beyond the gradients (bar {GPU_PEAK_MIB}): {_verdict(peak < GPU_PEAK_MIB)}"
        )
    return lines


def sizes(row: Row) -> str:
    """Return the shape as short text."""
    return " ".join(f"{k}{v}" for k, v in row["shape"].items())


def table(rows: list[Row], skipped: list[dict[str, str]], judged: list[str], machine: dict[str, Any]) -> str:
    """Lay out rows, absent contenders and bars for a terminal."""
    threads = f", threads {machine['threads']}" if machine["device"].startswith("CPU") else ""
    versions = ", ".join(f"{k} {machine[k]}" for k in ("torch", "triton", "cuda", "driver") if machine[k])
    body = [_cells(row) for row in rows]
    widths = [max(len(line[i]) for line in [HEAD, *body]) for i in range(len(HEAD))]
    lines = [f"{machine['device']}{threads}, {versions}, {machine['date']}"]
    shown = None
    for line, row in zip(body, rows, strict=True):
        if sizes(row) != shown:
            shown = sizes(row)
            lines += ["", f"{shown}  {row['dtype']}", _aligned(HEAD, widths)]
        lines.append(_aligned(line, widths) + (f"   {row['red']}" if row["red"] else ""))
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for s in skipped:
        reasons[s["contender"], s["why"]].append(s["case"].split()[0])
    if reasons:
        lines.append("")
    for (contender, why), where in reasons.items():
        lines.append(f"without {contender}: {why} ({', '.join(dict.fromkeys(where))})")
    return "\n".join([*lines, *([""] if judged else []), *judged])


def _cells(row: Row) -> list[str]:
    name = row["contender"] + (" (approximate)" if row["approximate"] else "")
    time = ["RED", "", ""] if row["red"] else [_digits(row[k]) for k in ("ms", "ms_min", "ms_max")]
    peaks = [f"{row[k]:.1f}" if row[k] is not None else "-" for k in ("peak_mib", "peak_beyond_gradients_mib")]
    floor = f"{row['to_floor']:.2f}" if row["to_floor"] else "-"
    eager = f"{row['time_to']['eager']:.2f}" if "eager" in row["time_to"] else "-"
    ratio = f"{row['error_to_eager']:.2f}" if row["error_to_eager"] is not None else "-"
    return [row["case"], name, *time, *peaks, floor, eager, f"{row['error']:.1e}", ratio]


def _digits(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def _aligned(cells: list[str], widths: list[int]) -> str:
    named = [c.ljust(w) for c, w in zip(cells[:2], widths[:2], strict=True)]
    return "  ".join([*named, *(c.rjust(w) for c, w in zip(cells[2:], widths[2:], strict=True))]).rstrip()
