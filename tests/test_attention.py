"""Masks: what each implementation of attention is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import (
    examples,
    fresh,
    one_at_a_time,
)

from alignkit.models.attention import attention_mask
from alignkit.models.packing import batch_of, dense_mask, pack
from alignkit.models.scoring import Scorer
from alignkit.types import Layout
from exact import assert_rounding_only, exact_copy


class Attention:
    """As much of a configuration as a mask depends on."""

    def __init__(self, implementation: str, **more: Any) -> None:
        self._attn_implementation = implementation
        self.__dict__.update(more)


def test_eager_attention_gets_minus_a_lot_where_sdpa_gets_false() -> None:
    rows = pack(examples(), Layout("forest", 64))
    boolean = attention_mask(rows, Attention("sdpa"), torch.float32)
    additive = attention_mask(rows, Attention("eager"), torch.bfloat16)
    assert boolean.dtype == torch.bool
    assert additive.dtype == torch.bfloat16
    assert torch.equal(boolean, dense_mask(rows))
    assert torch.equal(additive == 0, boolean)
    assert bool((additive[~boolean] < -1e37).all())
    assert additive.isfinite().all()


def test_layers_of_different_types_get_a_mask_each() -> None:
    rows = pack(examples(), Layout("forest", 64))
    mixed = Attention("sdpa", layer_types=["sliding_attention", "full_attention"], sliding_window=5)
    masks = attention_mask(rows, mixed, torch.float32)
    assert set(masks) == {"sliding_attention", "full_attention"}
    assert torch.equal(masks["full_attention"], dense_mask(rows))
    assert torch.equal(masks["sliding_attention"], dense_mask(rows, 5))
    full = Attention("sdpa", layer_types=["full_attention"], sliding_window=5)
    assert torch.equal(attention_mask(rows, full, torch.float32), dense_mask(rows))
    untyped = Attention("sdpa", sliding_window=5)
    assert torch.equal(attention_mask(rows, untyped, torch.float32), dense_mask(rows, 5))


def test_padded_rows_get_the_plain_mask() -> None:
    rows = pack(examples(), Layout("padded"))
    mask = attention_mask(rows, Attention("sdpa", sliding_window=5), torch.float32)
    assert mask.shape == rows.input_ids.shape
    lengths = [len(e.prompt) + len(c.tokens) for e in examples() for c in e.completions]
    assert mask.sum(1).tolist() == lengths


@pytest.mark.parametrize("window", [None, 6])
def test_the_block_mask_allows_what_the_dense_mask_allows(window: int | None) -> None:
    rows = pack([*examples(), *examples()], Layout("forest", 384, multiple_of=128))
    n_rows, width = rows.input_ids.shape
    blocks = attention_mask(rows, Attention("flex_attention", sliding_window=window), torch.float32)
    dense = dense_mask(rows, window)
    assert blocks.BLOCK_SIZE == (128, 128)
    assert blocks.shape == (n_rows, 1, width, width)
    # a block is computed where any of its cells is allowed ...
    n = width // 128
    tiles = dense[:, 0].view(n_rows, n, 128, n, 128).transpose(2, 3)
    assert torch.equal(blocks.to_dense()[:, 0].bool(), tiles.flatten(3).any(-1))
    # ... without asking for each cell only where all of them are ...
    full = torch.zeros_like(tiles[..., 0, 0])
    if blocks.full_kv_num_blocks is not None:
        for b in range(n_rows):
            for q in range(n):
                full[b, q, blocks.full_kv_indices[b, 0, q, : blocks.full_kv_num_blocks[b, 0, q]].long()] = True
    assert not (full & ~tiles.flatten(3).all(-1)).any()
    # ... and within a block cell by cell
    b, q, k = torch.meshgrid(torch.arange(n_rows), torch.arange(width), torch.arange(width), indexing="ij")
    assert torch.equal(blocks.mask_mod(b, torch.zeros_like(b), q, k), dense[:, 0])


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", ["llama", "mistral with a window", "gemma 2"])
def test_flex_attention_scores_the_forest_as_the_model_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    # uncompiled: the same mathematics, without a compiler
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_attention)
    model = fresh(name).eval()
    with torch.no_grad():
        want, exact = (one_at_a_time(m, examples()) for m in (model, exact_copy(model)))
        model.set_attn_implementation("flex_attention")
        batch = batch_of(examples(), Layout("forest", 128, multiple_of=128))
        got = Scorer(model)(batch.rows, batch.targets).logps
    assert_rounding_only(got, want, exact)
