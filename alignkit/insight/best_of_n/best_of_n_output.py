"""The best of n as files of rows, a table, JSON, and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alignkit.compare import check_matplotlib
from alignkit.errors import ConfigError
from alignkit.files import write_text
from alignkit.insight.best_of_n.curve import Mean, Point
from alignkit.insight.best_of_n.selection import BestOfN
from alignkit.metrics import wins


def write_best(found: BestOfN, path: Path) -> None:
    """Write the best completion of each prompt, one JSON object per line; methods on answers read it."""
    rows = []
    for a in found.asked:
        i = a.best
        row = {"row": a.row, "prompt": a.prompt, "completion": a.completions[i], "reward": a.rewards[i]}
        gold = {} if a.golds is None else {"gold": a.golds[i]}
        rows.append({**row, **gold, "ended": a.ended[i], "prompt_cut": a.prompt_cut})
    _write_lines(rows, path)


def write_pairs(found: BestOfN, path: Path) -> dict[str, int]:
    """Write best against worst, one JSON object per line; methods on pairs read it.

    Returns how many pairs were written, and how many were left out: "equal", where all samples have the same reward,
    and "cut", where the best was cut by `max_new_tokens`: training on it would teach to stop in the middle.
    """
    rows, counts = [], {"written": 0, "equal": 0, "cut": 0}
    for a in found.asked:
        best, worst = a.best, a.worst
        equal = float(wins(*torch.tensor([a.rewards[best], a.rewards[worst]], dtype=torch.float64))) == 0.5
        outcome = "equal" if equal else "written" if a.ended[best] else "cut"
        counts[outcome] += 1
        if outcome == "written":
            row = {"row": a.row, "prompt": a.prompt, "chosen": a.completions[best], "rejected": a.completions[worst]}
            rewards = {"reward_chosen": a.rewards[best], "reward_rejected": a.rewards[worst]}
            rows.append({**row, **rewards, "prompt_cut": a.prompt_cut})
    _write_lines(rows, path)
    return counts


def write_json(found: BestOfN, path: Path) -> None:
    """Write the curve as JSON, every k."""
    header = {"model": found.model, "n": found.n, "prompts": len(found.asked), "reward": found.reward}
    values = {**header, "gold": found.gold, "curve": [asdict(point) for point in found.curve]}
    write_text(path, json.dumps(values, indent=1) + "\n")


def table(found: BestOfN) -> Any:
    """Return a rich table of the curve at the powers of two and at n."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False)
    names = ["best of", "KL, nats", "reward", "95 % interval", *(["gold", "95 % interval"] if found.gold else [])]
    for name in names:
        grid.add_column(name, justify="right", no_wrap=True)
    for point in found.curve:
        if point.k & (point.k - 1) == 0 or point.k == found.n:
            cells = [*_cells(point.proxy), *(_cells(point.gold) if point.gold else [])]
            grid.add_row(str(point.k), f"{point.kl:z.3f}", *cells)
    return grid


def draw(found: BestOfN, path: Path) -> None:
    """Draw the reward, and next to it the gold reward, against KL to a PNG, with 95 % bands."""
    check_matplotlib()
    from matplotlib.figure import Figure

    panels = [("reward", found.reward, [p.proxy for p in found.curve], "#0072b2")]
    golds = [p.gold for p in found.curve if p.gold is not None]
    if golds:
        panels.append(("gold reward", str(found.gold), golds, "#d55e00"))
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="tight")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (name, spec, means, colour) in zip(axes[0], panels, strict=True):
        _panel(axis, found.curve, means, colour)
        axis.set_title(f"{name}: {spec}", fontsize=10)
        axis.set_ylabel(f"expected {name} of the best by {found.reward}", fontsize=9)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another file") from error


def _panel(axis: Any, points: Sequence[Point], means: Sequence[Mean], colour: str) -> None:
    x, y = [p.kl for p in points], [m.value for m in means]
    axis.plot(x, y, color=colour, linewidth=1.8)
    if means[0].low is not None:
        axis.fill_between(x, [m.low for m in means], [m.high for m in means], color=colour, alpha=0.18, linewidth=0)
    marked = [i for i, p in enumerate(points) if p.k & (p.k - 1) == 0 or p.k == len(points)]
    axis.plot([x[i] for i in marked], [y[i] for i in marked], "o", color=colour, markersize=4)
    for i in marked:
        axis.annotate(
            str(points[i].k), (x[i], y[i]), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8
        )
    axis.set_xlabel("KL of the best of k to the model, nats a sequence", fontsize=9)
    axis.margins(x=0.06, y=0.12)
    axis.grid(True, alpha=0.25)


def _cells(mean: Mean) -> list[str]:
    between = "-" if mean.low is None or mean.high is None else f"{mean.low:.4g} to {mean.high:.4g}"
    return [f"{mean.value:.4g}", between]


def _write_lines(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
