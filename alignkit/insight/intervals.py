"""Confidence intervals of proportions and means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

LEVEL = 0.95


def wilson(k: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the confidence interval of a proportion k / n, n > 0. Wilson (1927)."""
    z2, p = _normal(level) ** 2, k / n
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))  # rounding, where k is 0 or n


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Return the confidence interval of the mean of independent values, at least two, by Student's t."""
    mean, n = statistics.fmean(values), len(values)
    half = _student(level, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half


def strict(tests: int) -> float:
    """Return the level of each of `tests` intervals so that all of them together hold at LEVEL (Bonferroni)."""
    return 1 - (1 - LEVEL) / tests


def _normal(level: float) -> float:
    return statistics.NormalDist().inv_cdf(0.5 + level / 2)


def _student(level: float, freedom: int) -> float:
    """Return a quantile of Student's t: exact for 1 and 2 degrees of freedom, else Abramowitz and Stegun, 26.7.5."""
    p = 0.5 + level / 2
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (1 - (2 * p - 1) ** 2))
    z = _normal(level)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, 1))
