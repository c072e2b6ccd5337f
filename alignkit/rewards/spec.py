"""The settings `reward` and `judge` -> functions that are checked, and loaded when they are built.

A reward or judge is a callable, "module:function", a model's folder, or the name of a built-in one or of a plugin's;
with options it is a mapping {use: <one of these>, ...}.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from alignkit import registry
from alignkit.config import validated
from alignkit.data.rows import shown
from alignkit.errors import ConfigError, PluginError, nearest
from alignkit.rewards.classifier import Classifier, Shared
from alignkit.rewards.functions import Function, Values
from alignkit.rewards.llm import LlmJudge, LlmScore
from alignkit.rewards.models import ModelOptions, PairwiseModel, RewardModel, check_folder
from alignkit.rewards.verifiers import Brevity, Earned, Exact, Format, Json, Length, Numeric, Options
from alignkit.user_code import NAMED, imported

Device: TypeAlias = torch.device | str


@dataclass(frozen=True)
class Kind:
    """The differences between rewards and judges: word, built-in ones, arguments of a call, class of models."""

    word: str
    built_in: Mapping[str, type[Options]]
    given: tuple[str, ...]
    model: type[Classifier]
    group: str
    registered: Callable[[str], Callable[..., Any]]


REWARD = Kind(
    "reward",
    {
        "brevity": Brevity,
        "environment": Earned,
        "exact": Exact,
        "format": Format,
        "json": Json,
        "length": Length,
        "llm": LlmScore,
        "numeric": Numeric,
    },
    ("prompts", "completions"),
    RewardModel,
    registry.REWARDS,
    registry.reward,
)
JUDGE = Kind("judge", {"llm": LlmJudge}, ("prompts", "first", "second"), PairwiseModel, registry.JUDGES, registry.judge)


@dataclass(frozen=True)
class Leaf:
    """One function that is not loaded yet.

    folder: of a model, else None. ready: the function where it can be checked without building it: None for a model,
    and for a user's class, whose constructor may do anything. clip: the least and the largest value that counts.
    """

    name: str
    weight: float
    build: Callable[[Device, Shared | None], Function]
    folder: str | None = None
    ready: Function | None = None
    clip: tuple[float, float] | None = None

    def clipped(self, values: Values) -> Values:
        """Return the values inside of `clip`."""
        low, high = self.clip or (-math.inf, math.inf)
        return [None if v is None else min(max(v, low), high) for v in values]

    def reads(self, there: Collection[str]) -> frozenset[str]:
        """See `Function.reads`; a model reads none, and a class that is not built yet may read all."""
        if self.ready is None:
            return frozenset() if self.folder else frozenset(there)
        return self.ready.columns_read(there)

    def check_columns(self, there: Collection[str]) -> None:
        """See `Function.check_columns`; does nothing unless the function is ready."""
        if self.ready is not None:
            self.ready.check_columns(there)


def leaf(spec: Any, kind: Kind) -> Leaf:
    """Check one reward or judge and return it. Raises ConfigError (PluginError for a broken plugin); loads no model."""
    given = dict(spec) if isinstance(spec, Mapping) else {"use": spec}
    if "use" not in given:
        close = nearest(str(next(iter(given), "")), ["use", "ensemble", "bradley_terry"])
        raise ConfigError(f"{kind.word}: {shown(spec)} has no `use`; write {{use: ..., weight: 1.0}}.{close}")
    clip = _range(given.pop("clip")) if "clip" in given and kind is REWARD else None
    return replace(_leaf(given, kind), clip=clip)


def _leaf(given: dict[str, Any], kind: Kind) -> Leaf:
    use = given.pop("use")
    weight = number(given.pop("weight", 1.0), f"{kind.word}: weight")
    target, name = _target(use, kind)
    name = str(given.pop("name", name))
    if isinstance(target, str):
        return _of_folder(target, name, weight, given, kind)
    if isinstance(target, type) and issubclass(target, Options):
        ready = Function(kind.word, name, _optioned(target, name, given, kind), kind.given)
        return Leaf(name, weight, lambda *_: ready, ready=ready)
    probe = given.pop("probe", True)
    if not isinstance(probe, bool):
        raise ConfigError(f"{kind.word} '{name}': probe is {shown(probe)}; give true or false")
    if isinstance(target, type):
        return _of_class(target, name, weight, given, kind, probe)
    function = _of_user(Function(kind.word, name, target, kind.given, given), probe)
    _ = function.parameters  # checks them
    return Leaf(name, weight, lambda *_: function, ready=function)


def number(value: Any, what: str) -> float:
    """Return a finite number from a spec. Raises ConfigError."""
    try:
        found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(f"{what} is {shown(value)}; give a finite number")
    return found


def _range(value: Any) -> tuple[float, float]:
    ends = [number(v, "reward: clip") for v in value] if isinstance(value, list | tuple) else []
    if len(ends) == 2 and ends[0] < ends[1]:
        return ends[0], ends[1]
    raise ConfigError(f"reward: clip is {shown(value)}; give [low, high], the range of values that count")


def _of_folder(folder: str, name: str, weight: float, options: Mapping[str, Any], kind: Kind) -> Leaf:
    checked = _optioned(ModelOptions, name, options, kind)

    def build(device: Device, shared: Shared | None) -> Function:
        model: Any = kind.model(folder, device, checked.max_tokens, shared)
        return Function(kind.word, name, model, kind.given, reads="messages")

    return Leaf(name, weight, build, folder)


def _of_user(function: Function, probe: bool) -> Function:
    """Return a user's function, to be probed unless it is async: such a one probably asks a server."""
    return replace(function, reads=None) if probe and not function.is_async else function


