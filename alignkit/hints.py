"""Hints for settings that do not exist: the meaning of a name of TRL first, then a name that is nearly the same.

A wrong hint is worse than none: a name is suggested only where it has the same digits and almost the same letters.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import get_args

from pydantic import BaseModel

from alignkit.trl_names import Entry, table

CUTOFF = 0.85  # `bta` for `beta` is 0.86, `kl_coef` for `value_coef` 0.71


def hint(name: str, known: Iterable[str], method: str | None = None) -> str:
    """Return what to write instead of a setting that does not exist, "" where nothing is certain; starts with a space.

    known: the settings that exist, those of groups as "group.name". method: the name of the run's method.
    """
    names = {k.rstrip("_") for k in known}
    entry = table().get(name) or table().get(name.rpartition(".")[2])
    return _meaning(entry, names, method) if entry else _typo(name, names)


def names_of(cls: type[BaseModel]) -> Iterator[str]:
    """Yield the names of all settings of a class, those of groups as "group.name"."""
    for name, field in cls.model_fields.items():
        yield name
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from (f"{name}.{of_group}" for of_group in names_of(inner))


def _meaning(entry: Entry, known: set[str], method: str | None) -> str:
    if not entry.to:
        return f" TRL's '{entry.name}' has no counterpart here: {entry.note}."
    note = f": {entry.note}" if entry.note else ""
    target = entry.target(method)
    if target is not None and target.partition(".")[0] in known:
        return f" TRL's '{entry.name}' is '{target}' here{note}."
    by_method = "; ".join(f"'{ours}' of {', '.join(methods) or 'a run'}" for methods, ours in entry.to.items())
    return f" TRL's '{entry.name}' is {by_method}{note}."


def _typo(name: str, known: set[str]) -> str:
    group, _, word = name.lower().replace("-", "_").rpartition(".")
    there = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == group and _digits(k) == _digits(name)}
    swapped = [k for k in sorted(there) if sorted(k) == sorted(word)]
    close = swapped or difflib.get_close_matches(word, sorted(there), n=1, cutoff=CUTOFF)
    return f" Did you mean '{there[close[0]]}'?" if close else ""


def _digits(name: str) -> str:
    return re.sub(r"\D", "", name)
