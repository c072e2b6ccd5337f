"""report(): read the runs, collect everything, write the page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.compare import check_matplotlib
from alignkit.insight import page
from alignkit.insight.report import charts, completions, curves, data_audits, run_facts, run_tables, setting_tables
from alignkit.insight.report.run_files import Chapter, Run, chapters

_LABELLED = 12  # steps with alarms whose numbers fit above a chart


@dataclass(frozen=True)
class NumberedAlarm:
    """An alarm in the list. number: the same as on the curves."""

    number: int
    run: str
    step: int
    name: str
    message: str
    remedy: str


def report(runs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] = "report.html") -> Path:
    """Write a report on runs as one HTML file that needs nothing else, and return its path.

    runs: folders of runs, drawn over each other, or of pipelines, stage by stage. Raises ConfigError for any other
    folder, or where matplotlib is missing, and DataError for a damaged file in it.
    """
    check_matplotlib()
    read = chapters([Path(run) for run in runs])
    names = [Path(run).resolve().name for run in runs]
    title = f"Report on {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
    page.write(
        Path(output),
        "report.html",
        title,
        chapters=[_context(chapter, len(read)) for chapter in read],
        side_by_side=run_tables.side_by_side,
    )
    return Path(output)


def _context(chapter: Chapter, n_chapters: int) -> dict[str, Any]:
    """Return a chapter in the form that the template reads."""
    runs, alarms = chapter.runs, _alarms(chapter.runs)
    return {
        "title": chapter.title if n_chapters > 1 else None,
        "many": len(runs) > 1,
        "notes": [(run.label, note) for run in runs for note in run.notes],
        "summary": [(run.label, run_facts.summary(run)) for run in runs],
        "results": run_tables.results(runs),
        "alarms": alarms,
        "unwatched": [run.label for run in runs if not _watched(run)],
        "legend": curves.legend(runs),
        "groups": curves.groups(runs, _marks(alarms)),
        "samples": [(run.label, completions.samples(run), _why_not(run)) for run in runs],
        "audits": data_audits.audit_sources(runs),
        "references": [(run.label, run_facts.reference(run)) for run in runs],
        "changed": [(run.label, setting_tables.changed(run), setting_tables.everything(run)) for run in runs],
        "between": setting_tables.between(runs),
        "labels": [run.label for run in runs],
        "environment": run_facts.environment(runs[0]),
        "environments": run_tables.environment(runs),
        "moved": [(run.label, note) for run in runs for note in run_facts.moved(run)],
        "costs": [(run.label, run_facts.cost(run)) for run in runs],
    }


def _alarms(runs: Sequence[Run]) -> list[NumberedAlarm]:
    every = [(run.label, alarm) for run in runs for alarm in run.alarms]
    texts = [(label, a, {k: str(a.get(k, "")) for k in ("name", "message", "remedy")}) for label, a in every]
    return [NumberedAlarm(i, label, int(a["step"]), **text) for i, (label, a, text) in enumerate(texts, 1)]


def _marks(alarms: Sequence[NumberedAlarm]) -> list[charts.Mark]:
    """Return one mark per step; its label has the alarms' numbers where they fit."""
    steps = sorted({a.step for a in alarms})
    found = []
    for step in steps:
        raised = [a for a in alarms if a.step == step]
        label = ",".join(str(a.number) for a in raised) if len(steps) <= _LABELLED else ""
        found.append(charts.Mark(step, label, "\n".join(f"{a.number}. {a.name}: {a.message}" for a in raised)))
    return found


def _watched(run: Run) -> bool:
    health = run.settings.get("health")
    return isinstance(health, dict) and bool(health.get("enabled", True))


def _why_not(run: Run) -> str:
    """Return why a run has no completions to show."""
    if not any("completion/length" in key for line in run.lines for key in line):
        return f"'{run.method}' learns from the answers in its data, and does not sample."
    if not any(run.answers):
        return "No held-out prompts were sampled; give eval_data or eval_fraction to compare the same prompts."
    return "Held-out prompts were sampled only once."
