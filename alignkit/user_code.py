"""Functions and objects of a user's own modules and files, by their names in a setting: "module:name" or "file.py"."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from alignkit.errors import ConfigError, at_place, nearest

NAMED = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")
_FILE = re.compile(r"(.+\.py)(?::([A-Za-z_]\w*))?")


def imported(module: str, name: str, word: str) -> Any:
    """Return an object of a module that is installed or in the working folder. word: what it is for, for messages.

    Raises ConfigError: it cannot be imported, is not there, cannot be called, or is Python's own.
    """
    if _ships_with_python(module):
        raise _refused(f"{module}:{name}", word)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no local file shadows an installed module
    try:
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
        raise ConfigError(
            f"{word}: the module '{module}' of '{module}:{name}' cannot be imported: {type(error).__name__}: "
            f"{error}{at_place(error)}. It must be installed, or be in {os.getcwd()}"
        ) from error
    return _checked(_attribute(loaded, name, word), f"{module}:{name}", word)


def of_file(text: str, word: str) -> Any | None:
    """Return the module of "file.py", or the object of "file.py:name"; None for another text. Raises ConfigError."""
    match = _FILE.fullmatch(text)
    if match is None:
        return None
    path = Path(os.path.expanduser(match[1])).resolve()
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise ConfigError(
            f"{word}: there is no file {match[1]}.{nearest(path.name, there)} Python files in {path.parent}: "
            f"{', '.join(there[:8]) or 'none'}"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # as above
        raise ConfigError(
            f"{word}: {match[1]} cannot be loaded: {type(error).__name__}: {error}{at_place(error)}"
        ) from error
    return module if match[2] is None else _checked(_attribute(module, match[2], word), text, word)


def _attribute(module: ModuleType, name: str, word: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    there = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    where = getattr(module, "__file__", None) or "built in"
    raise ConfigError(f"{word}: the module '{module.__name__}' ({where}) has no '{name}'.{nearest(name, there)}")


def _checked(found: Any, text: str, word: str) -> Any:
    if (inspect.isroutine(found) or inspect.isclass(found)) and _ships_with_python(getattr(found, "__module__", None)):
        raise _refused(text, word)  # imported there from the standard library
    return found


def _ships_with_python(module: str | None) -> bool:
    return (module or "builtins").partition(".")[0] in sys.stdlib_module_names


def _refused(what: str, word: str) -> ConfigError:
    # nothing in it is a reward, and os:system with an option would run a command
    return ConfigError(
        f"{word}: '{what}' belongs to Python's standard library, which has no {word}; write a function in "
        f"your own module, with a name that the standard library does not use"
    )
