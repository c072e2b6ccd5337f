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
    """One step as a method sees it.

    number: of the step that is trained, which seeds its samples. offset: of held-out rows, the place of the first.
    """

    loop: Loop
    step: int
    step_examples: tuple[Example, ...]
    generator: torch.Generator
    training: bool = True
    number: int = 0
    offset: int = 0

    @property
    def max_new_tokens(self) -> int:
        """The longest that a sampled completion may be."""
        return self.loop.config.sampling.max_new_tokens

    @property
    def eos(self) -> int:
        """The tokenizer's end-of-sequence token."""
        return self.loop.parts.eos

    @property
    def models(self) -> Roles:
        """The roles that the method declared."""
        return self.loop.parts.roles

    def shard(self, examples: Sequence[Example]) -> Batch:
        """This rank's part of a list with one entry for each of `step_examples`."""
        return self.loop.shard(examples, keep=False)

    def rollouts(self, batch: Batch, n: int = 1, mixture: float | None = None) -> Batch:
        """Sample n completions of each prompt, and score them; see `alignkit.method.Context.rollouts`."""
        assert self.loop.parts.online is not None
        return self.loop.parts.online.rollouts(self, batch, n, mixture)

    def log(self, **values: float) -> None:
        """Add numbers to the step's metrics."""
        self.loop.extra.update(values)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks, entry by entry."""
        return self.loop.parts.ranks.sum(value)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over all entries of `value` on all ranks, a scalar."""
        both = torch.stack([value.double().sum(), value.new_tensor(value.numel(), dtype=torch.float64)])
        total, count = self.loop.parts.ranks.sum(both).unbind()
        return (total / count).to(value.dtype)

    def update_reference(self, alpha: float) -> None:
        """Move the reference: alpha * policy + (1 - alpha) * reference."""
        assert self.loop.parts.reference is not None
        self.loop.parts.reference.update(self.loop.parts.plain, alpha)
