"""Alarms during a run: a listener that looks at every line of metrics, and the same over the folder of an old run."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from alignkit.alarms import Alarm, RunView
from alignkit.hookspecs import hookimpl
from alignkit.insight.health.monitor import Monitor
from alignkit.insight.health.watch import Watch, replay

__all__ = ["Monitor", "Watch", "replay"]

_watches: WeakKeyDictionary[RunView, Watch] = WeakKeyDictionary()


@hookimpl
def on_metrics(run: RunView, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
    """Return what is wrong at this step, said before or not."""
    if run not in _watches:
        _watches[run] = Watch.of(run.folder, run.settings)
    return _watches[run].see(step, metrics)
