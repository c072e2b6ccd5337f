"""A monitor over a run's folder from the first line, also for resumed and finished runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.alarms import Alarm, Health
from alignkit.config import gathered, read_yaml, validated
from alignkit.errors import ConfigError, DataError
from alignkit.insight.health.completion_stats import Row
from alignkit.insight.health.monitor import Monitor
from alignkit.runs.folder import of_training, read_metrics


class Watch:
    """Passes lines of metrics to a monitor, with their completions (the first rank's) from the run's folder."""

    def __init__(self, folder: Path, limits: Health, settings: Mapping[str, Any]) -> None:
        self._monitor, self._enabled = Monitor(limits, settings), limits.enabled
        self._path, self._offset = folder / "completions.jsonl", 0

    @classmethod
    def of(cls, folder: Path, settings: Mapping[str, Any]) -> Watch:
        """Watch a run by the limits in its settings; lines that the folder already has are history."""
        watch = cls(folder, validated(Health, settings.get("health") or {}), settings)
        for line in read_metrics(folder):
            watch.see(line["step"], line)
        return watch

    def see(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Return the alarms at a line."""
        return self._monitor.see(step, metrics, self._rows(step, of_training(metrics))) if self._enabled else []

    def _rows(self, step: int, trained: bool) -> list[Row]:
        """Return the completions of a line. Earlier ones, of steps that were not logged, are skipped."""
        rows: list[Row] = []
        if not self._path.is_file():
            return rows
        with self._path.open("rb") as lines:
            lines.seek(self._offset)
            for line in lines:
                try:
                    row = json.loads(line)
                    place = (int(row["step"]), not row["training"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    if not line.endswith(b"\n"):
                        break  # it is being written, or was cut off when a run was killed
                    self._offset += len(line)
                    continue
                if place > (step, not trained):
                    break
                self._offset += len(line)
                if place == (step, not trained) and not row.get("rollout"):  # a baseline is not the policy
                    rows.append(row)
        return rows


def replay(folder: Path, changes: Mapping[str, Any] | None = None) -> list[tuple[int, Alarm]]:
    """Return the alarms of a run's folder with their steps, each name once, as the run would have reported them.

    changes: other limits, such as {"kl_high": 20}. Raises DataError (no run, or an empty one), ConfigError (a limit).
    """
    settings = _settings(folder)
    given = gathered({"health": settings.get("health") or {}, **{f"health.{k}": v for k, v in (changes or {}).items()}})
    try:
        limits = validated(Health, {**given["health"], "enabled": True})
    except ConfigError as error:
        raise ConfigError(f"health in {folder / 'config.yaml'}, or --set: {error}") from None
    lines = read_metrics(folder)
    if not lines:
        raise DataError(f"{folder / 'metrics.jsonl'} is empty: the run has done no step")
    watch = Watch(folder, limits, settings)
    found: dict[str, tuple[int, Alarm]] = {}
    for line in lines:
        for alarm in watch.see(line["step"], line):
            found.setdefault(alarm.name, (line["step"], alarm))
    return list(found.values())


def _settings(folder: Path) -> dict[str, Any]:
    if not (folder / "metrics.jsonl").is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/metrics.jsonl"))
        hint = f"runs in it: {', '.join(inside[:8])}" if inside else "give the folder of a run, such as runs/dpo-001"
        raise DataError(f"no run in {folder}: it has no metrics.jsonl; {hint}")
    file = folder / "config.yaml"
    settings = read_yaml(file) if file.is_file() else {}
    if not isinstance(settings.get("health", {}), Mapping):
        raise ConfigError(
            f"{file}: health is {settings['health']!r:.80}; it must be a mapping, such as {{kl_high: 20}}"
        )
    return settings
