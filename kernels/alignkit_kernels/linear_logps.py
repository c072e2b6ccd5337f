"""Log-probabilities of chosen tokens from hidden states and the weight of the language-model head.

    z = softcap(scale * (hidden @ weight.T + bias)) / temperature,   logp_n = z_n[t_n] - lse(z_n)

With a gradient the logits of the N given positions are kept for the backward (and turned into their own gradient in
place); without one they exist a block of rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit_kernels.selective_logps import accumulator, selective_logps

NO_GRAD_ELEMENTS = 1 << 24  # logits at a time where nothing is kept: 64 MiB of float32


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of each target under softmax(hidden @ weight.T), and the entropy when asked for.

    hidden: [N, H], only the positions that predict something. weight: [V, H]. targets: int64 [N]. bias: [V].
    softcap: c in c * tanh(z / c), applied after `scale`. temperature: > 0, divides last.
    Returns float32 [N] in nats (float64 for float64 inputs), or a pair of them with `entropy`.
    Raises ValueError on shapes that do not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"wanted hidden [N, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"wanted one target a row of hidden, got {list(targets.shape)} for {list(hidden.shape)}")
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    rows = max(1, len(hidden) if keeps else NO_GRAD_ELEMENTS // len(weight))
    overwrite = hidden.dtype != torch.float64  # float64 is for checks, which walk a graph more than once
    parts = []
    for start in range(0, max(1, len(hidden)), rows):
        block = slice(start, start + rows)
        logits = _logits(hidden[block], weight, bias, softcap, scale)
        parts.append(selective_logps(logits, targets[block], temperature, entropy, overwrite))
    if entropy:
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    return torch.cat(parts)  # type: ignore[arg-type]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        # tanh in float32: in bf16 its error is a hundred times that of the logits themselves
        capped = softcap * torch.tanh(logits.to(accumulator(logits.dtype)) / softcap)
        logits = capped.to(logits.dtype)
    return logits
