"""The state that the rules of a conversion share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkit.trl_names import table


@dataclass
class Work:
    """Settings in the making. method: ours. given: by TRL's names. defaults: TRL's. samples: the method does.

    left: (name, why) of what was not carried over. done: names that a rule has dealt with.
    """

    method: str
    samples: bool
    given: Mapping[str, Any]
    defaults: Mapping[str, Any]
    processes: int = 1
    updates: int = 1  # of a step of ours
    settings: dict[str, Any] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)
    done: set[str] = field(default_factory=set)

    def get(self, name: str) -> Any:
        """Return a value of TRL's, its default where the file has none, None where there is neither."""
        self.done.add(name)
        return self.given.get(name, self.defaults.get(name))

    def has(self, *names: str) -> bool:
        """Return whether the file gives one of these names a value."""
        return any(self.given.get(name) is not None for name in names)

    def put(self, ours: str, value: Any) -> None:
        """Set one of our settings; "group.name" in its group."""
        group, dot, name = ours.rpartition(".")
        (self.settings.setdefault(group, {}) if dot else self.settings)[name] = value

    def lose(self, name: str, why: str | None = None) -> None:
        """Note what is not carried over; why: default, what the table says."""
        self.done.add(name)
        self.left.append((name, why or self._why(name)))

    def same(self, names: Iterable[str]) -> None:
        """Carry over values that mean the same under our name; those without one for this method are left."""
        for name in names:
            value = self.get(name)
            target = table()[name].target(self.method)
            if value is not None and target is not None:
                self.put(target, value)
            elif self.given.get(name):
                self.lose(name)

    def _why(self, name: str) -> str:
        entry = table().get(name)
        if entry is None:
            return "no setting of TRL has this name"
        targets = "; ".join(f"{ours} of {', '.join(methods) or 'a run'}" for methods, ours in entry.to.items())
        return ": ".join(text for text in (targets, entry.note) if text)
