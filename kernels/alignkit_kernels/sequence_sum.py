"""Sums and means of ragged, concatenated sequences.

A segment is summed in float64 and rounded once: in float32 a long one would lose its small terms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignkit_kernels.backend import jit, launching, tl, uses_triton

BLOCK = 1024  # tokens that a program processes at a time


def sequence_sum(values: Tensor, cu_seqlens: Tensor, mean: bool = False) -> Tensor:
    """Return the sum (or mean) of each segment of `values`; an empty segment gives 0.

    values: [C], any float type. cu_seqlens: int64 [S + 1], ascending from 0 to C. Returns [S] of the values' type.
    Raises ValueError when the boundaries do not cover the values. Deterministic, as is its backward.
    """
    check_segments(values, cu_seqlens)
    if len(cu_seqlens) == 1:
        return values[:0]
    return _SequenceSum.apply(values, cu_seqlens, mean) if uses_triton(values) else _eager(values, cu_seqlens, mean)


def check_segments(values: Tensor, cu_seqlens: Tensor) -> None:
    """Raise ValueError unless cu_seqlens [S + 1] divides values [C] into segments."""
    if values.dim() != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"expected values [C] and cu_seqlens [S + 1], got {[*values.shape]} and {[*cu_seqlens.shape]}")
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expected cu_seqlens of int64 (or int32), got {cu_seqlens.dtype}")
    if not values.is_cuda:  # on a GPU the check would wait for the device
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != len(values) or borders != sorted(borders):
            raise ValueError(f"cu_seqlens must ascend from 0 to {len(values)}, got {borders!s:.200}")


def _eager(values: Tensor, cu_seqlens: Tensor, mean: bool) -> Tensor:
    sums = torch.segment_reduce(values.double().contiguous(), "sum", offsets=cu_seqlens, unsafe=True, initial=0)
    return (sums / cu_seqlens.diff().clamp(min=1) if mean else sums).to(values.dtype)


def spread(
    values: Tensor, cu_seqlens: Tensor, n_tokens: int, mean: bool = False, factors: Tensor | None = None
) -> Tensor:
    """Return [C]: each of the C = n_tokens tokens gets the value of its segment; for backwards, without a gradient.

    values: [S], of any stride (one value for every k segments if [S / k]). cu_seqlens: int64 [S + 1].
    mean: divide by the segment's length. factors: float32 or float64 [S], multiply.
    Works in float64, returns the values' type.
    """
    if uses_triton(values):
        return _launch_spread(values, cu_seqlens, n_tokens, mean, factors)
    lengths = cu_seqlens.diff()
    each = values.double().repeat_interleave(len(lengths) // max(1, len(values)), output_size=len(lengths))
    each = each if factors is None else each * factors
    each = each / lengths.clamp(min=1) if mean else each
    return each.to(values.dtype).repeat_interleave(lengths, output_size=n_tokens)


@jit
def _sequence_sum_kernel(values_ptr, cu_seqlens_ptr, sums_ptr, MEAN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    s = tl.program_id(0).to(tl.int64)
    start, end = tl.load(cu_seqlens_ptr + s).to(tl.int64), tl.load(cu_seqlens_ptr + s + 1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        # through float32: the interpreter converts bfloat16 to float64 and back wrongly
        total += tl.load(values_ptr + at, mask=at < end, other=0.0).to(tl.float32).to(tl.float64)
    result = tl.sum(total)
    if MEAN:
        result /= tl.maximum(end - start, 1).to(tl.float64)
    tl.store(sums_ptr + s, result.to(tl.float32))


@jit
def _spread_kernel(  # type: ignore[no-untyped-def]
    values_ptr,
    factors_ptr,
    cu_seqlens_ptr,
    out_ptr,
    stride,
    SEGMENTS: tl.constexpr,
    MEAN: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    start, end = tl.load(cu_seqlens_ptr + s).to(tl.int64), tl.load(cu_seqlens_ptr + s + 1).to(tl.int64)
    value = tl.load(values_ptr + s // SEGMENTS * stride).to(tl.float32).to(tl.float64)
    if SCALED:
        value *= tl.load(factors_ptr + s)
    if MEAN:
        value /= tl.maximum(end - start, 1).to(tl.float64)
    block = tl.zeros([BLOCK], tl.float32) + value.to(tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + at, block, mask=at < end)


def _launch_spread(values: Tensor, cu_seqlens: Tensor, n_tokens: int, mean: bool, factors: Tensor | None) -> Tensor:
    out = values.new_empty(n_tokens)
    n_segments = len(cu_seqlens) - 1
    if n_segments and n_tokens:
        with launching(values):
            _spread_kernel[(n_segments,)](
                values,
                values if factors is None else factors.contiguous(),
                cu_seqlens.contiguous(),
                out,
                values.stride(0),
                SEGMENTS=n_segments // len(values),
                MEAN=mean,
                SCALED=factors is not None,
                BLOCK=BLOCK,
            )
    return out


class _SequenceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, cu_seqlens: Tensor, mean: bool) -> Tensor:
        cu_seqlens = cu_seqlens.contiguous()
        sums = values.new_empty(len(cu_seqlens) - 1)
        with launching(values):
            _sequence_sum_kernel[(len(sums),)](values.contiguous(), cu_seqlens, sums, MEAN=mean, BLOCK=BLOCK)
        ctx.save_for_backward(cu_seqlens)
        ctx.n_tokens, ctx.mean = len(values), mean
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        return spread(g, cu_seqlens, ctx.n_tokens, ctx.mean), None, None
