"""The path that `linear_logps` takes, of four, its chunks, and their cost."""

from __future__ import annotations

from typing import NamedTuple

import torch

BUDGET = 1 << 30  # bytes of kept logits, by default
# bytes of logits at a time, by path. On a GPU paths 1 and 3 need large products; in path 4 a slice stays in the
# second-level cache until it is folded. On a CPU anything from 32 to 128 MiB is as fast.
CHUNK = {"cpu": {1: 64 << 20, 3: 64 << 20, 4: 32 << 20}, "cuda": {1: 512 << 20, 3: 256 << 20, 4: 32 << 20}}
MULTIPLE = 128  # of the rows or columns of a chunk: the tile size of a GPU's product


class Plan(NamedTuple):
    """The plan of a call of `linear_logps`.

    path: 1 to 4. chunk: rows in path 1, columns of the vocabulary in the others. kept: columns whose logits wait for
    the backward. flop_g: forward and backward, in units of one product with the head. peak_bytes: beyond inputs,
    outputs and gradients.
    """

    path: int
    chunk: int
    kept: int
    flop_g: float
    peak_bytes: int


def plan_linear_logps(
    n_tokens: int,
    hidden_size: int,
    vocabulary: int,
    dtype: torch.dtype,
    hidden_grad: bool = True,
    weight_grad: bool = False,
    bias_grad: bool = False,
    device: str = "cuda",
    memory_budget: float | None = None,
) -> Plan:
    """Return the plan of `linear_logps` for tensors of these sizes; nothing is computed. memory_budget: in bytes.

    Raises ValueError on a negative size or budget.
    """
    budget = BUDGET if memory_budget is None else _bytes(memory_budget)
    if n_tokens < 0 or hidden_size < 0 or vocabulary < 1:
        raise ValueError(
            f"sizes must be 0 or more, the vocabulary 1 or more; got {n_tokens} tokens, hidden size {hidden_size}, "
            f"vocabulary {vocabulary}"
        )
    row = dtype.itemsize * vocabulary
    column = dtype.itemsize * max(1, n_tokens)
    chunks = CHUNK["cpu" if device == "cpu" else "cuda"]
    if not (hidden_grad or weight_grad or bias_grad):
        chunk = _even(vocabulary, chunks[4] // column)
        return Plan(4, chunk, 0, 1.0, chunk * column)
    if not (weight_grad or bias_grad):
        chunk = _even(n_tokens, chunks[1] // row)
        return Plan(1, chunk, 0, 2.0, chunk * row + n_tokens * hidden_size * dtype.itemsize)
    products = 1.0 + hidden_grad + weight_grad
    if n_tokens * row <= budget:
        return Plan(2, vocabulary, vocabulary, products, n_tokens * row)
    kept = min(budget // column // MULTIPLE * MULTIPLE, vocabulary - 1)
    # a slice of few logits must be less than all of them, or path 2 would need as little memory
    chunk = _even(vocabulary - kept, min(chunks[3] // column, -(-vocabulary // 4)))
    # a float32 sum, and in low precision its earlier value or the addend
    sums = n_tokens * hidden_size * max(4, dtype.itemsize) * (1 + (dtype.itemsize < 4)) * hidden_grad
    return Plan(3, chunk, kept, products + 1 - kept / vocabulary, (chunk + kept) * column + sums)


def _bytes(budget: float) -> int:
    if not 0 <= budget < float("inf"):
        raise ValueError(f"memory_budget must be in bytes, 0 or more; got {budget}")
    return int(budget)


def _even(total: int, at_most: int) -> int:
    """Return the size of equal chunks of `total`, near `at_most` and a multiple of MULTIPLE."""
    if total <= max(at_most, MULTIPLE):
        return max(1, total)
    n_chunks = -(-total // max(at_most, MULTIPLE))
    return -(-total // n_chunks // MULTIPLE) * MULTIPLE
