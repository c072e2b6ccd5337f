"""Sums and means of ragged sequences that lie one behind the other."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_sum(values: Tensor, cu_seqlens: Tensor, mean: bool = False) -> Tensor:
    """Return the sum (or mean) of each segment of `values`; an empty segment gives 0.

    values: [C], float32 or float64. cu_seqlens: int64 [S + 1], ascending from 0 to C. Returns [S].
    Raises ValueError when the borders do not cover the values. Deterministic, and so is its backward.
    """
    if values.dim() != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"wanted values [C] and cu_seqlens [S + 1], got {[*values.shape]} and {[*cu_seqlens.shape]}")
    lengths = cu_seqlens.diff()
    if not values.is_cuda:  # on a GPU the comparison would wait for the device
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != len(values) or bool((lengths < 0).any()):
            raise ValueError(f"cu_seqlens must ascend from 0 to {len(values)}, got {borders!s:.200}")
    if len(lengths) == 0:
        return values[:0]
    # a segment is added up from left to right: in float32 a long one would lose its end
    sums = torch.segment_reduce(values.double().contiguous(), "sum", offsets=cu_seqlens, unsafe=True, initial=0)
    return (sums / lengths.clamp(min=1) if mean else sums).to(values.dtype)
