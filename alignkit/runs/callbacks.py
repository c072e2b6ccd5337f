"""The setting `callbacks`: listeners of one run, given as objects, or by the names of modules and files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from alignkit.errors import ConfigError
from alignkit.user_code import NAMED, imported, of_file

WORD = "callback"
HOOK = "on_metrics"


class Callback:
    """A listener of one run, called as those that are installed."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        parameters = inspect.signature(call).parameters.values()
        self._any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._named = {p.name for p in parameters}

    def on_metrics(self, **given: Any) -> list[Any]:
        """Pass what the hook's parameters name, and return a list of the alarms that it returned."""
        found = self._call(**{name: value for name, value in given.items() if self._any or name in self._named})
        return [found or []]


def load_callbacks(given: Sequence[Any]) -> dict[str, Callback]:
    """Return the listeners by name. Raises ConfigError: one cannot be loaded, or has no hook.

    given: functions `(run, step, metrics)`, objects, classes and modules with `on_metrics`; text "module:name",
    "file.py" or "file.py:name".
    """
    found: dict[str, Callback] = {}
    for one in given:
        name = one if isinstance(one, str) else str(getattr(one, "__name__", type(one).__name__))
        found[name if name not in found else f"{name} ({len(found) + 1})"] = Callback(_hook(one, name))
    return found


def _hook(one: Any, name: str) -> Callable[..., Any]:
    if isinstance(one, str):
        found, match = of_file(one, WORD), NAMED.fullmatch(one)
        one = imported(match[1], match[2], WORD) if found is None and match else found
        if one is None:
            raise ConfigError(f"callbacks: '{name}' is no name; write 'module:function', 'file.py' or 'file.py:name'")
    if inspect.isclass(one) and hasattr(one, HOOK):
        try:
            one = one()
        except Exception as error:  # a user's class may do anything
            raise ConfigError(f"callbacks: {name}() failed: {type(error).__name__}: {error}") from error
    hook = getattr(one, HOOK, one)
    if not callable(hook) or inspect.isclass(hook):
        raise ConfigError(
            f"callbacks: '{name}' has no function `{HOOK}(run, step, metrics)`, and is no function itself"
        )
    named = [p.name for p in inspect.signature(hook).parameters.values() if p.default is p.empty and p.kind < 2]
    if unknown := [p for p in named if p not in ("run", "step", "metrics")]:
        raise ConfigError(f"callbacks: '{name}' takes '{unknown[0]}'; it may take run, step and metrics")
    return hook  # type: ignore[no-any-return]
