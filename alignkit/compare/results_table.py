"""A comparison as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignkit.compare.comparison import FIGURES, Comparison
from alignkit.files import write_text

_TITLES = {
    "win_rate": ("win rate", "{:.1%}"),
    "accuracy": ("preference accuracy", "{:.1%}"),
    "kl": ("KL", "{:z.2f}"),
    "distinct_2": ("distinct-2", "{:.3f}"),
    "seconds": ("seconds", "{:.0f}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
}


def table(comparison: Comparison) -> Any:
    """Return a rich table: a row for the base and for each method, "-" where a figure is not available."""
    from rich.markup import escape
    from rich.table import Table

    result = Table("method", *(title for title, _ in _TITLES.values()), box=None)
    for row in comparison.rows:
        if row.failed:
            result.add_row(row.method, f"failed: {escape(row.failed)}")
            continue
        cells = [(template, row.figures[name]) for name, (_, template) in _TITLES.items()]
        result.add_row(row.method, *("-" if value is None else template.format(value) for template, value in cells))
    return result


def notes(comparison: Comparison) -> list[str]:
    """Return why methods that did not fail have no win rate."""
    without = [row.method for row in comparison.rows if not row.failed and row.figures["win_rate"] is None]
    if not without:
        return []
    if not comparison.judged:
        return ["no win rate: nothing decides which of two answers is better; give a --reward or a --judge"]
    return [f"no win rate of {', '.join(without)}: to no prompt does the reward score both answers, it returned None"]


def write_json(comparison: Comparison, path: Path) -> None:
    """Write all rows with their figures, and what was left out."""
    values = {"figures": FIGURES, **asdict(comparison), "folder": str(comparison.folder)}
    write_text(path, json.dumps(values, indent=2) + "\n")
