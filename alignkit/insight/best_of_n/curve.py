"""The expected best of k, without sampling again: an average over all subsets of size k of the n samples.

The i-th smallest of n values is the largest in C(i - 1, k - 1) of the C(n, k) subsets. So the mean over subsets is
sum_i C(i - 1, k - 1) / C(n, k) x_(i), the unbiased estimator of 2112.09332 (appendix I); 2210.10760 has the curves.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from alignkit.insight.intervals import mean_interval


@dataclass(frozen=True)
class Mean:
    """A mean over prompts, with its 95 % interval; None with a single prompt."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Point:
    """The best of k by the proxy: its expected proxy and gold reward. kl: to the model, nats a sequence."""

    k: int
    kl: float
    proxy: Mean
    gold: Mean | None


def kl(k: int) -> float:
    """Return KL(best of k || model) = log k - (k - 1) / k, nats a sequence; where rewards tie, an upper bound."""
    return math.log(k) - (k - 1) / k


def curve(proxy: Sequence[Sequence[float]], gold: Sequence[Sequence[float]] | None) -> tuple[Point, ...]:
    """Return a point for every k from 1 to n; proxy, gold: of each prompt's n samples, [prompt][sample]."""
    golds = gold if gold is not None else [None] * len(proxy)
    orders = [ordered(p, g) for p, g in zip(proxy, golds, strict=True)]
    # [proxy, and gold if given][prompt][rank]
    ascending = np.array([[values for values in order if values is not None] for order in orders]).swapaxes(0, 1)
    return tuple(_point(k, ascending) for k in range(1, len(proxy[0]) + 1))


def ordered(proxy: Sequence[float], gold: Sequence[float] | None) -> tuple[list[float], list[float] | None]:
    """Return both sorted by the proxy; gold is averaged over ties, because any of them may be taken as the best."""
    values = sorted(proxy)
    if gold is None:
        return values, None
    ranked = sorted(zip(proxy, gold, strict=True), key=lambda pair: pair[0])
    found: list[float] = []
    for _, group in groupby(ranked, key=lambda pair: pair[0]):
        tied = [g for _, g in group]
        found += [statistics.fmean(tied)] * len(tied)
    return values, found


def best_of(k: int, ascending: np.ndarray) -> np.ndarray:
    """Return the mean of the last value of each subset of size k, over all subsets [...]; ascending: [..., n]."""
    n = ascending.shape[-1]
    i = np.arange(n - 1, 0, -1)
    # C(i, k - 1) / C(n, k) from the last value down, each from the previous one: the binomials themselves overflow
    weights = k / n * np.cumprod(np.concatenate([[1.0], np.maximum(i - k + 1, 0) / i]))
    return np.asarray(ascending[..., ::-1] @ weights)


def _point(k: int, ascending: np.ndarray) -> Point:
    proxy, *gold = best_of(k, ascending).tolist()
    return Point(k, kl(k), _mean(proxy), _mean(gold[0]) if gold else None)


def _mean(values: Sequence[float]) -> Mean:
    low, high = mean_interval(values) if len(values) > 1 else (None, None)
    return Mean(statistics.fmean(values), low, high)
