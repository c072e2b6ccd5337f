"""The values of a run so far, as detectors need them: at the start, and now."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping

RECENT = 50  # lines of a running median


class History:
    """One series of lines, of training or of evaluations; keeps only its first and its last lines.

    window: lines whose mean counts as the value at the start, and as the value now.
    """

    def __init__(self, window: int, training: bool = True) -> None:
        self.window, self.training, self.step = window, training, 0
        self.held_out: tuple[str, ...] = ()
        self.warm_at = 0
        self._first: dict[str, list[float]] = defaultdict(list)
        self._last: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=max(2 * window, RECENT + 1)))
        self._rate = 0.0

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line, which has finite values only."""
        self.step = step
        for name, value in values.items():
            if len(self._first[name]) < 2 * self.window:
                self._first[name].append(value)
            self._last[name].append(value)
        if values.get("lr", 0.0) > self._rate:
            self._rate, self.warm_at = values["lr"], max(step, self.warm_at)

    def first(self, name: str) -> list[float]:
        """Return the values of the first lines, at most two windows."""
        return list(self._first.get(name, ()))

    def start(self, name: str) -> float | None:
        """Return the mean of the first lines; None until as many lines have followed, which `now` averages."""
        first = self._first.get(name, [])
        return statistics.fmean(first[: self.window]) if len(first) == 2 * self.window else None

    def start_median(self, name: str) -> float | None:
        """Return the median of the first lines; None with fewer than `window`."""
        first = self._first.get(name, [])[: self.window]
        return statistics.median(first) if len(first) == self.window else None

    def now(self, name: str) -> float | None:
        """Return the mean of the last lines; None with fewer than `window`."""
        last = self._recent(name, self.window)
        return statistics.fmean(last) if len(last) == self.window else None

    def median(self, name: str) -> float | None:
        """Return the median of the last lines; None until the run has two windows."""
        return statistics.median(self._recent(name, self.window)) if self.start(name) is not None else None

    def before(self, name: str) -> list[float]:
        """Return the values of the last lines except the last one."""
        return self._recent(name, RECENT + 1)[:-1]

    def last(self, name: str) -> float | None:
        """Return the last value, None before the first line with it."""
        return next(iter(self._recent(name, 1)), None)

    def grows(self, name: str) -> bool:
        """Return whether the newer half of the last lines is above the older half."""
        half = max(self.window // 2, 1)
        last = self._recent(name, 2 * half)
        return len(last) == 2 * half and sum(last[half:]) > sum(last[:half])

    def change(self, name: str) -> float | None:
        """Return now minus start."""
        start, now = self.start(name), self.now(name)
        return None if start is None or now is None else now - start

    def noise(self, name: str) -> float:
        """Return the standard error of `change`, from the variances of first and last lines; 0 for single lines."""
        windows = self._first.get(name, [])[: self.window], self._recent(name, self.window)
        return math.sqrt(sum(statistics.variance(values) / len(values) for values in windows if len(values) > 1))

    def ratio(self, name: str) -> float | None:
        """Return now divided by start; None where the start is 0."""
        start, now = self.start(name), self.now(name)
        return None if not start or now is None else now / start

    def _recent(self, name: str, n: int) -> list[float]:
        return list(self._last[name])[-n:] if name in self._last else []
