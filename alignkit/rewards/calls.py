"""Calling the functions of rewards and judges: each within its time, and the async ones together."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Mapping, Sequence
from typing import Any

from alignkit.errors import RewardError
from alignkit.models.ranks import SINGLE, Ranks
from alignkit.rewards.answers import Answers
from alignkit.rewards.event_loop import EventLoop
from alignkit.rewards.functions import Function, Values, called
from alignkit.rewards.limits import Deadline, LateError
from alignkit.rewards.probing import Given, made_up, probed

TIMEOUT = 600.0  # seconds; the default of `reward_timeout`


class Functions:
    """Functions that are called with the same answers; async ones share one event loop until `close`.

    timeout: seconds for a call of one function, None for no limit.
    """

    def __init__(self, functions: Sequence[Function], timeout: float | None = TIMEOUT) -> None:
        self._functions, self._timeout = list(functions), timeout
        self._ranks: Ranks = next((getattr(f.call, "ranks", SINGLE) for f in functions if _is_shared(f)), SINGLE)
        self._loop: EventLoop | None = None
        self._hung: set[str] = set()

    def check_columns(self, there: Collection[str]) -> None:
        """Raise RewardError where rows with these columns lack one that a function requires."""
        for function in self._functions:
            function.check_columns(there)

    def probe(self, answers: Answers, given: Given) -> None:
        """Find out how functions read completions, where prompts are messages and it is not known yet.

        answers: those of the prompts to probe with; their completions are not read. given: the arguments besides the
        columns, for made-up answers. Raises RewardError where a function cannot read these.
        """
        if any(function.reads is None for function in self._functions) and (made := made_up(answers)):
            self._functions = [f if f.reads else probed(f, made, given(made), self._limit(f)) for f in self._functions]

    def call(self, answers: Answers, given: Given) -> list[Values]:
        """Probe, then call every function, the async ones concurrently; without answers none, but shared models.

        given: the arguments besides the columns. Raises RewardError naming the function, the row and what it returned;
        where ranks share a model, on all of them.
        """
        return self._ranks.together(lambda: self._called_all(answers, given), RewardError)

    def _called_all(self, answers: Answers, given: Given) -> list[Values]:
        arguments = self._ranks.together(lambda: self._arguments(answers, given), RewardError)
        results: dict[int, object] = {}
        for i in filter(lambda i: _is_shared(self._functions[i]), range(len(arguments))):
            one, its = self._functions[i], arguments[i]
            results[i] = self._ranks.together(lambda one=one, its=its: _scored(one, answers, its), RewardError)  # type: ignore[misc]
        if not len(answers):
            return [[] for _ in arguments]
        for i, function in enumerate(self._functions):
            if not function.is_async and i not in results:
                results[i] = self._called(function, answers, arguments[i])
        waiting = {i: arguments[i] for i, function in enumerate(self._functions) if function.is_async}
        if waiting:
            results |= self._awaited(answers, waiting)
        return [function.checked(answers, results[i]) for i, function in enumerate(self._functions)]

    def close(self) -> None:
        """Call `close()` of the functions that have it, and close the event loop."""
        for function in self._functions:
            if callable(close := getattr(function.call, "close", None)) and function.name not in self._hung:
                close()
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _arguments(self, answers: Answers, given: Given) -> list[dict[str, Any]]:
        if not len(answers):
            return [{} for _ in self._functions]
        self.probe(answers, given)
        return [function.arguments(answers, given(answers)) for function in self._functions]

    def _called(self, function: Function, answers: Answers, arguments: Mapping[str, Any]) -> object:
        deadline = Deadline(self._limit(function))
        try:
            return called(function, answers, arguments, deadline)
        except RewardError:
            if deadline.passed():
                self._hung.add(function.name)
            raise

    def _awaited(self, answers: Answers, waiting: Mapping[int, Mapping[str, Any]]) -> dict[int, object]:
        self._loop = self._loop or EventLoop()
        functions = [self._functions[i] for i in waiting]
        limits = [self._limit(function) for function in functions]
        longest = None if None in limits else max(limits)  # type: ignore[type-var]
        deadline = Deadline(longest, more=1.0)  # for a function that blocks the loop
        running = dict.fromkeys(f.name for f in functions)
        calls = [
            self._one(function, answers, waiting[i], running) for i, function in zip(waiting, functions, strict=True)
        ]
        try:
            found = self._loop.run(_together(calls), deadline.passed)
        except LateError as late:
            self._loop = None
            self._hung |= running.keys()
            first = next(f for f in functions if f.name in running)
            others = f"; nor did {', '.join(n for n in running if n != first.name)}" if len(running) > 1 else ""
            raise first.failed(answers, LateError(f"{late}{others}")) from None
        return dict(zip(waiting, found, strict=True))

    async def _one(
        self, function: Function, answers: Answers, arguments: Mapping[str, Any], running: dict[str, None]
    ) -> object:
        deadline = Deadline(self._limit(function))
        try:
            async with asyncio.timeout(deadline.seconds):
                found = await function.call(**arguments)
        except (Exception, SystemExit) as error:  # SystemExit would end the loop
            del running[function.name]  # not where it is cancelled: then it was still running
            if why := deadline.passed():
                raise function.failed(answers, LateError(why)) from error
            raise function.failed(answers, error) from error
        del running[function.name]
        return found

    def _limit(self, function: Function) -> float | None:
        return None if getattr(function.call, "limits_itself", False) else self._timeout


def _is_shared(function: Function) -> bool:
    return bool(getattr(function.call, "is_shared", False))


def _scored(function: Function, answers: Answers, arguments: Mapping[str, Any]) -> object:
    """Call a model that ranks share, which is not interrupted: the others would wait for ever."""
    model: Any = function.call
    if not len(answers):
        return model.scores([])
    try:
        return model(**arguments)
    except Exception as error:
        raise function.failed(answers, error) from error


async def _together(calls: Sequence[Coroutine[Any, Any, object]]) -> list[object]:
    try:
        async with asyncio.TaskGroup() as group:  # a failure cancels the others, and the loop continues
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed.exceptions[0].__cause__
    return [task.result() for task in tasks]
