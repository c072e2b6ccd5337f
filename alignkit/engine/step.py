"""The context of one step, for a method's `collect` and `after_update` (`alignkit.method.Context`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alignkit.engine.roles import Roles
from alignkit.engine.state import RunState
from alignkit.errors import PluginError
from alignkit.models.packing import batch_of
from alignkit.rollout.draws import checked
from alignkit.types import Batch, Example


@dataclass
class StepContext:
    """One step of a run.

    number: of the trained step, which seeds its samples. offset: position of the first of these held-out rows.
    logged: the numbers that were passed to `log`. drawn: the names of the calls of `rollouts`.
    """

    state: RunState
    step: int
    step_examples: tuple[Example, ...]
    generator: torch.Generator
    training: bool = True
    number: int = 0
    offset: int = 0
    logged: dict[str, float] = field(default_factory=dict)
    drawn: list[str] = field(default_factory=list)

    @property
    def max_new_tokens(self) -> int:
        """The length limit of a sampled completion."""
        return self.state.config.sampling.max_new_tokens

    @property
    def eos(self) -> int:
        """The tokenizer's end-of-sequence token."""
        return self.state.parts.eos

    @property
    def models(self) -> Roles:
        """The roles that the method declared."""
        return self.state.parts.roles

    @property
    def following(self) -> Sequence[Example]:
        """This rank's examples of the next step of the training; none in an evaluation, and after the last step."""
        parts, step = self.state.parts, self.step + 1
        return parts.ranks.share(parts.stream[step]) if self.training and step < self.state.total_steps else ()

    def collect(self) -> Batch:
        """Return this rank's part of the step's examples after the method's `collect`, without gradients."""
        batch = rank_batch(self.state, self.step_examples)
        with torch.no_grad():
            return self.state.method.collect(batch, self)

    def shard(self, examples: Sequence[Example]) -> Batch:
        """This rank's part of a list with one entry for each of `step_examples`."""
        return rank_batch(self.state, examples, keep=False)

    def rollouts(self, batch: Batch, n: int = 1, mixture: float | None = None, **options: Any) -> Batch:
        """Sample n completions of each prompt, and score them; see `alignkit.method.Context.rollouts`."""
        online, method = self.state.parts.online, self.state.method
        if online is None:
            raise PluginError(f"'{method.name}' reads {method.data}; ctx.rollouts is for methods with data = 'prompts'")
        draw = checked(self.state.config.sampling, self.drawn, n, mixture, **options)
        self.drawn.append(draw.name)
        return online.rollouts(self, batch, draw)

    def log(self, **values: float) -> None:
        """Add numbers to the step's metrics."""
        self.logged |= values

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks, entry by entry."""
        return self.state.parts.ranks.sum(value)

    def mean(self, value: Tensor, counted: Tensor | None = None) -> Tensor:
        """Mean over all entries of `value`, or those that are counted, on all ranks, a scalar."""
        counted = torch.ones_like(value, dtype=torch.bool) if counted is None else counted
        total, count = self.sum(torch.stack([(value.double() * counted).sum(), counted.sum()])).unbind()
        return (total / count.clamp(min=1)).to(value.dtype)

    def update_reference(self, alpha: float) -> None:
        """Move the reference: alpha * policy + (1 - alpha) * reference."""
        assert self.state.parts.reference is not None
        self.state.parts.reference.update(self.state.parts.plain, alpha)


def rank_batch(state: RunState, examples: Sequence[Example], keep: bool = True) -> Batch:
    """Return this rank's part of the examples, with the reference's log-probabilities where the method uses them.

    keep: write what the reference computes into its cache; False for rows that no other run will score.
    """
    parts = state.parts
    batch = batch_of(parts.ranks.share(examples), parts.layout, parts.accelerator.device)
    if parts.reference is None or parts.online:
        return batch
    return parts.reference.attach(batch, keep)
