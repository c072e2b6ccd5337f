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

_LOCATION = ("output", "name", "resume")  # where a run is, which its heading shows
_NO_DEFAULT = object()


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with mappings flattened: "sampling.temperature". A reward's mapping stays whole."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and key not in ("reward", "judge", "columns"):
            found |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            found[key] = value
    return found


def changed(run: Run) -> list[tuple[str, str, str]]:
    """Return (name, value, default) of every setting that is not at its default; "-" without a default."""
    known = _defaults(run.method)
    rows = []
    for key, value in flat(run.settings).items():
        default = known.get(key, _NO_DEFAULT)
        if key not in _LOCATION and (default is _NO_DEFAULT or default != value):
            rows.append((key, as_yaml(value), "-" if default is _NO_DEFAULT else as_yaml(default)))
    return rows


def everything(run: Run) -> list[tuple[str, str]]:
    """Return (name, value) of every setting."""
    return [(key, as_yaml(value)) for key, value in flat(run.settings).items()]


def between(runs: Sequence[Run]) -> list[list[str]]:
    """Return one row per setting in which the runs differ: its name, then the value in each run."""
    each = [flat(run.settings) for run in runs]
    keys = dict.fromkeys(key for settings in each for key in settings)
    rows = [[key, *(as_yaml(s[key]) if key in s else "-" for s in each)] for key in keys if key not in _LOCATION]
    return [row for row in rows if len(set(row[1:])) > 1]


def as_yaml(value: Any) -> str:
    """Return a value as text, as in a settings file."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _defaults(method: str) -> dict[str, Any]:
    """Return the defaults of all settings, flat, as in a config.yaml; required settings are left out."""
    classes: list[type[BaseModel]] = [RunConfig]
    with suppress(PluginError):  # the method is not installed here: its settings are shown without defaults
        classes.append(registry.get(method).Config)
    found: dict[str, Any] = {}
    for cls in classes:
        for name, field in cls.model_fields.items():
            if not field.is_required():
                value = field.get_default(call_default_factory=True)
                value = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
                found[name] = json.loads(json.dumps(value, default=str))
    return flat(found)
