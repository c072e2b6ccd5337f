"""The product with the head and its row statistics, fused tile by tile in Triton: no logits are written to memory.

It replaces product and fold in `linear_logps` when nothing needs a gradient. A program multiplies one block of rows
by every tile of its part of the vocabulary; the statistics of the parts are combined at the end, in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit_kernels.backend import jit, launching, tl, triton, uses_triton
from alignkit_kernels.row_stats import RowStats, joined
from alignkit_kernels.transform import transformed

LARGEST_HIDDEN = 1024  # above it the fold is cheap compared with the product, which the vendor's library does faster
ROWS, DEPTH = 128, 64  # a tile of the product is ROWS by COLUMNS and DEPTH deep
COLUMNS, FEWER_COLUMNS = 128, 64  # GPUs other than those below spill registers with 128
WIDE = (9, 10)  # major compute capabilities; gfx942 reports 9.4
PROGRAMS = 1024  # the aim: several for every multiprocessor of a large GPU


def fuses(hidden: Tensor, weight: Tensor) -> bool:
    """Return whether the fused product is the better choice for these rows."""
    if not uses_triton(hidden) or hidden.dtype == torch.float32 or not len(hidden):
        return False
    # the interpreter multiplies bfloat16 wrongly: it uses the raw bits
    if not hidden.is_cuda and hidden.dtype != torch.float16:
        return False
    # unaligned strides are not prefetched and spill registers
    aligned = all(size % 16 == 0 for t in (hidden, weight) for size in (t.shape[1], t.stride(0)))
    return aligned and hidden.shape[1] <= LARGEST_HIDDEN


def fold_product(stats: RowStats, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Fold hidden @ weight.T + bias into empty `stats`. hidden: [N, H], weight: [V, H], both of a 16-bit type."""
    (n, h), v = hidden.shape, len(weight)
    wide = not hidden.is_cuda or torch.cuda.get_device_capability(hidden.device)[0] in WIDE
    columns = COLUMNS if wide else FEWER_COLUMNS
    row_blocks, tiles = triton.cdiv(n, ROWS), triton.cdiv(v, columns)
    n_parts = min(tiles, max(1, PROGRAMS // row_blocks))
    n_parts = triton.cdiv(tiles, triton.cdiv(tiles, n_parts))  # no part without a tile
    top, total, moment = (stats.top.new_empty(n_parts, n) for _ in range(3))
    hidden, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden, weight))
    transform = stats.transform
    with launching(hidden):
        _lse_kernel[(row_blocks, n_parts)](
            hidden, weight, None if bias is None else bias.contiguous(), stats.targets, stats.hit, top, total,
            None if stats.moment is None else moment,
            n, v, h, hidden.stride(0), weight.stride(0), triton.cdiv(tiles, n_parts),
            transform.scale, transform.softcap or 1.0, 1 / transform.temperature,
            SOFTCAP=transform.softcap is not None, WHOLE=h % DEPTH == 0,
            ROWS=ROWS, COLUMNS=columns, DEPTH=DEPTH, num_warps=8, num_stages=3,
        )  # fmt: skip
    torch.amax(top, 0, out=stats.top)
    drop = (top - stats.top).nan_to_num_(-1000.0).clamp_(min=-1000.0)
    kept = drop.exp()
    torch.sum(kept * total, 0, out=stats.total)
    if stats.moment is not None:
        torch.sum(kept * (moment + drop * total), 0, out=stats.moment)


@jit
def _lse_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, hit_ptr, top_ptr, total_ptr, moment_ptr,
    N, V, H, hidden_stride, weight_stride, tiles, scale, softcap, inverse_temperature,
    SOFTCAP: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows by `tiles` tiles of the vocabulary; neighbours in the grid share the weights, which stay cached."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    valid = rows < N
    rows64 = rows.to(tl.int64)
    depth = tl.arange(0, DEPTH)
    targets = tl.load(targets_ptr + rows64, mask=valid, other=-1)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    moment = tl.full([ROWS], 0.0, tl.float32)
    for tile in range(part * tiles, part * tiles + tiles):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        columns64 = columns.to(tl.int64)
        known = columns < V
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, H, DEPTH):
            at = start + depth
            inside = (at < H) | WHOLE
            a_ptrs = hidden_ptr + rows64[:, None] * hidden_stride + at[None, :]
            b_ptrs = weight_ptr + columns64[None, :] * weight_stride + at[:, None]
            a = tl.load(a_ptrs, mask=valid[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=known[None, :] & inside[:, None], other=0.0)
            product = tl.dot(a, b, product)
        if bias_ptr is not None:
            product += tl.load(bias_ptr + columns, mask=known, other=0.0).to(tl.float32)[None, :]
        z, _ = transformed(product, scale, softcap, inverse_temperature, SOFTCAP)
        z = tl.where(known[None, :], z, float("-inf"))
        held = (targets >= tile * COLUMNS) & (targets < tile * COLUMNS + COLUMNS) & valid
        # at most one column is the target's, so the sum selects it
        hit = tl.sum(tl.where(columns[None, :] == targets[:, None], z, 0.0), 1)
        tl.store(hit_ptr + rows64, hit, mask=held)
        block_top = tl.max(z, 1)
        z -= tl.where(block_top == float("-inf"), 0.0, block_top)[:, None]
        p = tl.exp(z)
        block_moment = tl.sum(p * tl.maximum(z, -1000.0), 1) if moment_ptr is not None else moment
        top, total, moment = joined(top, total, moment, block_top, tl.sum(p, 1), block_moment)
    at = part.to(tl.int64) * N + rows64
    tl.store(top_ptr + at, top, mask=valid)
    tl.store(total_ptr + at, total, mask=valid)
    if moment_ptr is not None:
        tl.store(moment_ptr + at, moment, mask=valid)
