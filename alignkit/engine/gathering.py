"""The weights of a sharded model on the main rank, in a file instead of in memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from alignkit.errors import CheckpointError
from alignkit.models.loading import causal_lm
from alignkit.models.ranks import Ranks
from alignkit.models.sharding import whole
from alignkit.runs.space import ROOM, saving

_ALIGNED = 64  # bytes


def gathered_weights(model: nn.Module, folder: Path, ranks: Ranks, then: str, ends: bool = True) -> dict[str, Tensor]:
    """Return the whole weights that saving a sharded model needs, on the main rank; every rank must call it.

    They are gathered a tensor at a time into a mapped file in `folder`, which has no name and goes with them: the
    memory of a rank holds one whole tensor. Of a model with adapters, frozen weights are left out, but not those at its
    ends (embeddings, head), which peft may save, unless `ends` is False. Others get {}.
    Raises CheckpointError on all ranks where the disk is full. then: what to type then, see `saving`.
    """
    left_out = _frozen(model, ends)
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in left_out}
    unique = {id(t): t for t in state.values()}  # tied weights are one
    needed = sum(t.numel() * t.element_size() for t in unique.values()) + ROOM

    def room() -> list[Tensor]:
        if not ranks.is_main:
            return []
        with saving("the model", folder, needed, then):
            return _mapped(unique.values(), folder / f".weights-{os.getpid()}")

    places = ranks.together(room, CheckpointError)
    made: dict[int, Tensor] = {}
    for i, (key, t) in enumerate(unique.items()):
        gathered = whole(t.detach())
        if ranks.is_main:
            made[key] = places[i].copy_(gathered)
    return {name: made[id(t)] for name, t in state.items()} if ranks.is_main else {}


def _frozen(model: nn.Module, ends: bool) -> set[str]:
    """Return the names of weights that an adapter's file does not hold. ends: it may hold embeddings and the head."""
    if not hasattr(model, "peft_config"):
        return set()
    lm = causal_lm(model)
    outer = [m for m in (lm.get_input_embeddings(), lm.get_output_embeddings()) if m is not None and ends]
    kept = {id(p) for m in outer for p in m.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {n for n, p in named if not p.requires_grad and id(p) not in kept}


def _mapped(tensors: Iterable[Tensor], path: Path) -> list[Tensor]:
    """Return empty tensors of these shapes that lie in a new file, which is removed from its folder at once."""
    shapes = [(t.shape, t.dtype, t.element_size()) for t in tensors]
    sizes = [-(-shape.numel() * each // _ALIGNED) * _ALIGNED for shape, _, each in shapes]
    try:
        with path.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, max(sum(sizes), 1))  # a full disk would kill the process at a write
            mapped = mmap.mmap(file.fileno(), max(sum(sizes), 1))
    finally:
        path.unlink(missing_ok=True)
    made, at = [], 0
    for (shape, dtype, _), size in zip(shapes, sizes, strict=True):
        # a storage each: transformers copies tensors that share one into memory
        there = (
            torch.frombuffer(mapped, dtype=dtype, count=shape.numel(), offset=at)
            if size
            else torch.empty(0, dtype=dtype)
        )
        made.append(there.view(shape))
        at += size
    return made
