"""A recommendation as text on the terminal."""

from __future__ import annotations

from typing import Any

import yaml
from rich.markup import escape

from alignkit.insight import terminal
from alignkit.insight.recommend.recommended import Recommendation


def print_recommendation(found: Recommendation) -> None:
    """Print the methods in their order, each with its reason, and the settings to begin from."""
    for line in lines(found):
        terminal.show(line)


def lines(found: Recommendation) -> list[str]:
    """Return the lines of `print_recommendation`, for rich."""
    said = [escape(line) for line in found.facts.audit.lines]
    said += [f"[bold]careful:[/bold] {escape(caution)}" for caution in found.cautions]
    if found.first is not None:
        said += [f"\n[bold]start with {escape(found.first.method)}[/bold]: {escape(found.first.reason)}"]
        said += [f"  {escape(setting(c.name, c.value))}  [dim]{escape(c.why)}[/dim]" for c in found.settings]
    if found.fit is not None:
        said += [f"memory: {escape(found.fit.said)}"]
    if found.also:
        said += ["\nalso:", *(f"  {escape(o.method)}: {escape(o.reason)}" for o in found.also)]
    if found.refused:
        said += ["\nnot, because:" if found.first else "\nno installed method can be started with these rows alone:"]
        said += [f"  {escape(name)}: {escape(reason)}" for name, reason in found.refused.items()]
    return said


def setting(name: str, value: Any) -> str:
    """Return a setting as it stands in YAML, on one line."""
    # as the only one of a list, or a mapping would be broken into lines and a number end in a document's mark
    written = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**6)
    return f"{name}: {written.strip()[1:-1]}"
