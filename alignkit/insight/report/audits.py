"""The audit of the data that runs were trained on, as far as it is still there and the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit import sessions
from alignkit.card import place
from alignkit.errors import AlignkitError
from alignkit.insight.audit import Audit, audit
from alignkit.insight.audit.shown import Part, parts
from alignkit.insight.report.read import Run
from alignkit.rows import SUFFIXES


@dataclass(frozen=True)
class Audited:
    """A data source of one or more runs. notes: why there is no audit, or what changed since."""

    source: str
    notes: list[str]
    audit: Audit | None
    parts: list[Part]


def audited(runs: Sequence[Run]) -> list[Audited]:
    """Audit every data source of the runs once; what cannot be read is said, and stops nothing."""
    found: dict[str, Audited] = {}
    for run in runs:
        settings = run.settings
        key = str([settings.get(name) for name in ("data", "eval_data", "columns")])
        if key not in found:
            found[key] = _audited(run)
    return list(found.values())


def _audited(run: Run) -> Audited:
    source = run.settings["data"]
    given = {name: run.settings.get(name) for name in ("data", "eval_data")}
    notes = [note for name, value in given.items() if value is not None and (note := _state(run, name, value))]
    if not _file(source):
        return Audited(place(source), notes, None, [])
    limits = {k: run.settings[k] for k in ("max_prompt_tokens", "max_completion_tokens") if k in run.settings}
    base = run.settings.get("tokenizer") or run.settings["model"]
    options: dict[str, Any] = {
        "eval_data": given["eval_data"] if _file(given["eval_data"]) else None,
        "columns": run.settings.get("columns"),
        "model": base if isinstance(base, str) and Path(base).is_dir() else None,  # no download for a report
    }
    try:
        made = audit(source, **options, **limits)
    except AlignkitError as error:
        return Audited(place(source), [*notes, f"No audit: {error}"], None, [])
    return Audited(place(source), notes, made, list(parts(made)))


def _state(run: Run, name: str, value: object) -> str | None:
    """Say where a source is gone, is no file, or is not what the run read; None where it is the same."""
    before = run.sessions[-1]["facts"].get(f"{name}_sha256") if run.sessions else None
    if not _file(value):
        gone = before is not None or Path(str(value)).suffix in SUFFIXES
        return f"{name}: {value} is {'no longer there' if gone else 'no file'}, so it is not audited."
    if before is None:
        return f"{name}: the run kept no checksum, so {value} may have changed since."
    if sessions.digest(value) != before:
        return f"{name}: {value} has changed since the run; what follows is of the file as it is now."
    return None


def _file(value: object) -> bool:
    return isinstance(value, str) and Path(value).is_file()
