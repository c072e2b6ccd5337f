"""Attention of the packed forest branch by branch, for CPUs, where no kernel skips the empty blocks of a tree mask.

A branch (a prompt, or a completion) attends to its own tokens and to those of its prompt, and nothing else is computed;
under a dense mask every token attends to its whole row. Branches of similar sizes share one call of SDPA. A long branch
has a call of its own without a mask, whose memory would grow with the square of its length: SDPA's causal kernel reads
its whole sequence, prompt included; under a sliding window it is cut into pieces, which see little.
B branches, Q their tokens, K the tokens they see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from alignkit.types import PackedRows

BRANCHES = "alignkit_branches"  # the name registered with transformers
LONG = 1 << 20  # cells of a branch's mask
PIECE = 512  # tokens of a long branch under a sliding window


@dataclass(frozen=True)
class Bucket:
    """Branches of similar sizes.

    queries, keys: int64 [B, Q] and [B, K], which of the R * T positions they are. mask: bool [B, 1, Q, K]; None: one
    whole sequence, each token of which sees those before it.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


class _Part(NamedTuple):
    """A branch or a piece of it. own, seen: its tokens and those it sees. causal: they are the same."""

    own: Tensor
    seen: Tensor
    causal: bool = False


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
    mask.buckets = [_bucket(rows, some, window) for some in _alike(rows, window)]
    asked = torch.cat([bucket.queries.flatten() for bucket in mask.buckets])
    # padding may read any slot; a token that was repeated, as a prompt or to fill a bucket, may read any of its copies
    mask.slots = torch.zeros(n_rows * width, dtype=torch.int64, device=device)
    mask.slots[asked] = torch.arange(len(asked), device=device)
    return mask


def _alike(rows: PackedRows, window: int | None) -> list[list[_Part]]:
    """Return the parts of all branches, in groups whose sizes differ by less than 2 times."""
    alike: dict[Any, list[_Part]] = {}
    for own, seen in _branches(rows):
        for part in _parts(own, seen, rows.position_ids.flatten().cpu(), window):
            sizes = len(part.own).bit_length(), len(part.seen).bit_length()
            alike.setdefault((int(own[0]), "causal") if part.causal else sizes, []).append(part)
    return list(alike.values())


def _branches(rows: PackedRows) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (its tokens, the tokens they see) of each branch."""
    trees, branches = rows.tree_ids.flatten().cpu(), rows.branch_ids.flatten().cpu()
    # tree numbers are unique over all rows; only padding continues from one row to the next
    _, lengths = torch.stack([trees, branches]).unique_consecutive(dim=1, return_counts=True)
    prompt, start = torch.empty(0, dtype=torch.int64), 0
    for n in lengths.tolist():
        own = torch.arange(start, start + n)
        if trees[start] >= 0:
            if branches[start] == 0:
                prompt, seen = own, own
            else:
                seen = torch.cat([prompt, own])
            yield own, seen
        start += n


def _parts(own: Tensor, seen: Tensor, positions: Tensor, window: int | None) -> Iterator[_Part]:
    """Yield a branch as it is computed: whole, with its prompt where that costs at most twice as much, or in pieces."""
    n, before = len(own), len(seen) - len(own)
    if n * len(seen) <= LONG:
        yield _Part(own, seen)
    elif window is None and 4 * n >= len(seen):
        yield _Part(seen, seen, causal=True)
    else:
        for start in range(0, n, PIECE):
            piece, visible = own[start : start + PIECE], seen[: before + start + PIECE]
            if window is not None:
                visible = visible[positions[visible] > positions[piece[0]] - window]
            yield _Part(piece, visible)


def _bucket(rows: PackedRows, some: list[_Part], window: int | None) -> Bucket:
    device = rows.input_ids.device

    def filled(parts: list[Tensor]) -> Tensor:  # padded with the first position of each
        whole = pad_sequence(parts, batch_first=True, padding_value=-1)
        return torch.where(whole < 0, whole[:, :1], whole).to(device)

    queries, keys = filled([part.own for part in some]), filled([part.seen for part in some])
    if some[0].causal:
        return Bucket(queries, keys, None)
    positions = rows.position_ids.flatten().to(torch.int32)
    ahead = positions[queries][:, :, None] - positions[keys][:, None, :]
    there = torch.arange(keys.shape[1])[None] < torch.tensor([len(part.seen) for part in some])[:, None]
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
    parts = as_attended(query), as_attended(key), as_attended(value)
    with torch.autocast(query.device.type, enabled=False):
        out = _attended(*parts, attention_mask.buckets, options)
    flat = out.index_select(0, attention_mask.slots).to(query.dtype)
    return flat.unflatten(0, (query.shape[0], query.shape[2])), None


def as_attended(part: Tensor) -> Tensor:
    """Return a part as attention computes it: in float32 on CPUs, where 16 bits take longer, backward 2.5 times.

    Elsewhere in the type of autocast, where it is on: rotary positions leave queries and keys in float32.
    """
    kind = part.device.type
    if kind == "cpu":
        return part.float()
    return part.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else part


def _attended(query: Tensor, key: Tensor, value: Tensor, buckets: list[Bucket], options: dict[str, Any]) -> Tensor:
    """Return the outputs of all buckets in a row, [sum of B * Q, heads, D]."""
    asked, seen = [b.queries for b in buckets], [b.keys for b in buckets]
    outs = [
        scaled_dot_product_attention(
            q, k, v, attn_mask=b.mask, is_causal=b.mask is None, scale=options.get("scaling"),
            dropout_p=options.get("dropout", 0.0), enable_gqa=key.shape[1] != query.shape[1],
        ).transpose(1, 2).flatten(0, 1)
        for b, q, k, v in zip(buckets, _taken(query, asked), _taken(key, seen), _taken(value, seen), strict=True)
    ]  # fmt: skip
    return torch.cat(outs)


def _taken(part: Tensor, at: list[Tensor]) -> Iterator[Tensor]:
    """Yield the positions of each bucket, [B, heads, Q or K, D].

    Taken all at once: the backward of each index_select fills a gradient of the whole part with zeros.
    """
    flat = part.transpose(1, 2).flatten(0, 1)
    taken = flat.index_select(0, torch.cat([one.flatten() for one in at]))
    for one, own in zip(at, taken.split([one.numel() for one in at]), strict=True):
        yield own.unflatten(0, one.shape).transpose(1, 2)
