"""Tests whether the preferred answer has more of a feature that is not content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from alignkit.data.rows import Row
from alignkit.insight.audit.features import FEATURES, LENGTH, Feature, answer_text
from alignkit.insight.intervals import strict, wilson

Direction = Literal["more", "less"]

_STRICT = strict(len(FEATURES))  # one interval per feature


@dataclass(frozen=True)
class Bias:
    """The rate at which the preferred answer of a pair has more of a feature.

    pairs: with a preference. differs: pairs in which one answer has more of the feature. more: pairs in which the
    preferred answer has more. share: more / differs, with its 95 % Wilson interval low to high; None where no pair
    differs. direction: what the majority prefers, more of the feature or less. accuracy: of the rule "the answer with
    `direction` is preferred" over all pairs, ties count half; never below one half.
    beyond_chance: whether the interval excludes one half at 95 % for all features together.
    """

    feature: str
    pairs: int
    differs: int
    more: int
    share: float | None
    low: float | None
    high: float | None
    direction: Direction
    accuracy: float
    beyond_chance: bool


def feature_counts(rows: Sequence[Row], lengths: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Return the count of each feature in both answers of each pair, [pairs, 2]; lengths: counted beforehand."""
    texts = [[answer_text(answer) for answer in row.completions] for row in rows]
    counts = {f.name: _counts(f, texts) for f in FEATURES if f is not LENGTH}
    return {LENGTH.name: np.asarray(lengths, dtype=float).reshape(-1, 2), **counts}


def biases(counts: dict[str, np.ndarray], preferred: np.ndarray) -> tuple[Bias, ...]:
    """Return the bias of each feature; preferred [pairs]: above 0 for the first answer, below 0 for the second.

    Pairs at 0 are left out. Empty where no pair is left.
    """
    sides = np.sign(preferred)
    return tuple(_bias(name, values[:, 0] - values[:, 1], sides) for name, values in counts.items() if sides.any())


def _bias(feature: str, difference: np.ndarray, sides: np.ndarray) -> Bias:
    agrees = (np.sign(difference) * sides)[sides != 0]
    differs, more = int((agrees != 0).sum()), int((agrees > 0).sum())
    direction: Direction = "more" if 2 * more >= differs else "less"
    accuracy = (max(more, differs - more) + 0.5 * (len(agrees) - differs)) / len(agrees)
    if not differs:
        return Bias(feature, len(agrees), 0, 0, None, None, None, direction, accuracy, False)
    low, high = wilson(more, differs)
    outer = wilson(more, differs, _STRICT)
    beyond = not outer[0] <= 0.5 <= outer[1]
    return Bias(feature, len(agrees), differs, more, more / differs, low, high, direction, accuracy, beyond)


def _counts(feature: Feature, texts: Sequence[Sequence[str]]) -> np.ndarray:
    return np.array([[feature.count(text) for text in pair] for pair in texts], dtype=float).reshape(-1, 2)
