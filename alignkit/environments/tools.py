"""Tools: Python functions that the policy calls."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from alignkit.environments.calling import called
from alignkit.environments.contract import Environment, Message, Step
from alignkit.errors import ConfigError, first_line

Function = Callable[..., Any]


class Tools(Environment):
    """Answers each call of a function by what it returns; a turn without a call ends the trajectory.

    functions: with types and a docstring of Google's style, which become their schemas. seconds: for one call. What a
    function raises, and what cannot be called, is an answer that the policy reads; a call that hangs is given up.
    """

    def __init__(self, functions: Sequence[Function], seconds: float = 30.0) -> None:
        names = [getattr(f, "__name__", None) for f in functions]
        if None in names:
            raise ConfigError(f"environment: the tool {functions[names.index(None)]!r} has no name; wrap it in a `def`")
        if twice := sorted({str(n) for n in names if names.count(n) > 1}):
            raise ConfigError(f"environment: two tools are called '{twice[0]}'; rename one of them")
        self.functions = {f.__name__: f for f in functions}
        self.seconds = seconds

    @cached_property
    def schemas(self) -> list[Mapping[str, Any]]:  # type: ignore[override]
        """The JSON schemas of the functions, as chat templates read them. Raises ConfigError naming the function."""
        return [schema_of(f) for f in self.functions.values()]

    async def step(self, messages: Sequence[Message]) -> Step:
        """Call what the last message calls, all at the same time."""
        calls = messages[-1].get("tool_calls", [])
        said = await asyncio.gather(*(self._answer(call["name"], call["arguments"]) for call in calls))
        return Step(
            [
                {"role": "tool", "name": call["name"], "content": text, "tool_call_id": f"call{i:05d}"}  # as mistral's
                for i, (call, text) in enumerate(zip(calls, said, strict=True), 1)
            ],
            done=not calls,
        )

    async def _answer(self, name: str, arguments: Mapping[str, Any]) -> str:
        function = self.functions.get(name)
        if function is None:
            return f"error: there is no tool '{name}'; there are {', '.join(self.functions)}"
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            return f"error: {name}: {error}"
        try:
            return text_of(await asyncio.wait_for(called(partial(function, **arguments)), self.seconds))
        except TimeoutError:
            return f"error: {name} gave no answer within {self.seconds:g} s"
        except Exception as error:  # tools are the user's
            return f"error: {name}: {first_line(error)}"


def schema_of(function: Function) -> Mapping[str, Any]:
    """Return a function's JSON schema. Raises ConfigError where its types or its docstring do not say enough."""
    from transformers.utils import get_json_schema

    try:
        return dict(get_json_schema(function))
    except Exception as error:  # transformers raises its own types here
        name = getattr(function, "__name__", str(function))
        raise ConfigError(
            f"environment: the tool '{name}' has no schema: {first_line(error)}. It needs a type for each argument and "
            "a docstring with a line for each under 'Args:'"
        ) from None


def text_of(value: Any) -> str:
    """Return what the policy reads: text as it is, other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
