"""The statistics of softmax rows, folded slice by slice of the vocabulary, and the gradient of the logits.

    z = softcap(scale * logits) / temperature,   logp_n = z_n[t_n] - lse(z_n)
    entropy_n = lse(z_n) - sum_v p_nv z_nv

`selective_logps` and `linear_logps` are built on it. In plain PyTorch it works on blocks of rows: the float32
temporaries fit the cache, and low-precision logits are never copied as a whole.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from alignkit_kernels.backend import jit, launching, tl, uses_triton
from alignkit_kernels.transform import Transform, accumulator, transformed

BLOCK_ELEMENTS = 1 << 20  # 4 MiB of float32: several such temporaries stay in the caches
TRITON_BLOCK = 4096  # columns that a program processes at a time
ZERO = -1000.0  # exp(ZERO) is 0 in float32 and float64; where p is 0, p log p must be 0, not 0 * inf


def row_blocks(n_rows: int, n_columns: int) -> list[slice]:
    """Cut n_rows into slices of about BLOCK_ELEMENTS elements."""
    size = max(1, BLOCK_ELEMENTS // max(1, n_columns))
    return [slice(i, min(i + size, n_rows)) for i in range(0, n_rows, size)]


class RowStats:
    """Statistics of N softmax rows: top, the target's z, sums of e^(z - top) and of e^(z - top) (z - top).

    Maximum and sum are kept apart: their total would lose a small sum to rounding next to large logits.
    """

    def __init__(self, like: Tensor, targets: Tensor, vocabulary: int, transform: Transform, entropy: bool) -> None:
        if not targets.is_cuda and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
            raise ValueError(
                f"targets must be 0 to {vocabulary - 1}, got {int(targets.min())} to {int(targets.max())}: "
                f"leave out the positions that predict no target"
            )
        self.targets, self.transform = targets.contiguous(), transform
        # on a GPU the targets are not checked: one outside the vocabulary leaves a NaN
        self.hit = torch.full((len(targets),), torch.nan, dtype=accumulator(like.dtype), device=like.device)
        self.top, self.total = torch.empty_like(self.hit), torch.empty_like(self.hit)
        self.moment = torch.empty_like(self.hit) if entropy else None

    def rows(self, rows: slice) -> RowStats:
        """Return the statistics of some rows, in the same memory."""
        part = copy.copy(self)
        part.targets, part.hit, part.top, part.total = (t[rows] for t in (self.targets, self.hit, self.top, self.total))
        part.moment = None if self.moment is None else self.moment[rows]
        return part

    def fold(self, logits: Tensor, first: int = 0) -> None:
        """Add logits [N, n], the columns of the vocabulary from `first` on; the call with `first` 0 comes first."""
        (_launch if uses_triton(logits) else _fold)(self, logits, first)

    def grad(self, logits: Tensor, out: Tensor, g: Tensor | None, g_entropy: Tensor | None, first: int = 0) -> None:
        """Write the gradient of the logits [N, n] from column `first` on into `out`, which may be the logits."""
        if uses_triton(logits):
            _launch(self, logits, first, out, g, g_entropy, fold=False)
        else:
            _grad(self, logits, first, out, g, g_entropy)

    def fold_into_unit_gradient(self, logits: Tensor) -> None:
        """Add whole rows and overwrite them with the gradient of logps.sum(); on a GPU in one launch."""
        if uses_triton(logits):
            _launch(self, logits, 0, logits)
        else:
            _fold(self, logits, 0, into_unit_gradient=self.transform.softcap is None)
            if self.transform.softcap is not None:
                _grad(self, logits, 0, logits, torch.ones_like(self.top), None)

    def logps(self) -> Tensor:
        """Return the log-probabilities of the targets, [N]."""
        return self.hit - self.top - self.total.log()

    def entropies(self) -> Tensor | None:
        """Return the entropies, [N], None when they were not requested."""
        return None if self.moment is None else self.total.log() - self.moment / self.total


def _fold(stats: RowStats, logits: Tensor, first: int, into_unit_gradient: bool = False) -> None:
    n, slope = logits.shape[1], stats.transform.slope
    held = (stats.targets >= first) & (stats.targets < first + n)
    for rows in row_blocks(*logits.shape):
        x = logits[rows]
        at = (stats.targets[rows, None] - first).clamp(0, n - 1)
        hit = stats.transform.apply(x.gather(1, at)).squeeze(1)
        stats.hit[rows] = torch.where(held[rows], hit, stats.hit[rows])
        z, top = stats.transform.below_top(x)
        p = z.exp() if stats.moment is not None else z.exp_()
        total = p.sum(1)
        moment = z.clamp_(min=ZERO).mul_(p).sum(1) if stats.moment is not None else None
        _join(stats, rows, top, total, moment, first)
        if into_unit_gradient:
            dz = torch.mul(p, (-slope / total)[:, None], out=x if x.dtype == p.dtype else p)
            dz.scatter_add_(1, at, dz.new_full((), slope).expand_as(at))
            if dz is not x:
                x.copy_(dz)


def _join(stats: RowStats, rows: slice, top: Tensor, total: Tensor, moment: Tensor | None, first: int) -> None:
    if first:
        new = torch.maximum(stats.top[rows], top)
        # so far a row may hold nothing but -inf
        drop, piece_drop = ((t - new).nan_to_num_(ZERO).clamp_(min=ZERO) for t in (stats.top[rows], top))
        kept, piece_kept = drop.exp(), piece_drop.exp()
        if moment is not None and stats.moment is not None:
            moment = piece_kept * (moment + piece_drop * total)
            moment += kept * (stats.moment[rows] + drop * stats.total[rows])
        top, total = new, kept * stats.total[rows] + piece_kept * total
    stats.top[rows], stats.total[rows] = top, total
    if moment is not None and stats.moment is not None:
        stats.moment[rows] = moment


def _grad(stats: RowStats, logits: Tensor, first: int, out: Tensor, g: Tensor | None, g_entropy: Tensor | None) -> None:
    n, transform = logits.shape[1], stats.transform
    held = (stats.targets >= first) & (stats.targets < first + n)
    g = torch.zeros_like(stats.top) if g is None else g * transform.slope
    inverse = 1 / stats.total  # p = exp(z - top) * inverse
    mean = stats.moment * inverse if stats.moment is not None else None
    for rows in row_blocks(*logits.shape):
        x, to = logits[rows], out[rows]
        z, _ = transform.below_top(x, stats.top[rows])
        bend = transform.bend(z, stats.top[rows])
        if g_entropy is not None and mean is not None:
            # d entropy / dz = -p (log p + entropy) = -p (z - top - moment / total)
            ge = g_entropy[rows] * transform.slope
            dz = z.exp().mul_(-inverse[rows, None])
            dz.mul_(z.clamp_(min=ZERO).mul_(ge[:, None]).add_((g[rows] - ge * mean[rows])[:, None]))
        else:
            dz = torch.mul(z.exp_(), (-g * inverse)[rows, None], out=to if bend is None and to.dtype == z.dtype else z)
        onehot = torch.where(held[rows], g[rows], 0.0)
        dz.scatter_add_(1, (stats.targets[rows, None] - first).clamp(0, n - 1), onehot[:, None])
        if dz is not to:
            to.copy_(dz if bend is None else dz.mul_(bend))


@jit
def joined(top, total, moment, block_top, block_total, block_moment):  # type: ignore[no-untyped-def]
    """Combine the statistics of a row and of a block of its columns; the block's are relative to its own maximum."""
    new = tl.maximum(top, block_top)
    base = tl.where(new == float("-inf"), 0.0, new)  # so far a row may hold nothing else
    drop, block_drop = tl.maximum(top - base, -1000.0), tl.maximum(block_top - base, -1000.0)
    kept, block_kept = tl.exp(drop), tl.exp(block_drop)
    moment = kept * (moment + drop * total) + block_kept * (block_moment + block_drop * block_total)
    return new, kept * total + block_kept * block_total, moment


