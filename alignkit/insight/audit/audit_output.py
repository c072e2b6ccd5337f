"""An audit on the terminal, as JSON, and as an HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.files import write_text
from alignkit.insight import page, terminal
from alignkit.insight.audit.bias import Bias
from alignkit.insight.audit.data_audit import Audit
from alignkit.insight.audit.lengths import QUANTILES
from alignkit.insight.audit.reward_audit import Effect, RewardAudit

_BIAS = ("feature", "differs in", "{} has more", "95 % interval", "rule's accuracy")
_EFFECT = ("feature", "change", "answers", "mean change", "95 % interval")


@dataclass(frozen=True)
class Section:
    """A section of the output: lines of text, then tables (caption, columns, rows of cells)."""

    title: str
    lines: tuple[str, ...] = ()
    tables: tuple[tuple[str, tuple[str, ...], list[list[str]]], ...] = ()


def print_audit(audit: Audit) -> None:
    """Print everything to the terminal, the findings last."""
    from rich.markup import escape
    from rich.table import Table

    for section in sections(audit):
        terminal.show(f"\n[bold]{escape(section.title)}[/bold]")
        for line in section.lines:
            terminal.show(escape(line))
        for caption, columns, rows in section.tables:
            table = Table(title=caption or None, title_justify="left", title_style="", box=None, pad_edge=False)
            for i, column in enumerate(columns):
                table.add_column(column, justify="right" if i else "left", no_wrap=True)
            for row in rows:
                table.add_row(*map(escape, row))
            terminal.show(table)
    terminal.show("\n[bold]findings[/bold]")
    for finding in audit.findings:
        terminal.show(f"- {escape(finding.what)}\n  [dim]{escape(finding.remedy)}[/dim]")
    if not audit.findings:
        terminal.show("none")


def write_json(audit: Audit, path: Path) -> None:
    """Write all numbers as JSON."""
    write_text(path, json.dumps(audit.describe(), indent=1) + "\n")


def write_html(audit: Audit, path: Path) -> None:
    """Write one HTML page that works offline."""
    page.write(
        path,
        "audit.html",
        f"Audit of {Path(audit.source).name}",
        audit=audit,
        facts=facts(audit),
        sections=list(sections(audit)),
    )


def sections(audit: Audit) -> Iterator[Section]:
    """Yield the sections in order, without the findings."""
    yield Section("rows", tuple(_row_lines(audit)))
    columns = ("part", "rows", "mean", *(f"{q:.0%}" for q in QUANTILES), "longest")
    lengths = [
        [x.part, str(x.n), f"{x.mean:.1f}", *(f"{q:.0f}" for q in x.quantiles), str(x.longest)] for x in audit.lengths
    ]
    yield Section(f"lengths in {audit.unit}", tuple(_budget_lines(audit)), (("", columns, lengths),))
    if audit.biases:
        yield Section("features that the preferences favour", (), (_biases("chosen", audit.biases),))
    if audit.reward:
        yield from _reward_sections(audit.reward)


def _row_lines(audit: Audit) -> Iterator[str]:
    repeated = audit.repeats
    yield from audit.lines
    yield f"serves methods that read {', '.join(audit.serves)}"
    if audit.labels:
        yield f"{audit.labels[0]} desirable, {audit.labels[1]} undesirable answers"
    yield (
        f"{audit.kept} rows are kept, with {repeated.prompts} different prompts; "
        f"{len(repeated.duplicates)} duplicates, {len(repeated.contradictions)} contradictions"
    )
    if audit.shared is not None:
        yield f"{len(audit.shared)} held-out rows have a prompt that is trained on"


def _budget_lines(audit: Audit) -> Iterator[str]:
    if (b := audit.budgets) is None:
        return
    yield f"max_prompt_tokens {b.max_prompt_tokens} cuts {b.prompts_cut} of {audit.kept} prompts"
    yield f"max_completion_tokens {b.max_completion_tokens} cuts {b.answers_cut} of {b.answers} answers"
    for reason, rows in b.dropped.items():
        yield f"{len(rows)} dropped {reason}"


def _reward_sections(reward: RewardAudit) -> Iterator[Section]:
    lines = [f"{reward.rows} rows scored; mean {reward.mean:.4g}, standard deviation {reward.deviation:.4g}"]
    if reward.accuracy is not None:
        between = _interval(reward.low, reward.high, "{:.1%}")
        lines.append(
            f"agrees with {reward.accuracy:.1%} of the preferences ({between}); ties, counted half: {reward.ties}"
        )
    tables = (_biases("higher score", reward.biases),) if reward.biases else ()
    yield Section(f"features that the reward '{reward.reward}' favours", tuple(lines), tables)
    yield Section(
        "the same answer, changed",
        ("the change of its score, in standard deviations of the scores",),
        (("", _EFFECT, [_effect(e) for e in reward.effects if e.n]),),
    )


def _biases(preferred: str, biases: Sequence[Bias]) -> tuple[str, tuple[str, ...], list[list[str]]]:
    rows = [
        [
            b.feature,
            f"{b.differs} of {b.pairs}",
            "-" if b.share is None else f"{b.share:.1%}{' *' * b.beyond_chance}",
            _interval(b.low, b.high, "{:.1%}"),
            f"{b.direction}: {b.accuracy:.1%}",
        ]
        for b in biases
    ]
    return "", tuple(name.format(preferred) for name in _BIAS), rows


def _effect(effect: Effect) -> list[str]:
    mean = "-" if effect.mean is None else f"{effect.mean:+z.3f}{' *' * effect.beyond_chance}"
    return [effect.feature, effect.change, str(effect.n), mean, _interval(effect.low, effect.high, "{:+z.3f}")]


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "-" if low is None or high is None else f"{form.format(low)} to {form.format(high)}"


def facts(audit: Audit) -> list[tuple[str, Any]]:
    """Return the numbers at the top of the page."""
    numbers: list[tuple[str, Any]] = [("rows", audit.total), ("kept", audit.kept), ("prompts", audit.repeats.prompts)]
    numbers += [("duplicates", len(audit.repeats.duplicates)), ("contradictions", len(audit.repeats.contradictions))]
    return [*numbers, ("findings", len(audit.findings))]
