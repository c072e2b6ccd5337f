"""Installed methods, rewards, judges, listeners and samplers: entry points, each loaded on its own.

A plugin is imported only when its name is used, listeners with every run. A broken plugin is reported by name and does
not affect the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy
import yaml

from alignkit import hookspecs
from alignkit.errors import PluginError, at_place, nearest
from alignkit.method import Method
from alignkit.plugin_checks import check_class

GROUP, REWARDS, JUDGES, LISTENERS = "alignkit", "alignkit.rewards", "alignkit.judges", "alignkit.listeners"
SAMPLERS = "alignkit.samplers"
_WORDS = {GROUP: "method", REWARDS: "reward", JUDGES: "judge", LISTENERS: "listener", SAMPLERS: "sampler"}
_HOOKS = {REWARDS: "register_rewards", JUDGES: "register_judges", SAMPLERS: "register_samplers"}


@dataclass(frozen=True)
class Plugin:
    """One installed method: its distribution and version, and its class, or the problem with it."""

    name: str
    distribution: str
    version: str
    method: type[Method[Any]] | None
    problem: str | None = None


@cache
def first_party() -> Mapping[str, str]:
    """Return the methods that the project publishes, each with its distribution."""
    text = Path(__file__).with_name("first_party.yaml").read_text(encoding="utf-8")
    return {str(name): str(distribution) for name, distribution in yaml.safe_load(text).items()}


def names(group: str = GROUP) -> list[str]:
    """Return the sorted names that are installed in an entry-point group; imports nothing."""
    return sorted({e.name for e in entry_points(group=group)})


def get(name: str) -> type[Method[Any]]:
    """Return the method class of that name. Raises PluginError: unknown, broken, or provided by two distributions."""
    return _guarded(GROUP, name, _method)  # type: ignore[no-any-return]


def reward(name: str) -> Callable[..., Any]:
    """Return the reward that a plugin registered under that name; see `alignkit.hookspecs`. Raises as `get` does."""
    return _guarded(REWARDS, name, _function)  # type: ignore[no-any-return]


def judge(name: str) -> Callable[..., Any]:
    """Return the judge that a plugin registered under that name; see `alignkit.hookspecs`. Raises as `get` does."""
    return _guarded(JUDGES, name, _function)  # type: ignore[no-any-return]


def sampler(name: str) -> Callable[..., Any]:
    """Return the sampler that a plugin registered under that name; see `alignkit.hookspecs`. Raises as `get` does."""
    return _guarded(SAMPLERS, name, _function)  # type: ignore[no-any-return]


def listeners(warn: Callable[[str], Any]) -> dict[str, Any]:
    """Load every installed listener; return the hooks of each by its name. Broken ones cause a warning."""
    found = {}
    for name in names(LISTENERS):
        try:
            found[name] = _guarded(LISTENERS, name, _hooks)
        except PluginError as error:
            warn(f"{error}; the run continues without it")
    return found


def plugins() -> list[Plugin]:
    """Load every installed method; broken ones are listed with their problem."""
    listed = []
    for name in names():
        (owner, version), *_ = sorted({_owner(e) for e in entry_points(group=GROUP) if e.name == name})
        try:
            listed.append(Plugin(name, owner, version, get(name)))
        except PluginError as error:
            listed.append(Plugin(name, owner, version, None, str(error)))
    return listed


def _owner(entry: EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist else ("an unknown distribution", "?")


def _guarded(group: str, name: str, load: Callable[[EntryPoint], Any]) -> Any:
    """Load one entry point; any problem becomes a PluginError that names it."""
    word = _WORDS[group]
    found = [e for e in entry_points(group=group) if e.name == name]
    if not found:
        known = names(group)
        have = f"installed: {', '.join(known)}" if known else f"no {word} is installed"
        # an invented name may belong to anyone, so only our own distributions are advised
        ours = first_party().get(name) if group == GROUP else None
        add = f" To add it: pip install {ours}" if ours else nearest(name, known)
        raise PluginError(f"no {word} is called '{name}'; {have}.{add}")
    if len({_owner(e) for e in found}) > 1:
        owners = " and ".join(sorted({_owner(e)[0] for e in found}))
        raise PluginError(f"two distributions provide the {word} '{name}', {owners}; uninstall one of them")
    try:
        return load(found[0])
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # importing a third party's module may raise anything
        what = f"{type(error).__name__}: {error}{at_place(error)}"
        raise PluginError(f"{word} '{name}' of {_owner(found[0])[0]} cannot be loaded: {what}") from error


def _hooks(entry: EntryPoint) -> Any:
    manager = pluggy.PluginManager("alignkit")
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(entry.load(), name=entry.name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        word = _WORDS[entry.group]
        raise PluginError(f"{word} '{entry.name}' of {_owner(entry)[0]}: {error}; see alignkit.hookspecs") from error
    return manager.hook


def _method(entry: EntryPoint) -> type[Method[Any]]:
    classes = [c for some in _hooks(entry).register_methods() for c in some]
    for cls in classes:
        if getattr(cls, "name", None) == entry.name:
            check_class(cls)
            return cls  # type: ignore[no-any-return]
    has = ", ".join(repr(getattr(c, "name", c)) for c in classes) or "none"
    raise PluginError(
        f"the entry point '{entry.name}' of {_owner(entry)[0]} provides no method of that name; it provides {has}"
    )


def _function(entry: EntryPoint) -> Callable[..., Any]:
    word, hooks = _WORDS[entry.group], _hooks(entry)
    brought = getattr(hooks, _HOOKS[entry.group])()
    by_name = {name: call for some in brought for name, call in some.items()}
    if entry.name not in by_name:
        has = ", ".join(map(repr, by_name)) or "none"
        raise PluginError(
            f"the entry point '{entry.name}' of {_owner(entry)[0]} provides no {word} of that name; it provides {has}"
        )
    if not callable(by_name[entry.name]):
        given = type(by_name[entry.name]).__name__
        raise PluginError(f"{word} '{entry.name}' of {_owner(entry)[0]} must be a function or a class, got {given}")
    return by_name[entry.name]  # type: ignore[no-any-return]
