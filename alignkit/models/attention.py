"""The tree mask as a model's attention takes it: boolean for SDPA, additive for eager, blocks for FlexAttention.

Models with several layer types (full and sliding-window attention) take a dict with one mask for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from alignkit.models.branches import BRANCHES, branch_mask
from alignkit.models.packing import dense_mask, tree_mask
from alignkit.types import PackedRows

BLOCK = 128  # FlexAttention's block; rows are padded to a multiple of it on a GPU


def attention_mask(rows: PackedRows, config: Any, dtype: torch.dtype) -> Any:
    """Return a transformers model's `attention_mask` for these rows.

    config: the text model's, with its attention implementation set. dtype: of an additive mask.
    Padded rows get the plain mask int64 [R, T]; a forest gets a 4-D mask, a BlockMask, or a dict of one per layer type.
    """
    if rows.kind == "padded":
        return (rows.tree_ids >= 0).long()
    return by_layer_type(config, lambda window: _mask(rows, window, config._attn_implementation, dtype))


def by_layer_type(config: Any, mask: Callable[[int | None], Any]) -> Any:
    """Return `mask(window)` for a text model's configuration, or a dict of one for each of its layer types."""
    layer_types = set(getattr(config, "layer_types", None) or ())
    if layer_types - {"full_attention"}:
        return {kind: mask(window_of(config, kind)) for kind in layer_types}
    return mask(None if layer_types else window_of(config, None))


def window_of(config: Any, layer_type: str | None) -> int | None:
    """Return the sliding window of the layers of a type, None without; layer_type: None for models with one type."""
    if layer_type == "full_attention":
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def _mask(rows: PackedRows, window: int | None, implementation: str, dtype: torch.dtype) -> Any:
    if implementation == "flex_attention":
        return _block_mask(rows, window)
    if implementation == BRANCHES:
        return branch_mask(rows, window)
    mask = dense_mask(rows, window)
    if implementation == "sdpa":
        return mask
    return _additive(mask, dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _block_mask(rows: PackedRows, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    n_rows, width = rows.input_ids.shape
    return create_block_mask(
        tree_mask(rows, window), n_rows, None, width, width, device=rows.input_ids.device, BLOCK_SIZE=BLOCK
    )


@contextmanager
def without_flex(lm: Any) -> Iterator[None]:
    """Replace FlexAttention, which recompiles for every length, inside the block; restore it afterwards."""
    with dense_instead_of(lm, "flex_attention"):
        yield


@contextmanager
def dense_instead_of(lm: Any, *implementations: str) -> Iterator[None]:
    """Replace these attention implementations with a dense one inside the block; restore them afterwards."""
    before = lm.config._attn_implementation
    if before not in implementations:
        yield
        return
    lm.set_attn_implementation(dense_attention(lm))
    try:
        yield
    finally:
        lm.set_attn_implementation(before)


def dense_attention(lm: Any) -> str:
    """Return the attention implementation to use instead of FlexAttention."""
    return "sdpa" if getattr(lm, "_supports_sdpa", False) else "eager"
