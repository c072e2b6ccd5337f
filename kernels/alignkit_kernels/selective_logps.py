"""Log-probabilities of given tokens from logits, with a backward that keeps no second [N, V] tensor.

Both passes are those of row_stats.py, over whole rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignkit_kernels.backend import uses_triton
from alignkit_kernels.row_stats import RowStats
from alignkit_kernels.transform import Transform, check_targets


def selective_logps(
    logits: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    overwrite: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of each target, with `entropy` also the entropy of each row.

    logits: [N, V], any float type. targets: int64 [N]. temperature: above 0, divides last.
    softcap: c in c * tanh(z / c), applied after `scale`.
    overwrite: the backward may write the gradient into the memory of the logits (they must not be used again).
    Returns float32 [N] in nats (float64 for float64 logits), or a pair of them with `entropy`.
    Raises ValueError on shapes that do not match.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"expected logits [N, V] and targets [N], got {list(logits.shape)} and {list(targets.shape)}")
    check_targets(logits, targets)
    transform = Transform(softcap, scale, temperature).checked()
    logps, entropies = _SelectiveLogps.apply(logits, targets, transform, entropy, overwrite)
    return (logps, entropies) if entropy else logps


class _SelectiveLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, transform: Transform, entropy: bool, overwrite: bool
    ) -> tuple[Tensor, Tensor | None]:
        if uses_triton(logits) and logits.stride(1) != 1:
            logits, overwrite = logits.contiguous(), False
        stats = RowStats(logits, targets, logits.shape[1], transform, entropy)
        stats.fold(logits)
        ctx.save_for_backward(logits, targets)  # saved so that autograd notices a change
        ctx.stats, ctx.overwrite = stats, overwrite
        ctx.set_materialize_grads(False)
        return stats.logps(), stats.entropies()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logps: Tensor | None, g_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, _ = ctx.saved_tensors
        grad = logits if ctx.overwrite else torch.empty_like(logits)
        ctx.stats.grad(logits, grad, g_logps, g_entropies)
        return grad, None, None, None, None
