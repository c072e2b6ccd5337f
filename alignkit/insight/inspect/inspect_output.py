"""Tokens with their values: as coloured text on the terminal, as JSON, and as an HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.files import write_text
from alignkit.insight import page, terminal
from alignkit.insight.inspect.prefixes import Prefixes
from alignkit.insight.inspect.ratios import PairRatios, Side

LISTED = 10  # of the largest values
_UP, _DOWN = (0, 114, 178), (213, 94, 0)  # blue and vermilion, which nearly everybody can distinguish
_FAINT = 0.08  # of the largest value: smaller ones have no colour
_PALE = 0.2  # the same on a terminal, which may be dark, where pale tints would be conspicuous

Token = dict[str, Any]


def tokens(pieces: Sequence[str], values: Sequence[float], scores: Sequence[float]) -> list[Token]:
    """Return each piece with its value, its score, and its strength: the value divided by the largest, -1 to 1."""
    largest = max(map(abs, values), default=0.0) or 1.0
    return [
        {"n": i, "text": printable(piece), "value": value, "score": score, "strength": value / largest}
        for i, (piece, value, score) in enumerate(zip(pieces, values, scores, strict=True), 1)
    ]


def print_prefixes(found: Prefixes) -> None:
    """Print the answer, coloured by the change of the score with each piece, and the largest changes."""
    listed = tokens(found.pieces, found.changes, found.scores)
    terminal.show(_coloured(listed))
    start = "" if found.start is None else f", {found.start:.4g} before it"
    terminal.show(f"\nscore {found.scores[-1]:.4g} of the answer{start}; blue raises it, orange lowers it")
    _show_table(listed, ("n", found.unit.removesuffix("s"), "change", "score so far"))


def print_pair(found: PairRatios, beta: float) -> None:
    """Print both answers, coloured by log policy - log reference of each token, their sums, and DPO's margin."""
    for name, side in (("chosen", found.chosen), ("rejected", found.rejected)):
        listed = _side_tokens(side)
        terminal.show(f"{name}: h = {side.total:+z.4f} nats over {sum(side.trained)} tokens")
        terminal.show(_coloured(listed))
        _show_table(listed, ("n", "token", "policy - reference", "policy"))
        terminal.show("")
    terminal.show(
        f"margin h(chosen) - h(rejected) = {found.margin:+z.4f} nats; times beta {beta:g}: {beta * found.margin:+z.4f}"
    )
    terminal.show("blue: likelier under the policy than under the reference; orange: less likely")


def write_json(found: Prefixes | PairRatios, path: Path) -> None:
    """Write all numbers as JSON."""
    write_text(path, json.dumps(found.describe(), indent=1) + "\n")


def write_html(found: Prefixes | PairRatios, path: Path) -> None:
    """Write one HTML page that works offline: tokens in colour, their values on hover and in tables."""
    if isinstance(found, Prefixes):
        answers = [("the answer", f"score {found.scores[-1]:.4g}", tokens(found.pieces, found.changes, found.scores))]
        facts: list[tuple[str, Any]] = [("reward", found.reward), ("score", f"{found.scores[-1]:.4g}")]
        if found.start is not None:
            facts.append(("score of the prompt alone", f"{found.start:.4g}"))
        names, title = ("change", "score so far"), "A reward, token by token"
        legend = "Blue raises the score, orange lowers it; the stronger the colour, the larger the change."
    else:
        sides = (("chosen", found.chosen), ("rejected", found.rejected))
        answers = [(name, f"h = {side.total:+z.4f} nats", _side_tokens(side)) for name, side in sides]
        facts = [("policy", found.policy), ("reference", found.reference), ("margin", f"{found.margin:+z.4f} nats")]
        names, title = ("policy - reference", "log policy"), "A pair, token by token"
        legend = (
            "Blue is likelier under the policy than under the reference, orange less likely. "
            "Each answer has its own scale."
        )
    page.write(
        path, "inspect.html", title, prompt=printable(found.prompt), facts=facts, answers=answers, names=names,
        legend=legend, faint=_FAINT,
    )  # fmt: skip


def _side_tokens(side: Side) -> list[Token]:
    return tokens(side.pieces, [r if t else 0.0 for r, t in zip(side.ratios, side.trained, strict=True)], side.policy)


def _coloured(listed: Sequence[Token]) -> Any:
    from rich.text import Text

    text = Text()
    for token in listed:
        text.append(token["text"], _style(token["strength"]))
    return text


def _style(strength: float) -> str:
    if abs(strength) < _PALE:
        return ""
    tint = [round(255 + (c - 255) * abs(strength) * 0.75) for c in (_UP if strength > 0 else _DOWN)]
    return f"black on #{tint[0]:02x}{tint[1]:02x}{tint[2]:02x}"


def _show_table(listed: Sequence[Token], columns: Sequence[str]) -> None:
    """Print the tokens of the largest values, and how many are left out."""
    largest = sorted((t for t in listed if abs(t["strength"]) >= _FAINT), key=lambda t: -abs(t["value"]))[:LISTED]
    terminal.show(_table(sorted(largest, key=lambda t: int(t["n"])), columns))
    if left := len(listed) - len(largest):
        terminal.show(f"{left} of {len(listed)} {columns[1]}s with smaller values are not listed")


def _table(listed: Sequence[Token], columns: Sequence[str]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 1 else "right", no_wrap=True)
    for token in listed:
        table.add_row(
            str(token["n"]), escape(repr(token["text"])), f"{token['value']:+z.4f}", f"{token['score']:+z.4f}"
        )
    return table


def printable(text: str) -> str:
    """Return the text without control characters."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
