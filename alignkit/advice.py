"""A method's advice on a data set: whether to start with this method, why, and with which of its own settings.

`Method.advice` gets `DataFacts` and returns `Advice`; `alignkit recommend` and `alignkit init` order the installed
methods by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

BEST = 100  # the highest rank
GUESS = 0.1  # assumed fraction of flipped labels where it cannot be estimated


class Choice(NamedTuple):
    """A setting, its value, and why it has that value."""

    name: str
    value: Any
    why: str


class Advice(NamedTuple):
    """A method's fit to a data set.

    rank: 0 to 100, the highest comes first; None where these rows would teach the method nothing. reason: why, in a
    sentence. settings: the method's own settings that should differ from their defaults.
    """

    rank: int | None
    reason: str
    settings: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class DataFacts:
    """The facts about data, model and reward that are known before a method is chosen.

    rows: the number of rows for a method of each kind of `data`; a kind that the data cannot serve is missing. kept:
    rows that are left after faulty ones were dropped. labels: numbers of (good, bad) rows, None without such labels.
    few: whether the rows are few. noisy: why labels count as noisy, None where they do not. flipped: the estimated
    fraction of flipped labels, None where it cannot be estimated. uninformative: whether so many labels are flipped
    that they carry almost no information. length_bias: a sentence on whether the longer or the shorter answer is chosen
    more often, None where neither is. chat_template: whether the model's tokenizer has one, None without a model.
    adapter: whether the model is an adapter. reward, judge: whether one is given. checkable: whether the given reward
    calls no model. verifier: the reward that can check the rows' column `answer`, None where none can.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    kept: int = 0
    labels: tuple[int, int] | None = None
    few: bool = False
    noisy: str | None = None
    flipped: float | None = None
    uninformative: bool = False
    length_bias: str | None = None
    chat_template: bool | None = None
    adapter: bool = False
    reward: bool = False
    judge: bool = False
    checkable: bool = False
    verifier: str | None = None

    def label_smoothing(self, name: str = "label_smoothing") -> Choice | None:
        """Return the setting `name` against flipped labels; None where labels are clean or uninformative."""
        if not self.noisy or self.uninformative:
            return None
        source = "the 10 % are a guess"
        if self.flipped is not None:
            source = "the fraction of flipped labels, estimated from the pairs that are judged more than once"
        return Choice(name, self.assumed_flipped, f"labels are noisy: {self.noisy}; {source}")

    @property
    def assumed_flipped(self) -> float:
        """The fraction of flipped labels to assume: the estimate to two digits, else GUESS."""
        return GUESS if self.flipped is None else float(f"{self.flipped:.2g}")
