"""What a row becomes: as coloured text on the terminal, as JSON, and as an HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignkit.files import write_text
from alignkit.insight import page, terminal
from alignkit.insight.inspect.inspect_output import printable
from alignkit.insight.inspect.row_view import RowView, Side

STYLES = {"prompt": "", "read": "dim", "learned": "bold green", "cut": "strike red"}
# marks for output without colours
MARKS = {"prompt": ("", ""), "read": ("", ""), "learned": ("[[", "]]"), "cut": ("~~", "~~")}
MEANING = {"prompt": "given", "read": "read, not learned", "learned": "learned", "cut": "cut by the limits"}


def print_row(view: RowView) -> None:
    """Print each side with its uses in colour (learned in [[ ]], cut in ~~ ~~), and the counts of tokens."""
    from rich.text import Text

    terminal.show(f"{view.source}, row {view.row}: form '{view.form}', read as {view.kind}")
    for side in view.sides:
        terminal.show(f"\n{side.name}: {_counts(side)}")
        terminal.show(_coloured(side))
    if view.dropped:
        terminal.show(f"\nThe run drops this row: {view.dropped}.")
    for note in view.notes:
        terminal.show(f"\nThe run reports: {note}.")
    if view.sides:
        terminal.show(Text("\n[[learned]]; ~~cut~~; the rest is given or read"))


def write_row_json(view: RowView, path: Path) -> None:
    """Write all of it as JSON."""
    write_text(path, json.dumps(view.describe(), indent=1) + "\n")


def write_row_html(view: RowView, path: Path) -> None:
    """Write one HTML page that works offline."""
    facts = [("source", view.source), ("row", view.row), ("form", view.form), ("read as", view.kind)]
    if view.dropped:
        facts.append(("the run drops it", view.dropped))
    facts += [("the run reports", note) for note in view.notes]
    pieces = [[(printable(p.text), p.use, p.n_tokens) for p in side.pieces] for side in view.sides]
    sides = [(side.name, _counts(side), some) for side, some in zip(view.sides, pieces, strict=True)]
    page.write(path, "row.html", f"Row {view.row}", facts=facts, sides=sides, meaning=MEANING)


def _counts(side: Side) -> str:
    counts = [(MEANING[use], side.count(use)) for use in ("prompt", "read", "learned", "cut")]  # type: ignore[arg-type]
    return ", ".join(f"{n} tokens {meaning}" for meaning, n in counts if n)


def _coloured(side: Side) -> Any:
    from rich.text import Text

    text = Text()
    for piece in side.pieces:
        before, after = MARKS[piece.use]
        text.append(f"{before}{printable(piece.text)}{after}", STYLES[piece.use])
    return text
