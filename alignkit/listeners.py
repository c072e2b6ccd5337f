"""Who listens to a run, and what they said: each alarm once, in the log, the metrics and alarms.jsonl."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from alignkit import registry
from alignkit.alarms import Alarm, RunView
from alignkit.runfolder import StepLines, of_training, read_lines

logger = logging.getLogger(__name__)


class Listeners:
    """The installed listeners of one run, of its main process; open while its loop runs.

    A listener that raises is left out from then on: nobody who watches may end what is watched.
    """

    def __init__(self, run: RunView, done: int, evaluated: int) -> None:
        self._run, self._hooks = run, registry.listeners(logger.warning)
        self._lines = StepLines(run.folder / "alarms.jsonl", done, evaluated)
        self._said = {str(line.get("name")) for line in read_lines(self._lines.path)}
        for name in sorted(self._said & set(run.settings.get("stop_on") or ())):
            logger.warning("stop_on: %s was raised before, and does not end the run any more", name)

    def hear(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Ask everybody about a line of metrics; return the alarms that are new, logged and written."""
        new = [alarm for alarm in self._asked(step, metrics) if alarm.name not in self._said]
        new = list({alarm.name: alarm for alarm in reversed(new)}.values())[::-1]
        training = of_training(metrics)
        for alarm in new:
            logger.warning("alarm %s: %s. %s", alarm.name, alarm.message, alarm.remedy)
            self._lines.write(step, {**asdict(alarm), "training": training})
            self._said.add(alarm.name)
        return new

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _asked(self, step: int, metrics: Mapping[str, float]) -> Iterator[Alarm]:
        for name, hooks in list(self._hooks.items()):
            try:
                said = hooks.on_metrics(run=self._run, step=step, metrics=dict(metrics))
                yield from [_checked(alarm) for some in said for alarm in some]
            except (Exception, SystemExit) as error:  # a stranger's code may do anything
                logger.warning("listener '%s' is left out: %s: %s", name, type(error).__name__, error)
                del self._hooks[name]


def _checked(alarm: Any) -> Alarm:
    """Return the alarm with plain numbers and texts, as a line of JSON wants them."""
    if not isinstance(alarm, Alarm):
        raise TypeError(f"on_metrics returns a list of alignkit.Alarm, not of {type(alarm).__name__}")
    value, limit = float(alarm.value), float(alarm.limit)
    if not math.isfinite(value) or not math.isfinite(limit):
        raise ValueError(f"alarm '{alarm.name}' has value {value} and limit {limit}; give finite numbers")
    return Alarm(str(alarm.name), value, limit, str(alarm.message), str(alarm.remedy))
