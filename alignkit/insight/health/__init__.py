"""Alarms during a run: a listener that reads every line of metrics, and the same for the folder of a finished run.

detectors.py         one function per alarm over the history
history.py           values at the start and now
completion_stats.py  statistics of completions, in addition to the metrics
alarm_messages.py    message and remedies of each alarm
monitor.py           all detectors over the lines of one run
watch.py             a monitor that reads the folder of a run
alarm_output.py      terminal, JSON
"""

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
    """Return what is wrong at this step, whether or not it was reported before."""
    if run not in _watches:
        _watches[run] = Watch.of(run.folder, run.settings)
    return _watches[run].see(step, metrics)
