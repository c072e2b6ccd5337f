"""Rewards and judges as functions: each is a function of keyword arguments, built in or from a user.

    def reward(prompts, completions, **columns) -> list[float]
    def judge(prompts, first, second, **columns) -> list[float]

A function is passed what its parameters name: the arguments above, the rows' columns, and what is known of the
completions: `lengths`, `ended`, `completion_ids`, `raw_completions`, `tool_calls`, `earned`, `completion_messages` (see
`Answers`; for judges, of the first, and the second's with `second_` in front). With `**columns` it is passed every
column.

Completions are text. A reward model, and a function written for messages (see `probing.py`), reads them as they are.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from alignkit.data.rows import shown
from alignkit.errors import AlignkitError, ConfigError, RewardError, at_place, nearest
from alignkit.rewards.answers import Answers, text_of
from alignkit.rewards.limits import Deadline, LateError, interrupted, place_of

Values = list[float | None]
Reads = Literal["text", "messages"]
# of Answers
KNOWN = ("lengths", "ended", "completion_ids", "raw_completions", "tool_calls", "earned", "completion_messages")
COMPLETIONS = ("completions", "first", "second")  # arguments that are text, or messages where a function reads those
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class RowError(Exception):
    """Entry `index` cannot be scored; the caller adds its row and prompt."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def present(value: Any, index: int, column: str) -> Any:
    """Return row `index`'s value of a required column. Raises RowError where it is None."""
    if value is None:
        raise RowError(index, f"the row has no value in the column '{column}'")
    return value


@dataclass(frozen=True)
class Function:
    """A reward or a judge with its name and the options of every call.

    kind: "reward" or "judge". given: the arguments that every call has ("prompts", "completions", ...). reads: how it
    reads completions to prompts of messages; None until a probe finds out, and text until then.
    """

    kind: str
    name: str
    call: Callable[..., Any]
    given: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    reads: Reads | None = "text"

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Its parameters. Raises ConfigError where it cannot be called by keyword, or does not take the options."""
        try:
            parameters = inspect.signature(self.call).parameters
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.kind} '{self.name}': its parameters cannot be read: {error}") from None
        for name, p in parameters.items():
            if p.kind is p.POSITIONAL_ONLY and p.default is p.empty:
                raise ConfigError(
                    f"{self.kind} '{self.name}' takes '{name}' by position only; arguments are passed by keyword"
                )
        known = [name for name, p in parameters.items() if p.kind in _NAMED]
        for name in self.options:
            if name in self.given or name not in known:  # not through **columns: a misspelt option would be ignored
                raise ConfigError(
                    f"{self.kind} '{self.name}' has no option '{name}'.{nearest(name, known)} "
                    f"Its parameters: {', '.join(known) or 'none'}"
                )
        return parameters

    @cached_property
    def columns(self) -> frozenset[str]:
        """The columns that it requires."""
        known = {*self.given, *self.options, *KNOWN, *(f"second_{name}" for name in KNOWN)}
        named = {n for n, p in self.parameters.items() if p.kind in _NAMED and p.default is p.empty}
        return frozenset({*(named - known), *getattr(self.call, "needs", ())})

    def columns_read(self, there: Collection[str]) -> frozenset[str]:
        """Return the columns, of those that are there, that a call is passed and may read."""
        if hasattr(self.call, "needs"):  # a built-in one takes any, and reads those that its options name
            return self.columns & {*there}
        named = {n for n, p in self.parameters.items() if p.kind in _NAMED}
        return frozenset(there if _takes_any(self.parameters) else named & {*there})

    @property
    def is_async(self) -> bool:
        """True if a call must be awaited."""
        return inspect.iscoroutinefunction(self.call) or inspect.iscoroutinefunction(type(self.call).__call__)

    def check_columns(self, there: Collection[str]) -> None:
        """Raise RewardError where rows with these columns lack a required one."""
        for column in sorted(self.columns - set(there)):
            have = f"the rows have {', '.join(sorted(there))}" if there else "the rows have no other columns"
            raise RewardError(f"{self.kind} '{self.name}' needs the column '{column}'; {have}.{nearest(column, there)}")

    def arguments(self, answers: Answers, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of a call. Raises RewardError for a missing column."""
        there = answers.columns
        self.check_columns(there)
        offered = {**there, **known_of(answers), **given}
        if self.reads != "messages":
            offered |= {name: list(map(text_of, given[name])) for name in COMPLETIONS if name in given}
        wanted = {name for name, p in self.parameters.items() if p.kind in _NAMED}
        for name in KNOWN:
            if name in wanted and name not in offered and self.parameters[name].default is inspect.Parameter.empty:
                raise RewardError(f"{self.kind} '{self.name}' needs `{name}`, which only sampled completions have")
        if _takes_any(self.parameters):
            wanted |= {*there, *self.given}
        return {name: value for name, value in offered.items() if name in wanted} | dict(self.options)

    def checked(self, answers: Answers, returned: object) -> Values:
        """Return a call's result as a list of floats and None. Raises RewardError unless it has one for each answer."""
        returned = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(returned, list | tuple):
            raise RewardError(
                f"{self.kind} '{self.name}' must return a list of {len(answers)} numbers, got {shown(returned)} "
                f"(first: {answers.place(0)})"
            )
        if len(returned) != len(answers):
            raise RewardError(
                f"{self.kind} '{self.name}' returned {len(returned)} values for {len(answers)} completions, "
                f"{shown(returned)} (first: {answers.place(0)}); it must return one for each"
            )
        return [None if v is None else self._number(answers, i, v) for i, v in enumerate(returned)]

    def _number(self, answers: Answers, i: int, value: Any) -> float:
        plain = value.item() if getattr(value, "ndim", None) == 0 else value
        try:
            found = float(plain) if isinstance(plain, int | float) else math.nan
        except OverflowError:
            found = math.inf
        if not math.isfinite(found):
            raise RewardError(
                f"{self.kind} '{self.name}' returned {shown(value)} for {answers.place(i)}; it must be a number"
            )
        return found

    def failed(self, answers: Answers, error: BaseException) -> RewardError:
        """Return the RewardError for what the function raised, with its place."""
        if isinstance(error, RowError):
            return RewardError(f"{self.kind} '{self.name}', {answers.place(error.index)}: {error}")
        if isinstance(error, RewardError):
            return RewardError(f"{self.kind} '{self.name}': {error}")
        raised = f"{type(error).__name__}: {error}{at_place(error)}"
        what = str(error) if isinstance(error, AlignkitError | LateError) else raised
        more = f" and {len(answers) - 1} more" if len(answers) > 1 else ""
        return RewardError(f"{self.kind} '{self.name}' failed on {answers.place(0)}{more}: {what}")


def called(function: Function, answers: Answers, arguments: Mapping[str, Any], deadline: Deadline) -> object:
    """Call a function that is not async. Raises RewardError for whatever it raises, and where it is late."""
    try:
        with interrupted(deadline):
            found = function.call(**arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's function may raise anything, and call sys.exit
        if why := deadline.passed():  # a function may have caught the interruption, and raise something else
            raise function.failed(answers, LateError(why + place_of(error))) from error
        raise function.failed(answers, error) from error
    if why := deadline.passed():  # or return as if nothing had happened
        raise function.failed(answers, LateError(why))
    return found


def known_of(answers: Answers, prefix: str = "") -> dict[str, Any]:
    """Return what is known of completions, by the name of the argument."""
    return {prefix + name: value for name in KNOWN if (value := getattr(answers, name))}


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())
