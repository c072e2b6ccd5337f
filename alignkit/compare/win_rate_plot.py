"""The plot of win rate against KL."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from alignkit.compare.comparison import Comparison
from alignkit.errors import ConfigError


def check_matplotlib() -> None:
    """Raise ConfigError where matplotlib, which draws plots and the charts of reports, is not installed."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise ConfigError("plots need matplotlib; try: pip install 'alignkit[report]'") from None


def draw(comparison: Comparison, path: Path) -> None:
    """Plot win rate against KL, one labelled point per method, as a PNG. Raises ConfigError without a win rate."""
    check_matplotlib()
    points = [
        (row.method, kl, rate)
        for row in comparison.rows
        if (kl := row.figures["kl"]) is not None and (rate := row.figures["win_rate"]) is not None
    ]
    if not points:
        raise ConfigError("no plot: no method has a win rate; give --reward or --judge")
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7, 5))
    for i, (name, kl, rate) in enumerate(sorted(points, key=lambda point: point[1])):
        right, above = i % 2 == 0, i % 4 < 2  # labels of neighbouring points go to different sides
        position = {"xytext": (6 if right else -6, 4 if above else -11), "ha": "left" if right else "right"}
        axes.plot(kl, 100 * rate, "o", color="#555555" if name == "base" else "#d62728")
        axes.annotate(name, (kl, 100 * rate), textcoords="offset points", fontsize=9, **position)
    axes.axhline(50, linestyle=":", linewidth=1, color="#555555")
    axes.set_xlabel("KL to the base, nats per sequence")
    axes.set_ylabel("win rate against the base, %")
    axes.margins(x=0.12, y=0.1)
    axes.grid(True, alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
