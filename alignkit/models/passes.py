"""Batches of any size, scored in parts that fit into memory; smaller parts where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alignkit.models.ranks import SINGLE, Ranks
from alignkit.types import Batch, Outputs

logger = logging.getLogger(__name__)

Autocast = Callable[[], AbstractContextManager[Any]]
T = TypeVar("T")


def halved(attempt: Callable[[int], T], size: int, least: int, smaller: str) -> tuple[T, int]:
    """Call `attempt(size)`; where memory runs out, again with half the size, but not below `least`.

    Returns the result and the size that it was computed with. smaller: the words for a size in the log, with %d.
    Raises torch.OutOfMemoryError where half the size would be below `least`.
    """
    while True:
        try:
            return attempt(size), size
        except torch.OutOfMemoryError:
            if size // 2 < least:
                raise
        size //= 2
        logger.warning(f"out of memory: continuing with {smaller}, which changes no result", size)


def least_tokens(batch: Batch, max_tokens: int, ranks: Ranks) -> int:
    """Return the smallest budget that the batch may be cut to: its largest tree, or all of `max_tokens` where other
    ranks wait for as many parts as there are now."""
    return max_tokens if ranks.n > 1 else max(batch.cost(i) for i in range(len(batch)))


def scored(scorer: nn.Module, batch: Batch, max_tokens: int, temperature: float = 1.0, ranks: Ranks = SINGLE) -> Tensor:
    """Score a batch of any size in parts of `max_tokens` tokens; float32 [C] in the batch's order."""
    return in_parts(lambda part: scorer(part.rows, part.targets, temperature), batch, max_tokens, ranks).logps


def in_parts(score: Callable[[Batch], Outputs], batch: Batch, max_tokens: int, ranks: Ranks = SINGLE) -> Outputs:
    """Call `score` on parts of `max_tokens` tokens and join its outputs: float32 [C] in the batch's order."""
    numbered = batch.attach(per_token={"at": torch.arange(len(batch.targets), device=batch.device)})
    least = least_tokens(batch, max_tokens, ranks)
    return halved(
        lambda size: _in_parts(score, numbered, size, ranks), max_tokens, least, "parts of %d tokens in this batch"
    )[0]


def _in_parts(score: Callable[[Batch], Outputs], numbered: Batch, max_tokens: int, ranks: Ranks) -> Outputs:
    joined = [torch.empty(len(numbered.targets), device=numbered.device) for _ in Outputs._fields]
    there = [False] * len(joined)
    for part, _ in in_step(numbered.micro_batches(max_tokens), ranks):
        for i, values in enumerate(score(part)):
            if values is not None:
                joined[i][part["at"]] = values.float()
                there[i] = True
    return Outputs(*(values if found else None for values, found in zip(joined, there, strict=True)))  # type: ignore[arg-type]


def weighted(outputs: Outputs, batch: Batch) -> Outputs:
    """Multiply the gradient of each token's log-probability by the batch's "rollout_weights", where it has them.

    The values stay as they are, so that ratios, clips and metrics do not see the weights. Every loss gets its gradient
    through these numbers, whatever it computes from them and whatever it averages over.
    """
    if "rollout_weights" not in batch or not outputs.logps.requires_grad:
        return outputs
    logps, weights = outputs.logps.clone(), batch["rollout_weights"]
    # where(), not a product: a masked infinite gradient times 0 would be nan
    logps.register_hook(lambda gradient: torch.where(weights == 0, 0.0, gradient * weights))
    return outputs._replace(logps=logps)


def in_step(parts: list[Batch], ranks: Ranks) -> Iterator[tuple[Batch, float]]:
    """Yield (part, 1.0), and after them the last part with weight 0.0, until this rank has made as many as the busiest.

    A forward pass of a sharded model and a backward pass under data parallelism must be made by all ranks or by none.
    """
    for i in range(ranks.most(len(parts))):
        yield parts[min(i, len(parts) - 1)], float(i < len(parts))
