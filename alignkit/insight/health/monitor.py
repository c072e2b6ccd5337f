"""The detectors over one run, line by line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from alignkit.alarms import Alarm, Health
from alignkit.insight.health.history import History
from alignkit.insight.health.texts import Row, facts, number
from alignkit.insight.health.words import DETECTORS

EVAL = "eval/"


class Monitor:
    """Looks at a run's lines in their order; what it says depends on nothing but them.

    Evaluations are a series of their own, of which one line is enough to compare with.
    """

    def __init__(self, limits: Health, settings: Mapping[str, Any] | None = None) -> None:
        self._limits, self._settings = limits, settings or {}
        self._histories = {True: History(limits.window), False: History(1, training=False)}
        for history in self._histories.values():
            history.held_out = held_out(self._settings.get("reward"))
        # while a critic warms up the policy stands still on purpose
        self._histories[True].warm_at = int(self._settings.get("critic_warmup_steps") or 0)
        self._best, self._worst = float("-inf"), float("inf")

    def see(self, step: int, metrics: Mapping[str, Any], completions: Sequence[Row] = ()) -> list[Alarm]:
        """Take in a line of metrics and the completions of its step; return what is wrong now, said before or not."""
        start = "" if training(metrics) else EVAL
        history = self._histories[not start]
        values = {
            name.removeprefix(start): value
            for name, given in metrics.items()
            if name.startswith(start) and (value := number(given)) is not None
        }
        rewards = [value for row in completions if (value := number(row.get("reward"))) is not None]
        self._best, self._worst = max([self._best, *rewards]), min([self._worst, *rewards])
        values |= facts(completions, self._best, self._worst)
        if "logps/chosen" in values and values.get("length/chosen"):
            values["logps/chosen/token"] = values["logps/chosen"] / values["length/chosen"]
        if values.get("reward/std") == 0:  # nothing varies that a critic could explain
            values.pop("value/explained_variance", None)
        history.add(step, values)
        return [alarm for detector in DETECTORS if (alarm := self._found(detector, history))]

    def _found(self, detector: Any, history: History) -> Alarm | None:
        limit = getattr(self._limits, detector.name)
        if limit is None or not (history.training or detector.evaluations):
            return None
        value = detector.find(history, limit, self._limits)
        if value is None:
            return None
        where = f"step {history.step}: " + ("" if history.training else "on held-out rows ")
        message = where + detector.what.format(value=value, limit=limit)
        return Alarm(detector.name, value, limit, message, detector.advice(self._settings))


def training(metrics: Mapping[str, Any]) -> bool:
    """Say whether a line is of a step, and not of an evaluation."""
    return not any(name.startswith(EVAL) for name in metrics)


def held_out(reward: Any) -> tuple[str, ...]:
    """Return the names of the rewards of weight 0 in a run's `reward`, as they are logged."""
    specs = reward if isinstance(reward, list | tuple) else [reward]
    idle = [s for s in specs if isinstance(s, Mapping) and number(s.get("weight")) == 0]
    return tuple(str(s.get("name") or _called(s)) for s in idle)


def _called(spec: Mapping[str, Any]) -> str:
    if "ensemble" in spec:
        return "ensemble"
    path = PurePath(str(spec.get("use")).rpartition(":")[2])
    return path.parent.name if path.name == "model" and path.parent.name else path.name
