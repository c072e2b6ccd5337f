"""Lengths of prompts and answers, and what the budgets of a run would cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkit.data import Dataset
from alignkit.data.rows import Row
from alignkit.data.tokenise import tokenise
from alignkit.rewards.answers import text_of

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Length:
    """Lengths of one part of the rows, in tokens or characters. quantiles: at QUANTILES."""

    part: str
    n: int
    mean: float
    quantiles: tuple[float, ...]
    longest: int


@dataclass(frozen=True)
class Budgets:
    """The effect of these budgets on a run: rows cut, and rows dropped or noted (reason -> rows of the source)."""

    max_prompt_tokens: int | None
    max_completion_tokens: int | None
    prompts_cut: int
    answers_cut: int
    answers: int
    dropped: dict[str, list[int]]
    noted: dict[str, list[int]]


@dataclass(frozen=True)
class Lengths:
    """Rows with the lengths of their prompts and answers; rows without a token to learn are left out."""

    unit: str
    rows: list[Row]
    prompts: list[int]
    answers: list[tuple[int, ...]]


def measure(dataset: Dataset, tokenizer: Any | None) -> Lengths:
    """Count tokens as training does, end-of-sequence included; characters without a tokenizer."""
    if tokenizer is None:
        rows = list(dataset.rows)
        answers = [tuple(len(text_of(answer).strip()) for answer in row.completions) for row in rows]
        return Lengths("characters", rows, [len(text_of(row.prompt).strip()) for row in rows], answers)
    examples, _ = tokenise(dataset, tokenizer)
    kept = {example.row for example in examples}
    return Lengths(
        "tokens",
        [row for row in dataset.rows if row.row in kept],
        [len(example.prompt) for example in examples],
        [tuple(len(completion.tokens) for completion in example.completions) for example in examples],
    )


def summaries(measured: Lengths, kind: str) -> tuple[Length, ...]:
    """Summarise the lengths of prompts and of each kind of answer."""
    parts: dict[str, Sequence[int]] = {"prompt": measured.prompts}
    if kind == "pairs":
        parts |= {"chosen": [a for a, _ in measured.answers], "rejected": [b for _, b in measured.answers]}
    elif kind == "unpaired":
        sides = [(row.numbers["desirable"], a[0]) for row, a in zip(measured.rows, measured.answers, strict=True)]
        parts |= {name: [n for label, n in sides if label == d] for name, d in (("desirable", 1), ("undesirable", 0))}
    elif kind == "text":
        parts |= {"completion": [a[0] for a in measured.answers]}
    return tuple(_length(part, values) for part, values in parts.items() if values)


def budgets(
    dataset: Dataset,
    measured: Lengths,
    tokenizer: Any,
    max_prompt_tokens: int | None,
    max_completion_tokens: int | None,
) -> Budgets:
    """Return what a run with these budgets would cut and drop. Raises what `tokenise` raises."""
    _, report = tokenise(dataset, tokenizer, max_prompt_tokens, max_completion_tokens)
    answers = [n for some in measured.answers for n in some]
    return Budgets(
        max_prompt_tokens,
        max_completion_tokens,
        _above(measured.prompts, max_prompt_tokens),
        _above(answers, max_completion_tokens),
        len(answers),
        report.dropped,
        report.noted,
    )


def _above(lengths: Sequence[int], limit: int | None) -> int:
    return 0 if limit is None else sum(n > limit for n in lengths)


def _length(part: str, values: Sequence[int]) -> Length:
    quantiles = tuple(float(q) for q in np.quantile(values, QUANTILES))
    return Length(part, len(values), float(np.mean(values)), quantiles, max(values))
