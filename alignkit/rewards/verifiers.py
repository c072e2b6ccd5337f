"""Built-in rewards without a model: each is a class of options whose objects are functions.

All return 1 for a good answer and 0 for a bad one, except `length` (from 1 to 0) and `brevity` (from 0 to -1).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, Self

import regex
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from alignkit.data.rows import Content, shown
from alignkit.rewards.answers import text_of
from alignkit.rewards.expressions import same_expression
from alignkit.rewards.functions import RowError, present
from alignkit.rewards.numeric import final_number

_SECONDS = 5.0  # time limit of a pattern on one completion


class Options(BaseModel):
    """Options of a built-in reward or judge; unknown options are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Exact(Options):
    """1 where the completion equals the row's answer, ignoring white space around both.

    An answer that is true, false or an integer is spelled as in JSON.
    """

    column: str = Field("answer", description="column of the rows that holds the answer")

    @property
    def needs(self) -> tuple[str, ...]:
        """The column of the answer."""
        return (self.column,)

    def __call__(self, completions: Sequence[Content], **columns: list[Any]) -> list[float]:
        """Score each completion; a row without an answer is an error."""
        answers = [_spelled(present(a, i, self.column), i) for i, a in enumerate(columns[self.column])]
        return [float(text_of(c).strip() == a) for c, a in zip(completions, answers, strict=True)]


def _spelled(answer: Any, index: int) -> str:
    """Return a row's answer as text. Raises RowError for a value of several spellings, such as 1000.0 or a date."""
    if isinstance(answer, str):
        return answer.strip()
    if isinstance(answer, int):
        return json.dumps(answer)
    raise RowError(
        index,
        f"the answer {shown(answer)} is no text ({type(answer).__name__}), and may be spelled in several ways: "
        "store it as text, or use the reward `numeric`",
    )


class Numeric(Options):
    """1 where the completion's answer is the row's number, see `final_number`.

    The row's answer may contain its derivation, as in GSM8K: it is read as the completion is.
    """

    column: str = Field("answer", description="column of the rows that holds the answer")
    verify: Literal["number", "math"] = Field("number", description="math: expressions too, compared by math-verify")

    @property
    def needs(self) -> tuple[str, ...]:
        """The column of the answer."""
        return (self.column,)

    @field_validator("verify")
    @classmethod
    def _is_installed(cls, verify: str) -> str:
        if verify == "math":
            try:
                import math_verify  # noqa: F401
            except ImportError:
                raise ValueError('math-verify is not installed: pip install "alignkit[math]"') from None
        return verify

    def __call__(self, completions: Sequence[Content], **columns: list[Any]) -> list[float]:
        """Score each completion; a row without an answer, or whose answer has no number, is an error."""
        same = same_expression if self.verify == "math" else _same_number
        answers = columns[self.column]
        return [
            float(same(text_of(c), _worked(present(a, i, self.column), i), i))
            for i, (c, a) in enumerate(zip(completions, answers, strict=True))
        ]


def _worked(answer: Any, index: int) -> str:
    """Return a row's answer, with its derivation, as text. Raises RowError for a value such as true or a date."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise RowError(index, f"the answer {shown(answer)} is neither text nor a number")
    return str(answer)


def _same_number(completion: str, answer: str, index: int) -> bool:
    wanted = final_number(answer)
    if wanted is None:
        raise RowError(index, f"the answer {shown(answer)} has no number")
    return final_number(completion) == wanted


class Format(Options):
    """1 where a regular expression matches the completion."""

    pattern: str = Field(description="regular expression; starts with (?s) where a dot must match line breaks")
    match: Literal["full", "search"] = Field("full", description="all of the completion, or any part of it")
    _compiled: Any = PrivateAttr()

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return pattern

    def model_post_init(self, _: object) -> None:
        """Compile the pattern once."""
        self._compiled = regex.compile(self.pattern)

    def __call__(self, completions: Sequence[Content]) -> list[float]:
        """Score each completion; a pattern that exceeds its time limit is an error."""
        fits = self._compiled.fullmatch if self.match == "full" else self._compiled.search
        scores = []
        for i, completion in enumerate(completions):
            try:
                scores.append(float(fits(text_of(completion), timeout=_SECONDS) is not None))
            except TimeoutError:
                raise RowError(
                    i,
                    f"the pattern {shown(self.pattern)} takes more than {_SECONDS:g} s on {shown(text_of(completion))}",
                ) from None
        return scores


class Json(Options):
    """1 where the completion is one JSON value; with `keys`, an object that has all of them."""

    keys: list[str] = Field([], description="keys that the object must have")

    def __call__(self, completions: Sequence[Content]) -> list[float]:
        """Score each completion."""
        return [float(self._is_good(text_of(completion))) for completion in completions]

    def _is_good(self, text: str) -> bool:
        try:
            value = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return False
        return not self.keys or (isinstance(value, dict) and value.keys() >= set(self.keys))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")  # Python reads NaN and Infinity, which JSON does not have


class Length(Options):
    """1 for completions of `min` to `max` tokens, falling linearly to 0 over `slack` tokens outside."""

    min: int = Field(0, ge=0, description="tokens")
    max: int = Field(ge=0, description="tokens")
    slack: int = Field(0, ge=0, description="tokens outside the window over which the reward falls to 0")

    @model_validator(mode="after")
    def _is_a_window(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max {self.max}; give a min that is not above max")
        return self

    def __call__(self, lengths: Sequence[int]) -> list[float]:
        """Score each completion by its number of tokens."""
        outside = [max(self.min - n, n - self.max, 0) for n in lengths]
        return [1.0 if k == 0 else max(0.0, 1 - k / self.slack) if self.slack else 0.0 for k in outside]


class Earned(Options):
    """What the run's environment paid for a trajectory, the sum over its steps."""

    def __call__(self, earned: Sequence[float | None]) -> list[float | None]:
        """Return it."""
        return list(earned)


class Brevity(Options):
    """A length penalty: 0 up to `free` tokens, then falling linearly to -1 at `limit` and beyond.

    With free = L_max - L_cache and limit = L_max this is DAPO's soft overlong punishment (2503.14476, eq. 13).
    """

    free: int = Field(0, ge=0, description="tokens without a penalty")
    limit: int = Field(gt=0, description="tokens at which the penalty is complete")

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.free >= self.limit:
            raise ValueError(f"free is {self.free} and limit {self.limit}; give a limit above free")
        return self

    def __call__(self, lengths: Sequence[int]) -> list[float]:
        """Score each completion by its number of tokens."""
        span = self.limit - self.free
        return [0.0 - min(max(n - self.free, 0) / span, 1.0) for n in lengths]