def _of_class(cls: type[Any], name: str, weight: float, options: Mapping[str, Any], kind: Kind, probe: bool) -> Leaf:
    try:
        inspect.signature(cls).bind(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{kind.word} '{name}': {error}; its options go to {cls.__qualname__}(...)") from None
    return Leaf(name, weight, lambda *_: _of_user(Function(kind.word, name, cls(**options), kind.given), probe))


def _optioned(cls: Any, name: str, options: Mapping[str, Any], kind: Kind) -> Any:
    known = list(cls.model_fields)
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{kind.word} '{name}' has no option '{option}'.{nearest(option, known)} Options: {', '.join(known)}"
            )
    try:
        return validated(cls, options)
    except ConfigError as error:
        raise ConfigError(f"{kind.word} '{name}': {error}") from None


def _target(use: Any, kind: Kind) -> tuple[Any, str]:
    """Return a function, a class or a model's folder, and its name."""
    if callable(use):
        return use, name_of(use)
    if isinstance(use, Path):
        use = os.fspath(use)
    if not isinstance(use, str) or not use:
        raise ConfigError(
            f"{kind.word}: must be a function, 'module:function', a model's folder or a name, got {shown(use)}; names: "
            f"{', '.join(sorted(kind.built_in))}"
        )
    installed = registry.names(kind.group)
    if use in kind.built_in:
        if use in installed:
            raise PluginError(
                f"{kind.word} '{use}' is built in, but a plugin provides one of the same name; uninstall the plugin"
            )
        return kind.built_in[use], use
    if use in installed:
        return kind.registered(use), use
    if match := NAMED.fullmatch(use):
        return _imported(match[1], match[2], kind), name_of(use)
    use = os.path.expanduser(use) if os.sep in use else use
    if os.sep not in use and not Path(use).is_dir():
        known = [*kind.built_in, *installed]
        raise ConfigError(
            f"no {kind.word} is called '{use}'.{nearest(use, known)} Names: {', '.join(sorted(known))}; write a "
            "function as 'module:function', a model as its folder"
        )
    try:
        check_folder(use, pairwise=kind is JUDGE)
    except ConfigError as error:
        raise ConfigError(f"{kind.word}: {error}") from None
    return use, name_of(use)


def name_of(use: Any) -> str:
    """Return the default name of a function, of the text that names one, or of a model's folder."""
    if callable(use):
        return str(getattr(use, "__name__", type(use).__name__))
    path = Path(os.path.expanduser(str(use)))
    if os.sep in str(use) or path.is_dir():
        return path.parent.name if path.name == "model" and path.parent.name else path.resolve().name
    return re.split(r"[:.]", str(use))[-1] if ":" in str(use) else str(use)


def _imported(module: str, name: str, kind: Kind) -> Callable[..., Any]:
    found = imported(module, name, kind.word)
    if not callable(found):
        raise ConfigError(f"{kind.word}: '{module}:{name}' must be a function or a class, got {shown(found)}")
    return found  # type: ignore[no-any-return]
