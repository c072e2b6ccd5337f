"""A reward on the data: whether it agrees with the preferences, and what it rewards other than content."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alignkit.data.rows import Content, Row
from alignkit.errors import DataError
from alignkit.insight.audit.bias import Bias, biases
from alignkit.insight.audit.features import FEATURES
from alignkit.insight.intervals import mean_interval, strict, wilson
from alignkit.metrics import wins
from alignkit.rewards import Answers, Rewards
from alignkit.rewards.answers import text_of

FEWEST = 10  # changed answers; fewer may agree by accident, which makes their interval too narrow
_STRICT = strict(2 * len(FEATURES))  # each feature is added, and removed
Queries = Sequence[tuple[Row, Content]]


@dataclass(frozen=True)
class Effect:
    """The effect on the score of changing a feature of the same answer.

    change: "added" or "taken". n: answers changed. mean: of the score's change, in standard deviations of the
    reward's scores, with its 95 % interval low to high; None where fewer than two answers could be changed.
    beyond_chance: whether the interval excludes 0 at 95 % for all effects together; never below FEWEST answers.
    """

    feature: str
    change: str
    n: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    beyond_chance: bool = False


@dataclass(frozen=True)
class RewardAudit:
    """A reward on the data.

    rows: scored rows. mean, deviation: of the answers' scores. ties: pairs with equal scores. accuracy: how often the
    chosen answer has the higher score, ties count half, with its 95 % Wilson interval; None without pairs. biases: as
    for the preferences, with the reward's choice. effects: of features added to or removed from the same answer.
    """

    reward: str
    rows: int
    mean: float
    deviation: float
    ties: int
    accuracy: float | None
    low: float | None
    high: float | None
    biases: tuple[Bias, ...]
    effects: tuple[Effect, ...]


class Scorer:
    """Scores answers from data with a reward; `tokenizer` counts their lengths."""

    def __init__(self, rewards: Rewards, tokenizer: Any | None) -> None:
        self.rewards, self.tokenizer = rewards, tokenizer

    def __call__(self, queries: Queries) -> list[float]:
        """Return the score of each answer to its row's prompt. Raises RewardError."""
        columns = dict.fromkeys(name for row, _ in queries for name in row.extra)
        answers = Answers(
            prompts=[row.prompt for row, _ in queries],
            completions=[answer for _, answer in queries],
            columns={name: [row.extra.get(name) for row, _ in queries] for name in columns},
            rows=[row.row for row, _ in queries],
            lengths=[self._length(text_of(answer)) for _, answer in queries],
            ended=[True] * len(queries),
        )
        return self.rewards.score(answers).numbers

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"]) if self.tokenizer else len(text.split())


def audit_reward(scorer: Scorer, rows: Sequence[Row], counts: dict[str, np.ndarray] | None, asked: int) -> RewardAudit:
    """Score at most `asked` rows, evenly spread, unchanged and changed.

    counts: of the features of pairs, [rows, 2] each; None where the rows are not pairs. Raises RewardError, and
    DataError where the rows have no answers.
    """
    if not rows or not rows[0].completions:
        raise DataError("a reward scores answers, and the rows have only prompts; leave out the reward")
    at = np.unique(np.linspace(0, len(rows) - 1, min(asked, len(rows))).round().astype(int))
    chosen = [rows[i] for i in at]
    scores = scorer([(row, answer) for row in chosen for answer in row.completions])
    deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
    name = " + ".join(scorer.rewards.names)
    fields: Any = {"reward": name, "rows": len(chosen), "mean": statistics.fmean(scores), "deviation": deviation}
    effects = _effects(scorer, chosen, scores, deviation)
    if counts is None:
        none: Any = {"ties": 0, "accuracy": None, "low": None, "high": None, "biases": ()}
        return RewardAudit(**fields, **none, effects=effects)
    better = wins(*torch.tensor(scores, dtype=torch.float64).view(-1, 2).unbind(1)).numpy()
    margins = better - 0.5  # 0 for a tie
    ties, right = int((margins == 0).sum()), float(better.sum())
    low, high = wilson(right, len(chosen))
    found = biases({feature: values[at] for feature, values in counts.items()}, margins)
    return RewardAudit(
        **fields, ties=ties, accuracy=right / len(chosen), low=low, high=high, biases=found, effects=effects
    )


def _effects(scorer: Scorer, rows: Sequence[Row], scores: Sequence[float], deviation: float) -> tuple[Effect, ...]:
    """Change one answer per row, the first and the last in turn, so that no row counts twice."""
    k = len(rows[0].completions)
    at = [i * k + i % k for i in range(len(rows))]
    originals = [(row, row.completions[j % k], scores[j]) for row, j in zip(rows, at, strict=True)]
    found = []
    for feature in FEATURES:
        for change, edit in (("added", feature.added), ("taken", feature.taken)):
            texts = [edit(_last(answer)) for _, answer, _ in originals]
            changed = [(o, text) for o, text in zip(originals, texts, strict=True) if text is not None]
            after = scorer([(o[0], _with_last(o[1], text)) for o, text in changed])
            moved = [new - o[2] for (o, _), new in zip(changed, after, strict=True)]
            found.append(_effect(feature.name, change, moved, deviation))
    return tuple(found)


def _effect(feature: str, change: str, moved: Sequence[float], deviation: float) -> Effect:
    if len(moved) < 2 or deviation == 0:
        return Effect(feature, change, len(moved))
    units = [value / deviation for value in moved]
    low, high = mean_interval(units)
    outer = mean_interval(units, _STRICT)
    beyond = len(units) >= FEWEST and not outer[0] <= 0 <= outer[1]
    return Effect(feature, change, len(moved), statistics.fmean(units), low, high, beyond)


def _last(answer: Content) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


def _with_last(answer: Content, text: str) -> Content:
    return text if isinstance(answer, str) else [*answer[:-1], {**answer[-1], "content": text}]
