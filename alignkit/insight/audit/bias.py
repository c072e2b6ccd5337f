"""Whether what is preferred has more of something that is not content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from alignkit.data.rows import Row
from alignkit.insight.audit.features import FEATURES, LENGTH, Feature, answer_text
from alignkit.insight.intervals import strict, wilson

Direction = Literal["more", "less"]

_STRICT = strict(len(FEATURES))  # a finding has to stand against all features that were looked at


@dataclass(frozen=True)
class Bias:
    """A feature among pairs of which one answer is preferred.

    pairs: that have a preference. differs: of these, in which one answer has more of the feature than the other. more:
    in how many of them it is the preferred one. share: more / differs, with its 95 % Wilson interval low to high; None
    where nothing differs. direction: what is preferred in the larger part, more of the feature or less. accuracy: of
    the rule "the one with `direction` is preferred" over all pairs, ties half; never below one half.
    beyond_chance: whether the interval leaves one half out at 95 % for all features together.
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


def counted(rows: Sequence[Row], lengths: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Return how much of each feature both answers of each pair have, [pairs, 2]; lengths: as counted already."""
    texts = [[answer_text(answer) for answer in row.completions] for row in rows]
    found = {f.name: _counts(f, texts) for f in FEATURES if f is not LENGTH}
    return {LENGTH.name: np.asarray(lengths, dtype=float).reshape(-1, 2), **found}


def biases(counts: dict[str, np.ndarray], preferred: np.ndarray) -> tuple[Bias, ...]:
    """Return the bias on each feature; preferred: above 0 where the first answer is, below where the second is [pairs].

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
