"""Keys and values of sampling: a prompt's are held once for all of its completions, a completion's in place.

A token attends to both in two products with one softmax, so that a prompt's keys are not copied for its rows.
P prompts, R rows (completions), H heads, K heads of the keys, T tokens, D dimensions of a head.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from alignkit.models.attention import by_layer_type
from alignkit.models.branches import as_attended

NAME = "alignkit_shared_keys"  # the name registered with transformers
_ROOM = 64  # tokens of completions that a buffer has room for at first; it doubles


class Keys:
    """The cache that a transformers model writes to: first whole prompts, then a token of each row at a time.

    lengths: of the prompts' parts that are read first. most: tokens of a row after them. Starts with one row for each
    prompt; see `select`.
    """

    def __init__(self, lengths: Tensor, most: int) -> None:
        self.most, self.lengths_P, self.of_row = most, lengths, torch.arange(len(lengths), device=lengths.device)
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        self.reading, self.n_own = True, 0
        self._unseen: dict[tuple[int | None, int], Tensor] = {}
        self.longest = 0
        self._arrange()

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep [P, K, T, D] of the prompts, or [R, K, 1, D] of the rows' new tokens; return what was given."""
        new = as_attended(key), as_attended(value)
        if self.reading:
            self.prompts[layer_idx] = new[0].contiguous(), new[1].contiguous()
            return key, value
        if layer_idx not in self.own:
            room = min(_ROOM, self.most)
            self.own[layer_idx] = tuple(n.new_empty(*n.shape[:2], room, n.shape[3]) for n in new)  # type: ignore[assignment]
        if self.n_own == (room := self.own[layer_idx][0].shape[2]):
            more = (0, 0, 0, min(room, self.most - room))
            self.own[layer_idx] = tuple(pad(kept, more) for kept in self.own[layer_idx])  # type: ignore[assignment]
        for kept, n in zip(self.own[layer_idx], new, strict=True):
            kept[:, :, self.n_own] = n[:, :, 0]
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens that the longest row has in the cache."""
        return 0 if self.reading else int(self.lengths_P.max()) + self.n_own

    def hidden(self, window: int | None) -> Tensor:
        """Return -inf where a row does not see a token of its prompt, else 0, [R, 1, 1, T]."""
        if (window, self.n_own) not in self._unseen:  # every layer asks for it
            at = torch.arange(self.longest, device=self.lengths_P.device)
            lengths_R = self.lengths_P[self.of_row][:, None]
            unseen = at >= lengths_R
            if window is not None:
                unseen |= lengths_R + self.n_own - at >= window
            dtype = next(iter(self.prompts.values()))[0].dtype
            found = torch.zeros(unseen.shape, dtype=dtype, device=at.device).masked_fill_(unseen, -torch.inf)
            self._unseen = {(window, self.n_own): found[:, None, None]}
        return self._unseen[window, self.n_own]

    def select(self, rows: Tensor) -> None:
        """Continue with these rows, in the order of their prompts; a row may be taken several times."""
        self.of_row = self.of_row[rows]
        for layer, kept in self.own.items():
            self.own[layer] = tuple(k.index_select(0, rows) for k in kept)  # type: ignore[assignment]
        used, self.of_row = self.of_row.unique_consecutive(return_inverse=True)
        if len(used) < len(self.lengths_P):
            self.lengths_P = self.lengths_P[used]
            longest = int(self.lengths_P.max())
            self.prompts = {i: (k[used, :, :longest], v[used, :, :longest]) for i, (k, v) in self.prompts.items()}
        self._arrange()

    def _arrange(self) -> None:
        """Lay the rows out in a grid of prompts and their rows: `grid` names a row for each cell, `cells` the reverse.

        None where the rows fill the grid.
        """
        counts = torch.bincount(self.of_row, minlength=len(self.lengths_P))
        width = int(counts.max())
        self.grid: Tensor | None = None
        if not bool((counts == width).all()):
            first = counts.cumsum(0) - counts
            place = torch.arange(width, device=counts.device).expand(len(counts), width)
            self.grid = (first[:, None] + place.minimum(counts[:, None] - 1)).flatten()
            self.cells = self.of_row * width + torch.arange(len(self.of_row), device=counts.device) - first[self.of_row]
        self._unseen.clear()
        self.longest = int(self.lengths_P.max())
        self.even = bool((self.lengths_P == self.longest).all())


class KeysMask(Tensor):
    """Takes the place of a 4-D mask, without storage of its own. window: tokens that are seen, the own one included."""

    keys: Keys
    window: int | None


def unknown_layers(config: Any) -> set[str]:
    """Return the layer types of a text model whose masks are not known here."""
    return set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}


def masks_of(keys: Keys, config: Any) -> Any:
    """Return `attention_mask` for a text model's configuration: one, or one for each of its layer types."""
    return by_layer_type(config, lambda window: _mask(keys, window))


