"""A checkpoint that was read and verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from alignkit.runs.parts import Like, read_parts
from alignkit.runs.runstate import with_aliases


@dataclass(frozen=True)
class Loaded:
    """A complete checkpoint: its step, its groups of whole tensors (on the CPU), its state, its folder.

    parts: the groups that are in parts, each with the other names of its tensors.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path
    parts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def groups(self) -> set[str]:
        """The names of all groups."""
        return {*self.tensors, *self.parts}

    def group(self, name: str, like: Like) -> dict[str, Tensor]:
        """Return a group of tensors; of one in parts, each sharded as the one that `like` returns."""
        if name not in self.parts:
            return self.tensors[name]
        return with_aliases(read_parts(self.path, name, like), self.parts[name])
