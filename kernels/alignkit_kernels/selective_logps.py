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
ZERO = -1000.0  # e to this is 0 in float32 and float64; where p is 0, p log p shall be 0 and not 0 * inf


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
    # The row's maximum m and log(sum exp(z - m)) are kept apart: added up, large logits would round the small one off.

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy: bool, overwrite: bool
    ) -> tuple[Tensor, Tensor | None]:
        top = logits.new_empty(len(logits), dtype=accumulator(logits.dtype))
        log_sum, logps = torch.empty_like(top), torch.empty_like(top)
        entropies = torch.empty_like(top) if entropy else None
        for block in row_blocks(*logits.shape):
            z = logits[block].to(top.dtype) / temperature
            top[block] = z.amax(1)
            z.sub_(top[block, None])
            logps[block] = z.gather(1, targets[block, None]).squeeze(1)
            p = z.exp_() if entropies is None else z.exp()
            total = p.sum(1)
            log_sum[block] = total.log()
            if entropies is not None:
                entropies[block] = log_sum[block] - p.mul_(z.clamp_(min=ZERO)).sum(1) / total
        logps.sub_(log_sum)
        saved = (logits, targets, top, log_sum) if entropies is None else (logits, targets, top, log_sum, entropies)
        ctx.save_for_backward(*saved)
        ctx.temperature, ctx.overwrite = temperature, overwrite
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logps: Tensor, g_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, top, log_sum, *rest = ctx.saved_tensors
        grad = logits if ctx.overwrite else torch.empty_like(logits)
        g = g_logps / ctx.temperature
        inverse = torch.exp(-log_sum)  # p = exp(z - m) * inverse
        for block in row_blocks(*logits.shape):
            z = (logits[block].to(top.dtype) / ctx.temperature).sub_(top[block, None])
            if rest and g_entropies is not None:
                # dH/dz = -p (log p + H), log p = z - m - log_sum
                g_entropy = g_entropies[block] / ctx.temperature
                constant = g[block] + g_entropy * (rest[0][block] - log_sum[block])
                dz = z.exp().mul_(-inverse[block, None])
                dz.mul_(z.clamp_(min=ZERO).mul_(g_entropy[:, None]).add_(constant[:, None]))
            else:
                dz = z.exp_().mul_((-g * inverse)[block, None])
            dz.scatter_add_(1, targets[block, None], g[block, None])
            grad[block] = dz
        return grad, None, None, None, None
