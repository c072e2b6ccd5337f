"""All detectors over one run, line by line."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.alarms import Alarm, Health
from alignkit.insight.health.alarm_messages import DETECTORS
from alignkit.insight.health.completion_stats import Row, completion_stats, number, same_opening
from alignkit.insight.health.history import History
from alignkit.rewards.spec import name_of
from alignkit.runs.folder import EVAL, of_training


class Monitor:
    """Reads a run's lines in order; its alarms depend on nothing else.

    Evaluations are a separate series, in which one line is enough for a comparison.
    """

    def __init__(self, limits: Health, settings: Mapping[str, Any] | None = None) -> None:
        self._limits, self._settings = limits, settings or {}
        self._histories = {True: History(limits.window), False: History(1, training=False)}
        for history in self._histories.values():
            history.held_out = held_out(self._settings.get("reward"))
        # the policy does not move while a critic warms up
        self._histories[True].warm_at = int(number(self._settings.get("critic_warmup_steps")) or 0)
        self._best, self._worst = float("-inf"), float("inf")
        self._before: deque[Sequence[Row]] = deque(maxlen=limits.window - 1)

    def see(self, step: int, metrics: Mapping[str, Any], completions: Sequence[Row] = ()) -> list[Alarm]:
        """Add a line of metrics and the completions of its step; return all current alarms, reported before or not."""
        prefix = "" if of_training(metrics) else EVAL
        history = self._histories[not prefix]
        values = {
            name.removeprefix(prefix): value
            for name, given in metrics.items()
            if name.startswith(prefix) and (value := number(given)) is not None
        }
        values |= self._of_completions(completions, bool(prefix)) | _likelihoods(values)
        if values.get("reward/std") == 0:  # equal rewards: nothing for a critic to explain
            values.pop("value/explained_variance", None)
        history.add(step, values)
        return [alarm for detector in DETECTORS if (alarm := self._alarm(detector, history))]

    def _of_completions(self, completions: Sequence[Row], evaluation: bool) -> dict[str, float]:
        rewards = [value for row in completions if (value := number(row.get("reward"))) is not None]
        self._best, self._worst = max([self._best, *rewards]), min([self._worst, *rewards])
        found = completion_stats(completions, self._best, self._worst)
        if completions and not evaluation:
            # a step with few prompts is combined with the steps before it
            opening = same_opening([row for rows in (*self._before, completions) for row in rows])
            self._before.append(completions)
            if "text/opening" not in found and opening is not None:
                found["text/opening"] = opening
        return found

    def _alarm(self, detector: Any, history: History) -> Alarm | None:
        limit = getattr(self._limits, detector.name)
        if limit is None or not (history.training or detector.evaluations):
            return None
        value = detector.find(history, limit, self._limits)
        if value is None:
            return None
        where = f"step {history.step}: " + ("" if history.training else "on held-out rows ")
        message = where + detector.message.format(value=value, limit=limit, reward=history.last("reward/mean"))
        return Alarm(detector.name, value, limit, message, detector.advice(self._settings))


def _likelihoods(values: Mapping[str, float]) -> dict[str, float]:
    """Return the log-likelihood of chosen and rejected answers in nats a token: relative to the reference if there is
    one, which removes the differences between rows."""
    found = {}
    for side in ("chosen", "rejected"):
        logps, length, ratio = (values.get(f"{name}/{side}") for name in ("logps", "length", "logratios"))
        if ratio is not None:
            found[f"fall/{side}"] = ratio
        elif logps is not None and length:
            found[f"fall/{side}"] = logps / length
    return found


def held_out(reward: Any) -> tuple[str, ...]:
    """Return the logged names of the rewards of weight 0 in a run's `reward`."""
    specs = reward if isinstance(reward, list | tuple) else [reward]
    idle = [s for s in specs if isinstance(s, Mapping) and _weight(s) == 0]
    return tuple(str(s.get("name") or ("ensemble" if "ensemble" in s else name_of(s.get("use")))) for s in idle)


def _weight(spec: Mapping[str, Any]) -> float | None:
    try:
        return number(float(spec.get("weight", 1.0)))  # text is accepted, as in rewards
    except (TypeError, ValueError):
        return None
