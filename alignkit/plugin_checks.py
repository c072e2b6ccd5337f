"""Checks of a third party's method: its class, and what its `advice` and `roles` return.

A plugin's code may raise anything and return anything; here every problem becomes a PluginError that names the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError

from alignkit.advice import BEST, Advice, Choice, DataFacts
from alignkit.config import RunConfig, gathered, validated
from alignkit.errors import ConfigError, PluginError, at_place
from alignkit.hints import hint
from alignkit.method import COLUMN_TYPES, DataKind, Method, MethodConfig, Role

_DEMO_OWN = ("method", "model", "data", "eval_data", "name", "output", "resume")  # set by `alignkit demo` itself


def check_class(cls: type[Method[Any]]) -> None:
    """Raise PluginError where the class violates the contract in a way that is visible without running it."""
    if problem := _problem(cls):
        raise PluginError(f"method '{getattr(cls, 'name', cls.__name__)}' {problem}")


def _problem(cls: type[Method[Any]]) -> str | None:
    if not issubclass(cls, Method):
        return "is not a subclass of alignkit.Method"
    if cls.loss is Method.loss:
        return "does not define loss(batch, models)"
    if getattr(cls, "data", None) not in get_args(DataKind):
        return f"has data = {getattr(cls, 'data', None)!r}; it must be one of {', '.join(get_args(DataKind))}"
    if unknown := sorted(cls.uses - set(get_args(Role))):
        return f"uses unknown roles {unknown}; roles: {', '.join(get_args(Role))}"
    if not issubclass(cls.Config, MethodConfig):
        return "has a Config that is not a subclass of alignkit.MethodConfig"
    if problem := _columns_problem(cls):
        return problem
    if clash := sorted(set(cls.Config.model_fields) & set(RunConfig.model_fields)):
        return f"has settings that the run already has: {', '.join(clash)}; rename them"
    base_problem = None if cls.demo_base is None else _demo_problem(cls, "demo_base")
    return _demo_problem(cls, "demo_settings") or base_problem


def _columns_problem(cls: type[Method[Any]]) -> str | None:
    known = ", ".join(t.__name__ for t in COLUMN_TYPES)
    given: Any = cls.columns
    if not isinstance(given, Mapping):
        return f"has columns = {given!r:.80}; it must be a mapping of names to types, such as {{'weight': float}}"
    wrong = next((name for name, kind in given.items() if not isinstance(name, str) or kind not in COLUMN_TYPES), None)
    return f"declares the column {wrong!r} as {given[wrong]!r:.80}; types: {known}" if wrong is not None else None


def _demo_problem(cls: type[Method[Any]], attribute: str) -> str | None:
    """Return what is wrong with the names in a class attribute that holds settings for the demo."""
    given: Any = getattr(cls, attribute)
    if not isinstance(given, Mapping):
        return f"has {attribute} = {given!r:.80}; it must be a mapping of settings"
    own, run = _author(cls, attribute).Config.model_fields, RunConfig.model_fields
    for key in given:
        name = key.partition(".")[0] if isinstance(key, str) else key
        if name in _DEMO_OWN:
            return f"has {attribute} with '{key}', which the demo sets itself; remove it"
        if name not in own and name not in run and f"{name}_" not in own:
            close = hint(str(name), {*own, *run}, cls.name)
            return f"has {attribute} with {key!r}, which is not a setting of the method or of the run.{close}"
    return None


def _author(cls: type[Method[Any]], attribute: str) -> type[Method[Any]]:
    """Return the class whose Config has the settings that an attribute names; a subclass may lack some of them."""
    author = next(c for c in cls.__mro__ if attribute in vars(c))
    return author if issubclass(author, Method) else cls


def demo_settings_of(cls: type[Method[Any]]) -> dict[str, Any]:
    """Return a method's `demo_settings`, groups as mappings, without inherited ones that it does not have."""
    own, run = cls.Config.model_fields, RunConfig.model_fields
    given = gathered(cls.demo_settings)
    return {k: v for k, v in given.items() if k in run or k in own or f"{k}_" in own}


