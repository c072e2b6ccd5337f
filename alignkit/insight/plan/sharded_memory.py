"""The effect of several processes on the memory of one: buckets of gradients, or sharded weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from alignkit.config import RunConfig
from alignkit.models.sharding import blocks_of
from alignkit.models.values import ActorCritic

# gathered on each rank while a pass is in a block: this block, the next one, and its receive buffer
BLOCKS = 3

Phases = Mapping[str, Mapping[str, int]]


def per_rank(
    phases: Phases, module: Any, scorers: Sequence[nn.Module], processes: int, config: RunConfig, whole: bool
) -> dict[str, dict[str, int]]:
    """Return the phases of one of several ranks, in bytes by part; phases: of a single process.

    scorers: reward models and judges. whole: the models are loaded as a whole before they are sharded.
    """
    if processes == 1:
        return {name: dict(parts) for name, parts in phases.items()}
    if (
        not config.fsdp
    ):  # DistributedDataParallel has buckets for all gradients, which the last micro-batch's gradients view
        buckets = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        with_buckets = {name: {**parts, "buckets": buckets} for name, parts in phases.items()}
        return {**with_buckets, "updating": dict(phases["updating"])}
    shards = {name: _shard(parts, processes // config.fsdp_replicas) for name, parts in phases.items()}
    shards["learning"]["gathered"] = _gathered(module)
    if "sampling" in shards:
        policy = module.policy if isinstance(module, ActorCritic) else module
        local = config.rollout.local is not None  # else a known prompt is scored, layer by layer
        sampling = sum(p.nbytes for p in policy.parameters()) if local else _gathered(policy)
        shards["sampling"]["gathered"] = max([sampling, *map(_gathered, scorers)])  # they score after it
    if not whole:  # a weight at a time is read: less than in any other phase
        return shards
    loading = {name: phases["learning"].get(name, 0) for name in ("program", "weights", "critic", "reference")}
    return {"loading": loading | {"reward models": shards["learning"].get("reward models", 0)}, **shards}


def _shard(parts: Mapping[str, int], processes: int) -> dict[str, int]:
    sharded = ("weights", "critic", "reference", "reward models", "gradients", "optimiser")
    return {name: -(-size // processes) if name in sharded else size for name, size in parts.items()}


def _gathered(module: Any) -> int:
    """Return the bytes of weights gathered at one time: weights outside all blocks stay gathered until a pass ends."""
    models = [module.policy, module.critic] if isinstance(module, ActorCritic) else [module]
    blocks = [sum(p.nbytes for p in block.parameters()) for model in models for block in blocks_of(model)]
    outside: int = sum(p.nbytes for p in module.parameters()) - sum(blocks)
    return outside + BLOCKS * max(blocks, default=0)
