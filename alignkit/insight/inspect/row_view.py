"""What one row becomes in a run: its tokens, and which of them are given, read, learned, or cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, Literal

from alignkit.config import RunConfig
from alignkit.data.dataset import Dataset, load
from alignkit.data.forms import KINDS
from alignkit.data.rows import FaultyRowsError, RawRows, Report
from alignkit.data.sources import read_rows
from alignkit.data.tokenise import tokenise_as
from alignkit.errors import AlignkitError, DataError
from alignkit.insight.inspect.token_texts import token_texts
from alignkit.method import DataKind
from alignkit.models.loading import load_tokenizer
from alignkit.types import Completion, Example

Use = Literal["prompt", "read", "learned", "cut"]
NAMES = {1: ("answer",), 2: ("chosen", "rejected")}


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens with the same use, as text. Tokens that are read are neither of the prompt nor learned."""

    text: str
    use: Use
    n_tokens: int


@dataclass(frozen=True)
class Side:
    """A prompt with one of its answers; name: "chosen", "rejected", "answer", or "prompt" where there is none."""

    name: str
    pieces: tuple[Piece, ...]

    def count(self, use: Use) -> int:
        """Return the number of tokens of this use."""
        return sum(piece.n_tokens for piece in self.pieces if piece.use == use)


@dataclass(frozen=True)
class RowView:
    """What a row becomes.

    form, kind: as it was read. sides: one for each answer; empty where the row is dropped. dropped: why, else None.
    notes: what the run would report about the row.
    """

    source: str
    row: int
    form: str
    kind: DataKind
    sides: tuple[Side, ...]
    dropped: str | None
    notes: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def row_view(data: object, row: int, config: RunConfig, kind: DataKind | None = None) -> RowView:
    """Return what the row becomes in a run with these settings.

    row: 1-based. kind: what the method reads; default: the first kind that the rows can be read as.
    Raises DataError for a row that does not exist, FaultyRowsError for its faults, ConfigError and ModelError.
    """
    raw = read_rows(data)
    dataset = _loaded(_only(raw, row), row, config, kind)
    about = _about(dataset.report, row)
    if not dataset.rows:
        return RowView(raw.source, row, dataset.form, dataset.kind, (), *about)
    tokenizer = load_tokenizer(config)
    whole, _ = tokenise_as(config.model_copy(update=_UNLIMITED), dataset, tokenizer)
    examples, report = tokenise_as(config, dataset, tokenizer)
    dropped, notes = _about(dataset.report + report, row)
    sides = tuple(side for e, w in zip(examples, whole, strict=False) for side in _sides(tokenizer, e, w))
    if len(examples) < len(whole):
        sides = tuple(side for w in whole for side in _sides(tokenizer, w, w))
    return RowView(raw.source, row, dataset.form, dataset.kind, sides, dropped, notes)


_UNLIMITED: Mapping[str, Any] = {"max_prompt_tokens": None, "max_completion_tokens": None}


def _only(raw: RawRows, row: int) -> RawRows:
    """Return the source with this row alone. Raises DataError where it does not exist."""
    rows = [(number, cells) for number, cells in raw if number == row]
    faults = [fault for fault in raw.faults if fault.row == row]
    if not rows and not faults:
        numbers = [number for number, _ in raw] or [0]
        raise DataError(f"{raw.source}: there is no row {row}; the rows are {min(numbers)} to {max(numbers)}")
    return replace(raw, rows=rows, faults=faults)


def _loaded(raw: RawRows, row: int, config: RunConfig, kind: DataKind | None) -> Dataset:
    problems: list[AlignkitError] = []
    for one in [kind] if kind else KINDS:
        try:
            return load(raw, one, config.columns, may_be_empty=True)
        except FaultyRowsError:
            raise
        except DataError as error:
            problems.append(error)
    raise problems[0]


def _about(report: Report, row: int) -> tuple[str | None, tuple[str, ...]]:
    dropped = next((reason for reason, rows in report.dropped.items() if row in rows), None)
    return dropped, tuple(reason for reason, rows in report.noted.items() if row in rows)


def _sides(tokenizer: Any, example: Example, whole: Example) -> list[Side]:
    """Return the sides of an example; `whole` is the same without limits, which shows what was cut."""
    prompt = whole.prompt.tolist()
    kept = len(example.prompt)
    first = int(kept < len(prompt) and example.prompt[0] == prompt[0])  # the beginning-of-sequence token stays
    first = int(kept < len(prompt) and example.prompt[0] == prompt[0])  # the beginning-of-sequence token stays
    uses: list[Use] = ["prompt"] * len(prompt)
    uses[first : first + len(prompt) - kept] = ["cut"] * (len(prompt) - kept)
    if not whole.completions:
        return [Side("prompt", _pieces(tokenizer, prompt, uses))]
    answers = zip(NAMES[len(whole.completions)], example.completions, whole.completions, strict=True)
    return [
        Side(name, _pieces(tokenizer, [*prompt, *full.tokens.tolist()], [*uses, *_uses(answer, full)]))
        for name, answer, full in answers
    ]


def _uses(answer: Completion, full: Completion) -> list[Use]:
    trained = set(answer.trained_at.tolist())
    kept: list[Use] = ["learned" if i in trained else "read" for i in range(len(answer.tokens))]
    return kept + ["cut"] * (len(full.tokens) - len(kept))


def _pieces(tokenizer: Any, ids: Sequence[int], uses: Sequence[Use]) -> tuple[Piece, ...]:
    texts = iter(token_texts(tokenizer, [], ids))
    return tuple(
        Piece("".join(next(texts) for _ in group), use, len(group))
        for use, some in groupby(uses)
        for group in [list(some)]
    )
