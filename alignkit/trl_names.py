"""The settings of TRL, transformers and peft, and what each is here: the table of trl_names.yaml.

Nothing of TRL is imported. tests/test_trl_names.py compares the table with the classes of the version in `VERSION`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from alignkit.lora_settings import PEFT_SETTINGS

VERSION = "1.16.0"
PEFT = "Adapters: other settings of peft"
OLDER = "Names of earlier versions"


@dataclass(frozen=True)
class Entry:
    """A setting of TRL. to: methods and their setting, or the setting of every method under ""; {}: there is none."""

    name: str
    section: str
    to: Mapping[tuple[str, ...], str]
    note: str

    def target(self, method: str | None) -> str | None:
        """Return our setting for a method, None where it has none."""
        return next((ours for methods, ours in self.to.items() if methods == () or method in methods), None)


@cache
def table() -> Mapping[str, Entry]:
    """Return all entries by name, in the order of the documentation."""
    return {e.name: e for e in _entries(_read())}


@cache
def trainers() -> Mapping[str, Mapping[str, Any]]:
    """Return, by the name of TRL's configuration class, its method here, its losses and its defaults.

    losses: the settings that give each loss_type. added: losses next to another one, and the setting of their weight.
    mixed: losses that may be added up, by the setting of their weights.
    defaults: those of TRL that a copy of a run must write out.
    """
    found = _read()
    return {
        name: {"losses": {}, "added": {}, "mixed": {}, **one, "defaults": {**found["defaults"], **one["defaults"]}}
        for name, one in found["classes"].items()
    }


def adapters() -> Mapping[str, Mapping[str, Any]]:
    """Return the defaults of the two classes that describe adapters."""
    return _read()["adapters"]  # type: ignore[no-any-return]


@cache
def _read() -> dict[str, Any]:
    text = Path(__file__).with_name("trl_names.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)  # type: ignore[no-any-return]


def _entries(found: Mapping[str, Any]) -> Iterator[Entry]:
    named = [(section["title"], section["names"]) for section in found["sections"]]
    for title, names in [*named, (OLDER, found["older"])]:
        for name, given in names.items():
            yield Entry(name, title, _targets(given.get("to")), given.get("note", ""))
    there = {name for _, names in named for name in names}
    for name, why in PEFT_SETTINGS.items():
        if name not in there:
            yield Entry(name, PEFT, {}, why)
    for group in found["absent"]:
        for name in group["names"]:
            yield Entry(name, "", {}, group["note"])


def _targets(to: str | Mapping[str, str] | None) -> Mapping[tuple[str, ...], str]:
    if to is None:
        return {}
    return {(): to} if isinstance(to, str) else {tuple(methods.split()): ours for methods, ours in to.items()}
