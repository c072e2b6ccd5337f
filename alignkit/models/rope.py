"""Rotary positions that depend on a sequence's length: every sequence is computed as if it were alone.

transformers chooses the frequencies of a whole forward pass by the longest sequence in it (rope types `longrope` and
`dynamic`), and `dynamic` also remembers longer sequences of earlier passes. Here each tree keeps its own frequencies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.types import PackedRows, Switch


def switch_of(lm: nn.Module) -> Switch | None:
    """Return where a transformers model's rotary frequencies change with the length; None where they never do."""
    limits, exact_beyond = set[int](), list[int]()
    for module, layer_type, kind in _rotary(lm):
        if kind == "longrope":
            given = module.config.rope_parameters
            limits.add(int((given if layer_type is None else given[layer_type])["original_max_position_embeddings"]))
        else:
            exact_beyond.append(int(module.original_max_seq_len))
    if not limits and not exact_beyond:
        return None
    return Switch(tuple(sorted(limits)), min(exact_beyond, default=None))


def _rotary(lm: nn.Module) -> Iterator[tuple[Any, str | None, str]]:
    """Yield (module, layer type, rope type) of each kind of rotary positions that depends on the length."""
    for module in lm.modules():
        given = getattr(module, "rope_type", None)
        kinds = given if isinstance(given, Mapping) else {None: given}
        for layer_type, kind in kinds.items():
            if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind):
                yield module, layer_type, kind


def forget_lengths(lm: nn.Module) -> None:
    """Let the next pass choose its frequencies by its own length, not by a longer one of an earlier pass.

    Multimodal models with positions in three axes also keep an offset for each row of the last pass of `generate`.
    """
    for part in lm.modules():
        if isinstance(getattr(part, "rope_deltas", None), Tensor):
            part.rope_deltas = None  # type: ignore[assignment]
    for module, layer_type, kind in _rotary(lm):
        if kind != "longrope":  # `longrope` chooses anew in each pass
            prefix = "" if layer_type is None else f"{layer_type}_"
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").clone())
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


@contextmanager
def each_as_alone(lm: nn.Module, rows: PackedRows) -> Iterator[None]:
    """Inside the block, give each position of the rows the frequencies of its own sequence's length."""
    if rows.rope_as is None:
        yield
        return
    modules = list({id(module): module for module, _, _ in _rotary(lm)}.values())
    lengths = rows.rope_as.unique().tolist()
    for module in modules:
        module.forward = _by_length(lm, module.forward, rows.rope_as, lengths)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own is found again
        forget_lengths(lm)


def _by_length(lm: nn.Module, forward: Callable[..., Any], rope_as: Tensor, lengths: list[int]) -> Callable[..., Any]:
    """Return a rotary module's forward that calls its own once for each length, as if no other were in the pass."""

    def joined(x: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> Any:
        out: Any = None
        for length in lengths:
            forget_lengths(lm)
            own = rope_as == length
            # the own forward reads the length from the largest position
            made = forward(x, position_ids.where(own, length - 1), *args, **options)
            out = made if out is None else _where(own[..., None], made, out)
        return out

    return joined


def _where(own: Tensor, made: Any, before: Any) -> Any:
    if isinstance(made, Tensor):
        return torch.where(own, made, before)
    return tuple(torch.where(own, m, b) for m, b in zip(made, before, strict=True))
