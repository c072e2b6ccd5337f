"""What variants of DPO do to the log-ratios policy / reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit import Batch


def token_weights(batch: Batch, ld_alpha: float, averaged: bool) -> Tensor:
    """Return the weight of each token's log-ratio, [C].

    ld_alpha: of tokens past the shorter answer's length (2409.06411). averaged: over each answer's tokens.
    """
    lengths_S = batch.lengths
    per_token = torch.ones(len(batch.targets), device=lengths_S.device)
    if ld_alpha != 1.0:
        shorter_S = lengths_S.view(-1, 2).amin(1).repeat_interleave(2)
        offset_C = torch.arange(len(per_token), device=lengths_S.device)
        offset_C = offset_C - batch.cu_seqlens[:-1].repeat_interleave(lengths_S)
        per_token[offset_C >= shorter_S.repeat_interleave(lengths_S)] = ld_alpha
    if averaged:
        per_token = per_token / lengths_S.clamp(min=1).repeat_interleave(lengths_S)
    return per_token


def derivative(h_S: Tensor, divergence: str, alpha: float) -> Tensor:
    """Return f'(ratio) of a divergence (2309.16240) up to a constant, from the log-ratio h [S]."""
    if divergence == "js":
        return logsigmoid(h_S)
    h_S = h_S.clamp(min=-20.0)
    if divergence == "forward_kl":
        return -torch.exp(-h_S)
    return -torch.expm1(-alpha * h_S) / alpha
