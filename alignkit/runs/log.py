"""The log of a run: metrics.jsonl, trackers, and the alarms of its listeners."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from alignkit import registry
from alignkit.alarms import Alarm, RunView
from alignkit.errors import at_place
from alignkit.runs.folder import StepLines, of_training, read_lines
from alignkit.runs.progress import Progress

logger = logging.getLogger(__name__)


class RunLog:
    """metrics.jsonl, Accelerate's trackers and the listeners, open while a loop runs; only the main process writes.

    settings: as in config.yaml. done: the step after which the session starts. evaluated: the step of the last
    evaluation. shown: the terminal's display. callbacks: by name. alarm: the first alarm that `stop_on` names, else
    None.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        accelerator: Any,
        done: int,
        total: int,
        evaluated: int,
        shown: Progress | None = None,
        callbacks: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.alarm: Alarm | None = None
        self._folder, self._settings, self._accelerator, self._shown = folder, settings, accelerator, shown
        self._start, self._callbacks = (done, total, evaluated), callbacks
        self._file: StepLines | None = None
        self._listeners: Listeners | None = None

    def __enter__(self) -> RunLog:
        done, total, evaluated = self._start
        if self._settings["trackers"]:
            plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in self._settings.items()}
            self._accelerator.init_trackers(self._folder.name, plain)
        if self._accelerator.is_main_process:
            self._file = StepLines(self._folder / "metrics.jsonl", done, evaluated)
            run = RunView(self._folder, MappingProxyType(dict(self._settings)), total)
            self._listeners = Listeners(run, done, evaluated, self._callbacks)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for one in (self._file, self._listeners):
            if one:
                one.close()
        if self._settings["trackers"]:
            self._accelerator.end_training()

    def write(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Write one step's values with the alarms that they raise, and return both; does nothing without values."""
        if not values:
            return {}
        if self._listeners:
            alarms = self._listeners.check(step, values)
            values = {**values, **{f"alarm/{alarm.name}": alarm.value for alarm in alarms}}
            # the loop reads it at the end of the step, together with all ranks
            ends = (alarm for alarm in alarms if alarm.name in self._settings["stop_on"])
            self.alarm = self.alarm or next(ends, None)
        if self._file:
            # JSON has no nan: values of a skipped step are null
            self._file.write(step, {k: v if math.isfinite(v) else None for k, v in values.items()})
        if self._settings["trackers"]:
            self._accelerator.log(dict(values), step=step)
        if self._shown:
            self._shown.step(step, values, always=not of_training(values))
        return dict(values)


class Listeners:
    """The installed listeners and the callbacks of one run, on its main process; open while its loop runs.

    A listener that raises is not called again: it must not end the run.
    """

    def __init__(
        self, run: RunView, done: int, evaluated: int, callbacks: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self._run, self._hooks = run, {**registry.listeners(logger.warning), **callbacks}
        self._lines = StepLines(run.folder / "alarms.jsonl", done, evaluated)
        self._raised = {str(line.get("name")) for line in read_lines(self._lines.path)}
        for name in sorted(self._raised & set(run.settings.get("stop_on") or ())):
            logger.warning("stop_on: %s was raised before, so it no longer ends the run", name)

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Pass a line of metrics to every listener; log, write and return the alarms that are new."""
        new = [alarm for alarm in self._alarms(step, metrics) if alarm.name not in self._raised]
        new = list({alarm.name: alarm for alarm in reversed(new)}.values())[::-1]
        training = of_training(metrics)
        for alarm in new:
            logger.warning("alarm %s: %s. %s", alarm.name, alarm.message, alarm.remedy)
            self._lines.write(step, {**asdict(alarm), "training": training})
            self._raised.add(alarm.name)
        return new

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _alarms(self, step: int, metrics: Mapping[str, float]) -> Iterator[Alarm]:
        for name, hooks in list(self._hooks.items()):
            try:
                returned = hooks.on_metrics(run=self._run, step=step, metrics=dict(metrics))
                yield from [_checked(alarm) for alarms in returned for alarm in alarms]
            except (Exception, SystemExit) as error:  # a plugin may raise anything
                logger.warning(
                    "listener '%s' failed and is not called again: %s: %s%s",
                    name,
                    type(error).__name__,
                    error,
                    at_place(error),
                )
                del self._hooks[name]


def _checked(alarm: Any) -> Alarm:
    """Return the alarm with plain numbers and texts for a line of JSON."""
    if not isinstance(alarm, Alarm):
        raise TypeError(f"on_metrics must return a list of alignkit.Alarm, got one of {type(alarm).__name__}")
    value, limit = float(alarm.value), float(alarm.limit)
    if not math.isfinite(value) or not math.isfinite(limit):
        raise ValueError(f"alarm '{alarm.name}' has value {value} and limit {limit}, which must be finite")
    return Alarm(str(alarm.name), value, limit, str(alarm.message), str(alarm.remedy))