def advice_of(method: type[Method[Any]], facts: DataFacts) -> Advice:
    """Return a method class's advice, with whitespace in its texts joined.

    Settings that a subclass inherits advice on and does not have are left out. Raises PluginError where the call fails,
    or its result is malformed.
    """
    label = f"the advice of '{method.name}'"
    try:
        return _checked_advice(method, method.advice(facts))
    except _Malformed as error:
        raise PluginError(f"{label} {error}") from None
    except (Exception, SystemExit) as error:
        raise PluginError(f"{label} failed: {_text(error)}") from error


def roles_of(method: type[Method[Any]]) -> frozenset[str]:
    """Return the roles that a method needs with its default settings; `uses` where a setting has no default.

    Raises PluginError where the call fails, or its result is not a set of roles in `uses`.
    """
    try:
        config = method.Config()
    except ValidationError:
        return method.uses
    except (Exception, SystemExit) as error:
        raise PluginError(f"the Config of '{method.name}' failed: {_text(error)}") from error
    try:
        roles: Any = method(config).roles()
        valid = isinstance(roles, set | frozenset) and roles <= method.uses
    except (Exception, SystemExit) as error:
        raise PluginError(f"roles() of '{method.name}' failed: {_text(error)}") from error
    if not valid:
        allowed = ", ".join(sorted(method.uses))
        raise PluginError(f"roles() of '{method.name}' must return a set of {allowed}, got {roles!r:.80}")
    return frozenset(roles)


class _Malformed(Exception):
    """What a plugin returned breaks the contract; the text follows the name of what returned it."""


def _text(error: BaseException) -> str:
    if isinstance(error, PluginError) and error.__cause__ is not None:
        error = error.__cause__  # of `alignkit.method`, whose words would be repeated
    return " ".join(f"{type(error).__name__}: {error}{at_place(error)}".split())


def _checked_advice(method: type[Method[Any]], advice: Any) -> Advice:
    if not isinstance(advice, Advice):
        raise _Malformed(f"must be an alignkit.Advice, got {type(advice).__name__}")
    rank, settings = advice.rank, advice.settings
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= BEST):
        raise _Malformed(f"has rank {rank!r:.80}; it must be an integer from 0 to {BEST}, or None")
    if not isinstance(settings, Sequence) or isinstance(settings, str | bytes | Choice):
        raise _Malformed(f"has settings {settings!r:.80}; they must be a sequence of alignkit.Choice")
    choices = [_checked_choice(_author(method, "advice"), choice) for choice in settings]
    choices = [choice for choice in choices if choice.name in method.Config.model_fields]
    try:
        validated(method.Config, {choice.name: choice.value for choice in choices})
    except ConfigError as error:
        if not _only_missing(method, choices):
            raise _Malformed(f"has settings that '{method.name}' does not accept: {error}") from None
    return Advice(rank, _line(advice.reason, "reason"), tuple(choices))


def _checked_choice(author: type[Method[Any]], choice: Any) -> Choice:
    if not isinstance(choice, Choice):
        raise _Malformed(f"has {choice!r:.80} in its settings; each must be an alignkit.Choice")
    own = author.Config.model_fields
    if not isinstance(choice.name, str) or choice.name not in own:
        close = hint(str(choice.name), own)
        raise _Malformed(f"sets {choice.name!r:.80}, which is not a setting of the method ({', '.join(own)}).{close}")
    if not _is_plain(choice.value):
        raise _Malformed(
            f"sets {choice.name} to {choice.value!r:.80} ({type(choice.value).__name__}); it must be a plain YAML "
            "value: text, number, true, false, null, list or mapping"
        )
    return Choice(choice.name, choice.value, _line(choice.why, f"reason for {choice.name}"))


def _line(text: Any, what: str) -> str:
    """Return a text as one line."""
    if not isinstance(text, str) or not text.strip():
        raise _Malformed(f"has the {what} {text!r:.80}; it must be a text that is not empty")
    return " ".join(text.split())


def _is_plain(value: Any) -> bool:
    """Return whether YAML can hold a value as it is; subclasses such as numpy's float64 are refused."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(k) is str and _is_plain(v) for k, v in value.items())
    return value is None or type(value) in (str, int, float, bool)


def _only_missing(method: type[Method[Any]], choices: Sequence[Choice]) -> bool:
    """Return whether the Config refuses the choices only because other settings have no default."""
    try:
        method.Config(**{choice.name: choice.value for choice in choices})
    except ValidationError as error:
        return all(e["type"] == "missing" and len(e["loc"]) == 1 for e in error.errors())
    return True
