"""The running mean and standard deviation of rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

V = TypeVar("V", float, Tensor)
_TINY = 1e-8  # the result stays finite where all rewards are equal


class RunningStats:
    """Mean and population standard deviation of all values so far, updated part by part (Chan, Golub, LeVeque 1979).

    count, mean, m2: how many values, their mean, and the sum of their squared deviations from it.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """The population standard deviation; 1 with fewer than two values."""
        return math.sqrt(self.m2 / self.count) if self.count > 1 else 1.0

    def update(self, count: int, mean: float, m2: float) -> None:
        """Add `count` values with this mean and sum of squared deviations, those of all ranks together."""
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.m2 += m2 + delta * delta * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def normalise(self, value: V) -> V:
        """Return (value - mean) / standard deviation."""
        return (value - self.mean) / (self.std + _TINY)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values, which restore it bit for bit."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.count, self.mean, self.m2 = int(state["count"]), float(state["mean"]), float(state["m2"])
