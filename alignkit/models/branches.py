"""Attention of the packed forest branch by branch, for CPUs, where no kernel skips the empty blocks of a tree mask.

A branch (a prompt, or a completion) attends to its own tokens and to those of its prompt, and nothing else is computed;
under a dense mask every token attends to its whole row. Branches of similar sizes share one call of SDPA.
B branches, Q their tokens, K the tokens they see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from alignkit.types import PackedRows

BRANCHES = "alignkit_branches"  # the name registered with transformers


@dataclass(frozen=True)
class Bucket:
    """Branches of similar sizes.

    queries, keys: int64 [B, Q] and [B, K], which of the R * T positions they are. mask: bool [B, 1, Q, K].
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor


class BranchMask(Tensor):
    """Takes the place of a 4-D mask, without storage of its own.

    buckets: all branches. slots: int64 [R * T], the position of each token in the buckets' concatenated outputs.
    """

    buckets: list[Bucket]
    slots: Tensor


def attend_by_branches(lm: Any) -> None:
    """Set a transformers model that uses SDPA to attend branch by branch wherever its mask is a BranchMask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(BRANCHES, branch_attention)
    AttentionMaskInterface.register(BRANCHES, sdpa_mask)
    lm.set_attn_implementation(BRANCHES)


def branch_mask(rows: PackedRows, window: int | None = None) -> BranchMask:
    """Return the tree mask as `branch_attention` reads it; `window` as in `tree_mask`."""
    n_rows, width = rows.input_ids.shape
    device = rows.input_ids.device
    mask: BranchMask = torch.empty(n_rows, 1, width, width, device="meta").as_subclass(BranchMask)  # type: ignore[assignment]
    mask.buckets = [_bucket(rows, some, window) for some in _alike(rows)]
    asked = torch.cat([bucket.queries.flatten() for bucket in mask.buckets])
    # padding may read any slot; a token that was repeated to fill a bucket may read any of its copies
    mask.slots = torch.zeros(n_rows * width, dtype=torch.int64, device=device)
    mask.slots[asked] = torch.arange(len(asked), device=device)
    return mask


def _alike(rows: PackedRows) -> list[list[tuple[Tensor, Tensor]]]:
    """Return (its tokens, the tokens they see) of each branch, in groups whose sizes differ by less than 2 times."""
    trees, branches = rows.tree_ids.flatten().cpu(), rows.branch_ids.flatten().cpu()
    # tree numbers are unique over all rows; only padding continues from one row to the next
    _, lengths = torch.stack([trees, branches]).unique_consecutive(dim=1, return_counts=True)
    alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    prompt, start = torch.empty(0, dtype=torch.int64), 0
    for n in lengths.tolist():
        own = torch.arange(start, start + n)
        if trees[start] >= 0:
            if branches[start] == 0:
                prompt, seen = own, own
            else:
                seen = torch.cat([prompt, own])
            alike.setdefault((n.bit_length(), len(seen).bit_length()), []).append((own, seen))
        start += n
    return list(alike.values())


def _bucket(rows: PackedRows, some: list[tuple[Tensor, Tensor]], window: int | None) -> Bucket:
    device = rows.input_ids.device

    def filled(parts: list[Tensor]) -> Tensor:  # padded with the first position of each
        whole = pad_sequence(parts, batch_first=True, padding_value=-1)
        return torch.where(whole < 0, whole[:, :1], whole).to(device)

    queries, keys = filled([own for own, _ in some]), filled([seen for _, seen in some])
    positions = rows.position_ids.flatten()
    ahead = positions[queries][:, :, None] - positions[keys][:, None, :]
    there = torch.arange(keys.shape[1])[None] < torch.tensor([len(seen) for _, seen in some])[:, None]
    mask = (ahead >= 0) & there[:, None, :].to(device)
    if window is not None:
        mask &= ahead < window
    return Bucket(queries, keys, mask[:, None])


def branch_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention in transformers' form: [R, heads, T, D] to [R, T, heads, D]; SDPA for any other mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, BranchMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    n_rows, heads, width, _ = query.shape
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]

    def of(part: Tensor, at: Tensor) -> Tensor:
        return part.index_select(0, at.flatten()).view(*at.shape, *part.shape[1:]).transpose(1, 2)

    outs = [
        scaled_dot_product_attention(
            of(flat[0], b.queries), of(flat[1], b.keys), of(flat[2], b.keys), attn_mask=b.mask,
            scale=options.get("scaling"), dropout_p=options.get("dropout", 0.0), enable_gqa=key.shape[1] != heads,
        ).transpose(1, 2).flatten(0, 1)
        for b in attention_mask.buckets
    ]  # fmt: skip
    return torch.cat(outs).index_select(0, attention_mask.slots).unflatten(0, (n_rows, width)), None
