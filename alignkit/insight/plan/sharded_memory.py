"""The effect of several processes on the memory of one: buckets of gradients, or sharded weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from alignkit.config import RunConfig
from alignkit.models.sharding import blocks_of, casts
from alignkit.models.values import ActorCritic, ValueHead

# gathered on each rank while a pass is in a block: this block, the next one, and its receive buffer
BLOCKS = 3

Phases = Mapping[str, Mapping[str, int]]


def per_rank(
    phases: Phases,
    module: Any,
    scorers: Sequence[nn.Module],
    processes: int,
    config: RunConfig,
    whole: bool,
    mixed: str | None,
) -> dict[str, dict[str, int]]:
    """Return the phases of one of several ranks, in bytes by part; phases: of a single process.

    scorers: reward models and judges. whole: the models are loaded as a whole before they are sharded. mixed: the
    type of device where products are in bfloat16.
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
    shards["learning"]["gathered"] = _gathered(module, mixed)
    if "sampling" in shards:
        policy = module.policy if isinstance(module, ActorCritic) else module
        local = config.rollout.local is not None  # else a known prompt is scored, layer by layer
        sampling = _gathered(policy, mixed, whole=local)
        shards["sampling"]["gathered"] = max([sampling, *map(_gathered, scorers)])  # they score after it
    if not whole:  # a weight at a time is read: less than in any other phase
        return shards
    loading = {name: phases["learning"].get(name, 0) for name in ("program", "weights", "critic", "reference")}
    return {"loading": loading | {"reward models": shards["learning"].get("reward models", 0)}, **shards}


def _shard(parts: Mapping[str, int], processes: int) -> dict[str, int]:
    sharded = ("weights", "critic", "reference", "reward models", "gradients", "optimiser")
    return {name: -(-size // processes) if name in sharded else size for name, size in parts.items()}


def _gathered(module: Any, mixed: str | None = None, whole: bool = False) -> int:
    """Return the bytes of weights gathered at one time: weights outside all blocks stay gathered until a pass ends.

    mixed: see `per_rank`. whole: all blocks are, at once.
    """
    inside, sizes = 0, [0]
    for model in (m for m in models_of(module) if not isinstance(m, ValueHead)):
        in_16_bits = mixed is not None and casts(model, mixed)
        for block in blocks_of(model):
            inside += sum(p.nbytes for p in block.parameters())
            sizes.append(sum(2 * p.numel() if in_16_bits else p.nbytes for p in block.parameters()))
    outside: int = sum(p.nbytes for p in module.parameters()) - inside
    return outside + (sum(sizes) if whole else BLOCKS * max(sizes))


def models_of(module: Any) -> list[Any]:
    """Return policy and critic, or the one model."""
    return [module.policy, module.critic] if isinstance(module, ActorCritic) else [module]
