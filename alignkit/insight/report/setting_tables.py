"""Settings of runs as tables: what differs from the defaults, and between runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import BaseModel

from alignkit import registry
from alignkit.config import RunConfig
from alignkit.errors import PluginError
from alignkit.insight.report.run_files import Run

_PLACE = ("output", "name", "resume")  # where a run is, which its heading says
_NONE = object()


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with mappings taken apart: "sampling.temperature". A reward's mapping stays whole."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and key not in ("reward", "judge", "columns"):
            found |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            found[key] = value
    return found


def changed(run: Run) -> list[tuple[str, str, str]]:
    """Return (name, value, default) of every setting that is not at its default; "-" where it has none."""
    known = _defaults(run.method)
    rows = []
    for key, value in flat(run.settings).items():
        default = known.get(key, _NONE)
        if key not in _PLACE and (default is _NONE or default != value):
            rows.append((key, shown(value), "-" if default is _NONE else shown(default)))
    return rows


def everything(run: Run) -> list[tuple[str, str]]:
    """Return (name, value) of every setting."""
    return [(key, shown(value)) for key, value in flat(run.settings).items()]


def between(runs: Sequence[Run]) -> list[list[str]]:
    """Return a row for each setting in which the runs differ: its name, then the value in each run."""
    each = [flat(run.settings) for run in runs]
    keys = dict.fromkeys(key for settings in each for key in settings)
    rows = [[key, *(shown(s[key]) if key in s else "-" for s in each)] for key in keys if key not in _PLACE]
    return [row for row in rows if len(set(row[1:])) > 1]


def shown(value: Any) -> str:
    """Write a value as a settings file has it."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _defaults(method: str) -> dict[str, Any]:
    """Return the defaults of all settings, flat, as they stand in a config.yaml; required ones are left out."""
    classes: list[type[BaseModel]] = [RunConfig]
    with suppress(PluginError):  # not installed where the report is made: its settings are shown without defaults
        classes.append(registry.get(method).Config)
    found: dict[str, Any] = {}
    for cls in classes:
        for name, field in cls.model_fields.items():
            if not field.is_required():
                value = field.get_default(call_default_factory=True)
                value = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
                found[name] = json.loads(json.dumps(value, default=str))
    return flat(found)
