"""config.yaml in a run's folder: written at the start, compared when the run is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from alignkit.config import RunConfig, gathered, read_yaml, write_yaml
from alignkit.errors import ConfigError
from alignkit.rollout_settings import FREE as FREE_OF_ROLLOUT

FILE = "config.yaml"
# what only the folder of a run, or of a pipeline, has beside its settings
_OF_FOLDERS = ("models.json", "metrics.jsonl", "sessions.json", "checkpoints", "summary.json")

# settings that may change when a run is resumed, because they do not change its results
FREE = {
    "resume", "name", "output", "log_every", "save_every", "save_minutes", "keep_checkpoints", "max_tokens",
    "trackers", "device", "timeout_minutes", "trust_remote_code", "allow_changed_models", "cache_file",
    "reference_cache", "rows_cache", "kept_logits_gib", "health", "stop_on", "callbacks", "quiet", "push_to_hub",
    "fsdp", "fsdp_replicas", *(f"rollout.{name}" for name in FREE_OF_ROLLOUT),
}  # fmt: skip


def write_config(
    folder: Path,
    settings: Mapping[str, Any],
    resume: bool,
    defaults: Mapping[str, Any] | None = None,
    moved: Mapping[str, str] | None = None,
) -> None:
    """Write config.yaml; where the run is resumed, compare it instead. Raises ConfigError naming changed settings.

    defaults: of settings that did not exist when the run was started. moved: the paths of models then -> now.
    """
    path = folder / "config.yaml"
    if resume:
        started = _moved(_filled(read_yaml(path), defaults or {}), moved or {})
        before, now = ({k: v for k, v in s.items() if k not in FREE} for s in (started, settings))
        check_same(folder, before, now)
        return
    write_yaml(path, {k: v for k, v in settings.items() if k != "resume"})


def _filled(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run by their names of today, with defaults of those that it lacks, also in mappings."""
    saved = gathered(saved)
    inner = {
        k: {**defaults[k], **v} for k, v in saved.items() if isinstance(v, dict) and isinstance(defaults.get(k), dict)
    }
    return {**defaults, **saved, **inner}


def _moved(value: Any, moved: Mapping[str, str]) -> Any:
    """Return settings with the paths of models as they are now."""
    if isinstance(value, dict):
        return {k: _moved(v, moved) for k, v in value.items()}
    if isinstance(value, list):
        return [_moved(v, moved) for v in value]
    return moved.get(value, value) if isinstance(value, str) else value


def start_date(config: RunConfig) -> date:
    """Return the date that chat templates write in a run: the setting, or the day on which the run was started."""
    if config.template_date is not None:
        return config.template_date
    path = config.output / (config.name or "") / "config.yaml"
    if not config.resume or not path.is_file():
        return date.today()
    pinned = read_yaml(path).get("template_date")
    return date.fromisoformat(str(pinned)) if pinned else date.fromtimestamp(path.stat().st_mtime)


def located(file: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a file of a run's or a pipeline's folder, with that folder as their place.

    So a folder that was moved or copied is resumed where it lies. Other files name the place themselves.
    """
    folder = Path(file).parent
    if not folder.name or folder.name == "..":
        folder = folder.absolute()
    if settings.get("name") != folder.name and not any((folder / name).exists() for name in _OF_FOLDERS):
        return dict(settings)
    return {**settings, "output": str(folder.parent), "name": folder.name}


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError naming the settings that differ between a folder's start and now."""
    before, now = dict(before), dict(json.loads(json.dumps(now)))
    for group in ("lora", "sampling", "rollout"):  # their settings are named one by one
        both: list[dict[str, Any]] = [before, now]
        if all(isinstance(values.get(group), dict) for values in both):
            for values in both:
                values |= {f"{group}.{key}": value for key, value in values.pop(group).items()}
    changed = [k for k in sorted({*before, *now} - FREE) if before.get(k) != now.get(k)]
    if changed:
        was = "; ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in changed[:3])
        raise ConfigError(
            f"{folder} was started with other settings: {was}. Resume with the same settings, or start a new run"
        )
