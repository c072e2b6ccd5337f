"""What several processes change in the memory of one: room for gradients that travel, or weights that are spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.models.sharding import blocks_of

# whole on each rank while a pass is in a block: this one, the next one, and the buffer that it comes in
BLOCKS = 3

Phases = Mapping[str, Mapping[str, int]]


def spread(phases: Phases, module: Any, processes: int, fsdp: bool) -> dict[str, dict[str, int]]:
    """Return the phases of one of several ranks, in bytes by part; phases: of one process that holds everything."""
    if processes == 1:
        return {name: dict(parts) for name, parts in phases.items()}
    if not fsdp:  # DistributedDataParallel keeps room for all gradients, and the last part's come to lie in it
        buckets = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        others = {name: {**parts, "buckets": buckets} for name, parts in phases.items()}
        return {**others, "updating": dict(phases["updating"])}
    divided = {name: _divided(parts, processes) for name, parts in phases.items()}
    divided["learning"]["gathered"] = _gathered(module)
    whole = {name: phases["learning"].get(name, 0) for name in ("program", "weights", "reference")}
    return {"loading": whole, **divided}


def _divided(parts: Mapping[str, int], processes: int) -> dict[str, int]:
    spread_out = ("weights", "gradients", "optimiser")
    return {name: -(-size // processes) if name in spread_out else size for name, size in parts.items()}


def _gathered(module: Any) -> int:
    """Return the bytes of weights that are whole at one time: those outside of all blocks stay so until a pass ends."""
    blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks_of(module)]
    outside: int = sum(p.nbytes for p in module.parameters()) - sum(blocks)
    return outside + BLOCKS * max(blocks, default=0)
