"""A recommendation as text for the terminal."""

from __future__ import annotations

from typing import Any

import yaml
from rich.markup import escape

from alignkit.insight import terminal
from alignkit.insight.recommend.recommendation import Recommendation


def print_recommendation(found: Recommendation) -> None:
    """Print the methods in their order, each with its reason, and the settings to start from."""
    for line in lines(found):
        terminal.show(line)


def lines(found: Recommendation) -> list[str]:
    """Return the lines of `print_recommendation`, for rich."""
    text = [escape(line) for line in found.facts.audit.lines]
    text += [f"[bold]warning:[/bold] {escape(caution)}" for caution in found.cautions]
    if found.first is not None:
        text += [f"\n[bold]start with {escape(found.first.method)}[/bold]: {escape(found.first.reason)}"]
        text += [f"  {escape(yaml_line(c.name, c.value))}  [dim]{escape(c.why)}[/dim]" for c in found.settings]
    if found.fit is not None:
        text += [f"memory: {escape(found.fit.sentence)}"]
    if found.also:
        text += ["\nalso:", *(f"  {escape(o.method)}: {escape(o.reason)}" for o in found.also)]
    if found.refused:
        text += ["\ncannot be used:" if found.first else "\nno installed method can be used with these rows:"]
        text += [f"  {escape(name)}: {escape(reason)}" for name, reason in found.refused.items()]
    return text


def yaml_line(name: str, value: Any) -> str:
    """Return a setting as YAML, on one line."""
    # dumped as the only item of a list: else a mapping would span several lines, and a number end in "..."
    written = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**6)
    return f"{name}: {written.strip()[1:-1]}"
