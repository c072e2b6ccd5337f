"""The picture: time and peak memory against the vocabulary and against the tokens. Needs matplotlib."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLOURS = {"alignkit": "#d62728", "eager": "#555555", "trl": "#1f77b4", "liger": "#2ca02c",
           "cut-cross-entropy": "#9467bd", "torch.compile": "#8c564b"}  # fmt: skip
TITLES = {"path1": "frozen head (path 1)", "path3": "trained head, tight memory (path 3)"}
AXES = {"V": "vocabulary V", "N": "tokens N"}
MISSING = "no picture: matplotlib is not installed; try: pip install 'alignkit-kernels[bench]'"


def drawable() -> bool:
    """Return whether matplotlib can be imported."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        return False
    return True


def draw(path: Path, sweep: list[Row], machine: dict[str, Any]) -> str:
    """Draw the sweep's rows to a PNG; return the line to print."""
    if not drawable():
        return MISSING
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    columns = [(name, axis) for name in TITLES for axis in AXES if any(_of(sweep, name, axis))]
    if not columns:
        return f"no picture: nothing was measured of {' and '.join(TITLES)}"
    figure, axes = pyplot.subplots(2, len(columns), figsize=(4.6 * len(columns), 7.6), squeeze=False)
    for j, (name, axis) in enumerate(columns):
        rows = _of(sweep, name, axis)
        _panel(axes[0][j], rows, axis, "ms", "floor_ms")
        _panel(axes[1][j], rows, axis, "peak_mib", "logits_mib")
        fixed = next(iter(rows))["shape"]
        others = ", ".join(f"{k} {v}" for k, v in fixed.items() if k != axis)
        axes[0][j].set_title(f"{TITLES[name]}\n{others}, {rows[0]['dtype']}", fontsize=10)
        axes[1][j].set_xlabel(AXES[axis])
    axes[0][0].set_ylabel("forward + backward, ms")
    axes[1][0].set_ylabel("peak memory beyond the inputs, MiB")
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False)
    threads = f", threads {machine['threads']}" if machine["device"].startswith("CPU") else ""
    figure.suptitle(f"linear_logps on {machine['device']}{threads}, torch {machine['torch']}, {machine['date']}")
    figure.tight_layout(rect=(0, 0.04, 1, 0.98))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return f"picture: {path}"


def _of(sweep: list[Row], name: str, axis: str) -> list[Row]:
    return [row for row in sweep if row["case"] == name and row["axis"] == axis and row["ms"]]


def _panel(ax: Any, rows: list[Row], axis: str, figure: str, dashed: str) -> None:
    for contender in dict.fromkeys(row["contender"] for row in rows):
        points = [(r["shape"][axis], r[figure]) for r in rows if r["contender"] == contender and r[figure]]
        width = 2.4 if contender == "alignkit" else 1.4
        ax.plot(*zip(*points, strict=True), marker="o", ms=4, lw=width, label=contender, color=COLOURS.get(contender))
    floors = sorted({(r["shape"][axis], r[dashed]) for r in rows if r[dashed]})
    if floors:
        label = "floor: matrix products alone" if dashed == "floor_ms" else "the logits, held once"
        style = "--" if dashed == "floor_ms" else ":"
        ax.plot(*zip(*floors, strict=True), style, color="black", lw=1.2, label=label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    marks = sorted({r["shape"][axis] for r in rows})
    ax.set_xticks(marks, [f"{m // 1000}k" if m >= 10000 else str(m) for m in marks])
    ax.minorticks_on()
    ax.tick_params(axis="x", which="minor", bottom=False)
    ax.grid(True, which="both", alpha=0.25)
