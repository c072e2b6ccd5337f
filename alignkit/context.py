"""What the engine gives a method in `collect` and `after_update`; the contract is `alignkit.method.Context`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignkit.roles import Roles
from alignkit.types import Batch, Example

if TYPE_CHECKING:
    from alignkit.engine import Loop


@dataclass(frozen=True)
class StepContext:
    """One step as a method sees it."""

    loop: Loop
    step: int
    step_examples: tuple[Example, ...]
    generator: torch.Generator

    @property
    def models(self) -> Roles:
        """The roles that the method declared."""
        return self.loop.parts.roles

    def shard(self, examples: Sequence[Example]) -> Batch:
        """This rank's part of a list with one entry for each of `step_examples`."""
        return self.loop.shard(examples, keep=False)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over all entries of `value` on all ranks, a scalar."""
        both = torch.stack([value.double().sum(), value.new_tensor(value.numel(), dtype=torch.float64)])
        total, count = self.loop.reduce(both).unbind()
        return (total / count).to(value.dtype)

    def update_reference(self, alpha: float) -> None:
        """Move the reference: alpha * policy + (1 - alpha) * reference."""
        assert self.loop.parts.reference is not None
        self.loop.parts.reference.update(self.loop.parts.plain, alpha)
