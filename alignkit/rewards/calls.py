"""Calling several rewards, or a judge, with the same answers: async ones together, in one event loop for the run."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from alignkit.rewards.answers import Answers
from alignkit.rewards.functions import Function, Values
from alignkit.rewards.probing import Given, made_up, probed


class Functions:
    """Functions that are called with the same answers; async ones share one event loop until `close`.

    The loop is kept because clients and semaphores belong to the loop that first used them.
    """

    def __init__(self, functions: Sequence[Function]) -> None:
        self._functions = list(functions)
        self._thread: ThreadPoolExecutor | None = None
        self._runner = asyncio.Runner()  # creates its loop on first use

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
            self._functions = [f if f.reads else probed(f, made, given(made)) for f in self._functions]

    def call(self, answers: Answers, given: Mapping[str, Any]) -> list[Values]:
        """Call every function, the async ones concurrently.

        given: the arguments besides the columns. Raises RewardError naming the function, the row and what it returned.
        """
        arguments = [function.arguments(answers, given) for function in self._functions]
        results: dict[int, object] = {}
        for i, function in enumerate(self._functions):
            if not function.is_async:
                try:
                    results[i] = function.call(**arguments[i])
                except Exception as error:  # a user's function may raise anything
                    raise function.failed(answers, error) from error
        waiting = [i for i, function in enumerate(self._functions) if function.is_async]
        if waiting:
            if self._thread is None:  # its own thread: a notebook already runs an event loop in this one
                self._thread = ThreadPoolExecutor(1, "alignkit-rewards")
            calls = _together([_awaited(self._functions[i], answers, arguments[i]) for i in waiting])
            results |= zip(waiting, self._thread.submit(self._runner.run, calls).result(), strict=True)
        return [function.checked(answers, results[i]) for i, function in enumerate(self._functions)]

    def close(self) -> None:
        """Call `close()` of the functions that have it, and close the event loop."""
        for function in self._functions:
            if callable(close := getattr(function.call, "close", None)):
                close()
        if self._thread is not None:
            self._thread.submit(self._runner.close).result()
            self._thread.shutdown()
            self._thread, self._runner = None, asyncio.Runner()


async def _together(calls: Sequence[Coroutine[Any, Any, object]]) -> list[object]:
    try:
        async with asyncio.TaskGroup() as group:  # a failure cancels the others, and the loop continues
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed.exceptions[0].__cause__
    return [task.result() for task in tasks]


async def _awaited(function: Function, answers: Answers, arguments: Mapping[str, Any]) -> object:
    try:
        return await function.call(**arguments)
    except Exception as error:  # as above
        raise function.failed(answers, error) from error