@jit
def _folded(  # type: ignore[no-untyped-def]
    logits_ptr, top, total, moment, n_columns, scale, softcap, inverse_temperature,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for start in range(0, n_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + columns, mask=columns < n_columns, other=0.0)
        z, _ = transformed(x, scale, softcap, inverse_temperature, SOFTCAP)
        z = tl.where(columns < n_columns, z, float("-inf"))
        block_top = tl.max(z, 0)
        z -= tl.where(block_top == float("-inf"), 0.0, block_top)
        p = tl.exp(z)
        block_moment = tl.sum(p * tl.maximum(z, -1000.0), 0) if ENTROPY else moment
        top, total, moment = joined(top, total, moment, block_top, tl.sum(p, 0), block_moment)
    return top, total, moment


@jit
def _write_grad(  # type: ignore[no-untyped-def]
    logits_ptr, out_ptr, at, top, inverse, g, g_entropy, constant, n_columns, scale, softcap, inverse_temperature,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for start in range(0, n_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + columns, mask=columns < n_columns, other=0.0)
        z, t = transformed(x, scale, softcap, inverse_temperature, SOFTCAP)
        p = tl.exp(z - top) * inverse
        dz = tl.where(columns == at, g, 0.0) - p * constant
        if ENTROPY:
            dz -= p * g_entropy * tl.maximum(z - top, -1000.0)
        dz *= scale * inverse_temperature
        if SOFTCAP:
            dz *= 1 - t * t
        tl.store(out_ptr + columns, dz.to(out_ptr.dtype.element_ty), mask=columns < n_columns)


@jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, out_ptr, targets_ptr, top_ptr, total_ptr, hit_ptr, moment_ptr, g_ptr, g_entropy_ptr,
    logits_stride, out_stride, n_columns, first, scale, softcap, inverse_temperature,
    SOFTCAP: tl.constexpr, FOLD: tl.constexpr, FIRST: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row per program: FOLD its columns into the statistics, write their GRADient, or for whole rows both in turn.

    A pointer that is not needed is None: moment for the entropy, g and g_entropy for their gradients (in FOLD, g is 1).
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    at = tl.load(targets_ptr + row) - first
    top, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    moment = tl.full([], 0.0, tl.float32)
    if not (FOLD and FIRST):
        top, total = tl.load(top_ptr + row), tl.load(total_ptr + row)
        if moment_ptr is not None:
            moment = tl.load(moment_ptr + row)
    if FOLD:
        # first: the reductions that follow keep fast threads from overwriting it before slow ones have read it
        if (at >= 0) & (at < n_columns):
            hit, _ = transformed(tl.load(logits_ptr + at), scale, softcap, inverse_temperature, SOFTCAP)
            tl.store(hit_ptr + row, hit)
        top, total, moment = _folded(
            logits_ptr, top, total, moment, n_columns, scale, softcap, inverse_temperature,
            SOFTCAP, moment_ptr is not None, BLOCK,
        )  # fmt: skip
        tl.store(top_ptr + row, top)
        tl.store(total_ptr + row, total)
        if moment_ptr is not None:
            tl.store(moment_ptr + row, moment)
    if GRAD:
        g = tl.load(g_ptr + row).to(tl.float32) if g_ptr is not None else tl.full([], 1.0 if FOLD else 0.0, tl.float32)
        g_entropy = tl.load(g_entropy_ptr + row).to(tl.float32) if g_entropy_ptr is not None else g * 0
        # d entropy / dz = -p (log p + entropy) = -p (z - top - moment / total)
        constant = g - g_entropy * (moment / total)
        _write_grad(
            logits_ptr, out_ptr + row * out_stride, at, top, 1 / total, g, g_entropy, constant,
            n_columns, scale, softcap, inverse_temperature, SOFTCAP, g_entropy_ptr is not None, BLOCK,
        )  # fmt: skip


def _launch(
    stats: RowStats,
    logits: Tensor,
    first: int,
    out: Tensor | None = None,
    g: Tensor | None = None,
    g_entropy: Tensor | None = None,
    fold: bool = True,
) -> None:
    if not len(logits):
        return
    if out is logits:  # so that autograd notices the write, as for PyTorch's own operations
        torch.autograd.graph.increment_version(logits)
    n, transform = logits.shape[1], stats.transform
    to = logits if out is None else out
    # with a soft cap and the entropy a full block spills registers when the vocabulary is odd
    block = TRITON_BLOCK // (1 if transform.softcap is None or stats.moment is None else 2)
    with launching(logits):
        _rows_kernel[(len(logits),)](
            logits, to, stats.targets, stats.top, stats.total, stats.hit, stats.moment, _dense(g), _dense(g_entropy),
            logits.stride(0), to.stride(0), n, first,
            transform.scale, transform.softcap or 1.0, 1 / transform.temperature,
            SOFTCAP=transform.softcap is not None, FOLD=fold, FIRST=first == 0, GRAD=out is not None,
            BLOCK=min(block, max(16, 1 << (n - 1).bit_length())), num_warps=4 if block < TRITON_BLOCK else 8,
        )  # fmt: skip


def _dense(g: Tensor | None) -> Tensor | None:
    # an upstream gradient is often a single expanded number
    return None if g is None else g.contiguous()
