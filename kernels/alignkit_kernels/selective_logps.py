"""Log-probabilities of chosen tokens from logits, with a backward that keeps no second [N, V] tensor.

    logp_n = z_n[t_n] - lse(z_n),   z = logits / temperature
    entropy_n = lse(z_n) - sum_v p_nv z_nv

Works row block by row block, so the float32 temporaries fit the cache and low-precision logits are never copied whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 1 << 20  # 4 MiB of float32: two such temporaries stay in a second-level cache


def selective_logps(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False, overwrite: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of each target, and the entropy of each row when asked for.

    logits: [N, V], any float type. targets: int64 [N]. temperature: > 0, divides the logits.
    overwrite: the backward may write the gradient into the logits' own memory (they must not be used again).
    Returns float32 [N] in nats (float64 for float64 logits), or a pair of them with `entropy`.
    Raises ValueError on shapes that do not fit.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"wanted logits [N, V] and targets [N], got {list(logits.shape)} and {list(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    logps, entropies = _SelectiveLogps.apply(logits, targets, temperature, entropy, overwrite)
    return (logps, entropies) if entropy else logps


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the type that sums over the vocabulary are made in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_blocks(n_rows: int, n_columns: int) -> list[slice]:
    """Cut n_rows into slices of about BLOCK_ELEMENTS elements."""
    size = max(1, BLOCK_ELEMENTS // max(1, n_columns))
    return [slice(i, min(i + size, n_rows)) for i in range(0, n_rows, size)]


class _SelectiveLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy: bool, overwrite: bool
    ) -> tuple[Tensor, Tensor | None]:
        dtype = accumulator(logits.dtype)
        lse = logits.new_empty(len(logits), dtype=dtype)
        logps = torch.empty_like(lse)
        entropies = torch.empty_like(lse) if entropy else None
        for block in row_blocks(*logits.shape):
            z = logits[block].to(dtype) / temperature
            lse[block] = z.logsumexp(1)
            logps[block] = z.gather(1, targets[block, None]).squeeze(1) - lse[block]
            if entropies is not None:
                p = (z - lse[block, None]).exp_()
                entropies[block] = lse[block] - (p * z).sum(1)
        saved = (logits, targets, lse) if entropies is None else (logits, targets, lse, entropies)
        ctx.save_for_backward(*saved)
        ctx.temperature, ctx.overwrite = temperature, overwrite
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logps: Tensor, g_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, lse, *rest = ctx.saved_tensors
        grad = logits if ctx.overwrite else torch.empty_like(logits)
        for block in row_blocks(*logits.shape):
            logp = (logits[block].to(lse.dtype) / ctx.temperature).sub_(lse[block, None])
            p = logp.exp()
            if rest and g_entropies is not None:
                # dH/dz = -p (log p + H)
                dz = (logp + rest[0][block, None]).mul_(p).mul_(-g_entropies[block, None])
                dz.addcmul_(p, g_logps[block, None], value=-1)
            else:
                dz = p.mul_(-g_logps[block, None])
            dz.scatter_add_(1, targets[block, None], g_logps[block, None])
            grad[block] = dz.div_(ctx.temperature)
        return grad, None, None, None, None
