"""Audits of the data that runs were trained on, where the files still exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.data_spec import SUFFIXES, suffix_of
from alignkit.errors import AlignkitError
from alignkit.insight.audit import Audit, audit
from alignkit.insight.audit.audit_output import Section, sections
from alignkit.insight.report.run_files import Run
from alignkit.runs import sessions
from alignkit.runs.card import place


@dataclass(frozen=True)
class AuditedSource:
    """A data source of one or more runs, by their labels.

    notes: why there is no audit, or what changed since; each with the labels of the runs concerned.
    """

    source: str
    runs: list[str]
    notes: dict[str, list[str]]
    audit: Audit | None
    sections: list[Section]


def audit_sources(runs: Sequence[Run]) -> list[AuditedSource]:
    """Audit each data source once for all runs that read it the same way. An unreadable source gets a note."""
    found: dict[str, AuditedSource] = {}
    for run in runs:
        source, options = run.settings["data"], _options(run)
        key = str((source, options))
        if key not in found:
            found[key] = _audit(source, options)
        found[key].runs.append(run.label)
        for name in ("data", "eval_data"):
            value = run.settings.get(name)
            if value is not None and (note := _change(run, name, value)):
                found[key].notes.setdefault(note, []).append(run.label)
    return list(found.values())


def _options(run: Run) -> dict[str, Any]:
    """Return the options of an audit; where there is no file to audit, what distinguishes its source from others."""
    settings = run.settings
    if not _file(settings["data"]):
        return {"eval_data": settings.get("eval_data"), "columns": settings.get("columns")}
    base = settings.get("tokenizer") or settings["model"]
    return {
        "eval_data": settings["eval_data"] if _file(settings.get("eval_data")) else None,
        "columns": settings.get("columns"),
        "model": base if isinstance(base, str) and Path(base).is_dir() else None,  # no download for a report
        **{k: settings[k] for k in ("max_prompt_tokens", "max_completion_tokens") if k in settings},
    }


def _audit(source: Any, options: dict[str, Any]) -> AuditedSource:
    runs: list[str] = []
    if not _file(source):
        return AuditedSource(place(source), runs, {}, None, [])
    try:
        found = audit(source, **options)
    except AlignkitError as error:
        return AuditedSource(place(source), runs, {f"No audit: {error}": runs}, None, [])
    return AuditedSource(place(source), runs, {}, found, list(sections(found)))


def _change(run: Run, name: str, value: object) -> str | None:
    """Return a note where a source is missing, is not a file, or has changed since the run, else None."""
    before = run.sessions[-1]["facts"].get(f"{name}_sha256") if run.sessions else None
    if not _file(value):
        gone = before is not None or suffix_of(str(value)) in SUFFIXES
        return f"{name}: {value} {'no longer exists' if gone else 'is not a file'}, so it is not audited."
    if before is None:
        return f"{name}: the run kept no checksum, so {value} may have changed since."
    if sessions.digest(value) != before:
        return f"{name}: {value} has changed since the run; this audits the file as it is now."
    return None


def _file(value: object) -> bool:
    return isinstance(value, str) and Path(value).is_file()
