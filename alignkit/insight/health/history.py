"""The numbers of a run so far, as detectors ask for them: at the start, and now."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping

RECENT = 50  # lines that a running median is over


class History:
    """One series of lines, of training or of evaluations; keeps its first and its last lines only.

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
        """Take in a line; what is not finite has been left out of it."""
        self.step = step
        for name, value in values.items():
            if len(self._first[name]) < 2 * self.window:
                self._first[name].append(value)
            self._last[name].append(value)
        if values.get("lr", 0.0) > self._rate:
            self._rate, self.warm_at = values["lr"], max(step, self.warm_at)

    def start(self, name: str) -> float | None:
        """Mean of the first lines; None until as many came after them, which `now` is about."""
        first = self._first.get(name, [])
        return statistics.fmean(first[: self.window]) if len(first) == 2 * self.window else None

    def begun(self, name: str) -> float | None:
        """Median of the first lines; None of fewer than `window`."""
        first = self._first.get(name, [])[: self.window]
        return statistics.median(first) if len(first) == self.window else None

    def now(self, name: str) -> float | None:
        """Mean of the last lines; None of fewer than `window`."""
        last = self._recent(name, self.window)
        return statistics.fmean(last) if len(last) == self.window else None

    def middle(self, name: str) -> float | None:
        """Median of the last lines; None until the run is two windows old."""
        return statistics.median(self._recent(name, self.window)) if self.start(name) is not None else None

    def before(self, name: str) -> list[float]:
        """The last lines' values without the very last."""
        return self._recent(name, RECENT + 1)[:-1]

    def last(self, name: str) -> float | None:
        """The value of the last line that has it, None where there is none."""
        return next(iter(self._recent(name, 1)), None)

    def grows(self, name: str) -> bool:
        """Say whether the newer half of the last lines is above the older half."""
        half = max(self.window // 2, 1)
        last = self._recent(name, 2 * half)
        return len(last) == 2 * half and sum(last[half:]) > sum(last[:half])

    def change(self, name: str) -> float | None:
        """Now minus start."""
        start, now = self.start(name), self.now(name)
        return None if start is None or now is None else now - start

    def noise(self, name: str) -> float:
        """Standard error of `change`, as the spread of the first and of the last lines has it; 0 of single lines."""
        windows = self._first.get(name, [])[: self.window], self._recent(name, self.window)
        return math.sqrt(sum(statistics.variance(some) / len(some) for some in windows if len(some) > 1))

    def ratio(self, name: str) -> float | None:
        """Now by start; None where the start is 0."""
        start, now = self.start(name), self.now(name)
        return None if not start or now is None else now / start

    def _recent(self, name: str, n: int) -> list[float]:
        return list(self._last[name])[-n:] if name in self._last else []
