"""The pictures of growth.py and scaling.py: panels of lines, side by side. They need matplotlib."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import common

COLOURS = {"alignkit": "#d62728", "whole step": "#ff9896", "trl": "#1f77b4"}  # by the beginning of a line's name


class Panel(NamedTuple):
    """Lines by name, each of points (x, y); `scale` is that of the x axis, "log" has base 10 and "log2" base 2.

    A name that begins with "tokens" is what the tokens alone would give; its line is dashed.
    """

    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    scale: str = "linear"


def drawn(args: argparse.Namespace, title: str, panels: Sequence[Panel]) -> list[str]:
    """Draw the panels to --png, when it is given; return the lines to print."""
    from alignkit_kernels.bench import chart

    if not args.png:
        return []
    if not chart.drawable():
        return [chart.MISSING]
    if not any(points for panel in panels for points in panel.lines.values()):
        return ["no picture: nothing was measured"]
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.4), squeeze=False)
    for ax, panel in zip(axes[0], panels, strict=True):
        _panel(ax, panel)
    about = common.machine(args.threads)
    threads = f", threads {about['threads']}" if about["device"].startswith("CPU") else ""
    figure.suptitle(f"{title}\n{about['device']}{threads}, torch {about['torch']}, {about['date']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(args.png, dpi=130)
    pyplot.close(figure)
    return [f"picture: {args.png}"]


def _panel(ax: Any, panel: Panel) -> None:
    for name, points in panel.lines.items():
        if not points:
            continue
        style = {"ls": "--", "lw": 1.2, "color": "black"} if name.startswith("tokens") else {"marker": "o", "ms": 4}
        colour = next((c for word, c in COLOURS.items() if name.lower().startswith(word)), None)
        ax.plot(*zip(*points, strict=True), label=name, **{"color": colour, **style})
    if panel.scale != "linear":
        ax.set_xscale("log", base=2 if panel.scale == "log2" else 10)
    marks = sorted({x for points in panel.lines.values() for x, _ in points})
    ax.set_xticks(marks, [f"{mark:,g}" for mark in marks])
    ax.tick_params(axis="x", which="minor", bottom=False)
    ax.set_ylim(bottom=0)
    ax.set_xlabel(panel.x)
    ax.set_ylabel(panel.y)
    ax.grid(True, alpha=0.25)
    ax.legend(frameon=False)
