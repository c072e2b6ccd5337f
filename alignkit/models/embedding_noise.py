"""NEFTune (2310.05914): uniform noise in the embeddings of a pass that is learned from.

The noise of a token is uniform in +- alpha / sqrt(L d): L is the number of tokens of its tree (its prompt and all of
its answers), d the width of an embedding. It comes from torch's generator, of which a checkpoint holds the first rank's
state: a resumed run of one process repeats it. Another cut of a step draws other noise, as dropout does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.types import PackedRows

ALPHA = "neftune_noise_alpha"  # transformers' own name for it, on the embedding


@contextmanager
def noisy(lm: nn.Module, rows: PackedRows) -> Iterator[None]:
    """Add noise to the embeddings inside the block, where the model has a scale for it and a gradient is taken."""
    embedding: Any = lm.get_input_embeddings()  # type: ignore[operator]
    alpha = getattr(embedding, ALPHA, None)
    if not alpha or not lm.training or not torch.is_grad_enabled():
        yield
        return
    lengths_RT = _lengths(rows)

    def add(module: nn.Module, given: Any, found_RTH: Tensor) -> Tensor:
        scale_RT = alpha / (lengths_RT * found_RTH.shape[-1]).sqrt()
        noise_RTH = torch.rand_like(found_RTH, dtype=torch.float32) * 2 - 1
        noisy_RTH: Tensor = found_RTH + (noise_RTH * scale_RT[..., None]).to(found_RTH.dtype)
        return noisy_RTH

    hook = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def _lengths(rows: PackedRows) -> Tensor:
    """Return the number of tokens of each token's tree, float32 [R, T]; infinite on padding, which gets no noise."""
    flat = rows.tree_ids.flatten()
    counts = torch.bincount(flat.clamp(min=0), weights=(flat >= 0).float())
    return torch.where(flat >= 0, counts[flat.clamp(min=0)], math.inf).view_as(rows.tree_ids).float()
