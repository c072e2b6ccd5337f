"""A comparison as a table, as JSON, and as a picture of win rate against KL."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignkit.compare.together import FIGURES, Comparison
from alignkit.errors import ConfigError

_TITLES = {
    "win_rate": ("win rate", "{:.1%}"),
    "accuracy": ("preference accuracy", "{:.1%}"),
    "kl": ("KL", "{:.2f}"),
    "distinct_2": ("distinct-2", "{:.3f}"),
    "seconds": ("seconds", "{:.0f}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
}


def table(comparison: Comparison) -> Any:
    """Return a rich table: a row for the base and for each method, "-" where a figure cannot be had."""
    from rich.markup import escape
    from rich.table import Table

    made = Table("method", *(title for title, _ in _TITLES.values()), box=None)
    for row in comparison.rows:
        if row.failed:
            made.add_row(row.method, f"failed: {escape(row.failed)}")
            continue
        cells = [(form, row.figures[name]) for name, (_, form) in _TITLES.items()]
        made.add_row(row.method, *("-" if value is None else form.format(value) for form, value in cells))
    return made


def write_json(comparison: Comparison, path: Path) -> None:
    """Write all rows with their figures, and what was left out."""
    values = {"figures": FIGURES, **asdict(comparison), "folder": str(comparison.folder)}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_picture() -> None:
    """Raise ConfigError where matplotlib is not installed."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise ConfigError("a picture needs matplotlib; try: pip install 'alignkit[bench]'") from None


def draw(comparison: Comparison, path: Path) -> None:
    """Draw win rate against KL, one labelled point a method, to a PNG. Raises ConfigError without a win rate."""
    check_picture()
    points = [
        (row.method, kl, rate)
        for row in comparison.rows
        if (kl := row.figures["kl"]) is not None and (rate := row.figures["win_rate"]) is not None
    ]
    if not points:
        raise ConfigError("no picture: no method has a win rate; give --reward or --judge")
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7, 5))
    for i, (name, kl, rate) in enumerate(sorted(points, key=lambda point: point[1])):
        right, above = i % 2 == 0, i % 4 < 2  # neighbours' labels stand on different sides
        place = {"xytext": (6 if right else -6, 4 if above else -11), "ha": "left" if right else "right"}
        axes.plot(kl, 100 * rate, "o", color="#555555" if name == "base" else "#d62728")
        axes.annotate(name, (kl, 100 * rate), textcoords="offset points", fontsize=9, **place)
    axes.axhline(50, linestyle=":", linewidth=1, color="#555555")
    axes.set_xlabel("KL to the base, nats a sequence")
    axes.set_ylabel("win rate against the base, %")
    axes.margins(x=0.12, y=0.1)
    axes.grid(True, alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