def _mask(keys: Keys, window: int | None) -> KeysMask:
    mask: KeysMask = torch.empty(len(keys.of_row), 1, 1, 1, device="meta").as_subclass(KeysMask)  # type: ignore[assignment]
    mask.keys, mask.window = keys, window
    return mask


def register() -> None:
    """Make the attention known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass(frozen=True)
class _How:
    """What a layer's attention computes. sinks: logits [H] of a key without a value, which every token sees."""

    scale: float
    softcap: float | None
    window: int | None
    sinks: Tensor | None


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    softcap: float | None = None, dropout: float = 0.0, s_aux: Tensor | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention in transformers' form: [R, H, T, D] to [R, T, H, D of the values].

    Raises TypeError where the model asks for what this does not compute; `alignkit.rollout.decoder.refused` meets it
    first.
    """
    if not isinstance(attention_mask, KeysMask) or any(options.get(name) is not None for name in _UNKNOWN):
        raise TypeError(f"{type(module).__name__} has an attention of its own")
    keys, kind = attention_mask.keys, query.device.type
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = as_attended(query), as_attended(key), as_attended(value)
    how = _How(scale, softcap, attention_mask.window, None if s_aux is None else s_aux.to(parts[0].dtype))
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        if keys.reading:
            out = _of_prompts(*parts, how)
        else:
            out = _of_rows(parts[0], keys, int(module.layer_idx), how)  # type: ignore[arg-type]
    return out.to(query.dtype).transpose(1, 2), None


_UNKNOWN = ("head_mask", "position_bias", "alibi", "cu_seq_lens_q")


def _of_prompts(query: Tensor, key: Tensor, value: Tensor, how: _How) -> Tensor:
    """Return [P, H, T, D]. Prompts are padded behind their end, which no token before it sees."""
    n, plain, mask = query.shape[2], how.softcap is None and how.sinks is None, None
    if not plain or (how.window is not None and how.window < n):
        at = torch.arange(n, device=query.device)
        mask = (at[:, None] >= at) & (at[:, None] - at < (how.window or n))
    if plain:
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=how.scale, enable_gqa=key.shape[1] != query.shape[1]
        )
    assert mask is not None
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = _capped(grouped @ key[:, :, None].mT * how.scale, how.softcap).masked_fill(~mask, -torch.inf)
    sinks = None if how.sinks is None else how.sinks.view(key.shape[1], -1, 1, 1)
    return (_weights(scores, sinks) @ value[:, :, None]).flatten(1, 2)


def _of_rows(query: Tensor, keys: Keys, layer: int, how: _How) -> Tensor:
    """Return [R, H, 1, D] of one new token a row."""
    n_rows, heads, _, size = query.shape
    seen = keys.n_own + 1
    key_own, value_own = (kept[:, :, :seen] for kept in keys.own[layer])
    grouped = (query * how.scale).reshape(n_rows, key_own.shape[1], -1, size)  # [R, K, H / K, D]
    own = _capped(grouped @ key_own.mT, how.softcap)
    if how.window is not None and how.window < seen:
        own[..., : seen - how.window] = -torch.inf
    sinks = None if how.sinks is None else how.sinks.view(key_own.shape[1], -1, 1)
    if not keys.longest:
        return (_weights(own, sinks) @ value_own).reshape(n_rows, heads, 1, -1)
    key_prompt, value_prompt = keys.prompts[layer]
    shared = _capped(_to_rows(_to_grid(grouped, keys) @ key_prompt.mT, keys, own.shape[2]), how.softcap)
    if not keys.even or (how.window is not None and how.window < seen + keys.longest):
        shared = shared + keys.hidden(how.window)
    weights = _weights(torch.cat([shared, own], -1), sinks)
    of_prompt = _to_grid(weights[..., : keys.longest], keys) @ value_prompt
    out = _to_rows(of_prompt, keys, own.shape[2]) + weights[..., keys.longest :] @ value_own
    return out.reshape(n_rows, heads, 1, -1)


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the softmax of scores [..., T], with a column of sinks where there are some."""
    if sinks is None:
        return scores.softmax(-1)
    return torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


def _to_grid(rows: Tensor, keys: Keys) -> Tensor:
    """[R, K, G, X] -> [P, K, rows of a prompt * G, X]."""
    cells: Tensor = rows if keys.grid is None else rows.index_select(0, keys.grid)
    return cells.unflatten(0, (len(keys.lengths_P), -1)).transpose(1, 2).flatten(2, 3)  # type: ignore[no-any-return]


def _to_rows(grid: Tensor, keys: Keys, group: int) -> Tensor:
    """[P, K, rows of a prompt * G, X] -> [R, K, G, X], the reverse of `_to_grid`."""
    cells: Tensor = grid.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1)
    return cells if keys.grid is None else cells.index_select(0, keys.cells)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
