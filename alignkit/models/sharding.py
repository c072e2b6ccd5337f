"""FSDP2: weights, gradients and optimiser state sharded over the ranks (torch's `fully_shard`).

Called directly, not through Accelerate, which silently ignores it without a GPU; so the same code is tested with gloo.
Policy, critic, frozen reference and reward models are sharded each on its own; between passes all weights are sharded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from alignkit.errors import ConfigError
from alignkit.models.loading import causal_lm
from alignkit.models.scoring import Scorer
from alignkit.models.unread import is_unread, read_parts
from alignkit.models.values import ActorCritic, Grader, ValueHead, Valuer

Sharded = Scorer | Valuer | ValueHead | Grader


def mesh_of(device_type: str, world: int, replicas: int) -> DeviceMesh:
    """Return the mesh of the ranks: [world], or [replicas, world / replicas] with several replicas (HSDP).

    Raises ConfigError with a single process, or where the replicas do not divide the ranks into groups of two or more.
    """
    if world == 1:
        raise ConfigError(
            "fsdp needs several processes, but there is one; start it with "
            "`torchrun --standalone --nproc_per_node=N -m alignkit run ...`"
        )
    check_replicas(world, replicas)
    if replicas == 1:
        return init_device_mesh(device_type, (world,))
    return init_device_mesh(device_type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def check_replicas(world: int, replicas: int) -> None:
    """Raise ConfigError where the replicas do not divide the ranks into groups of two or more."""
    if world % replicas or world == replicas:
        raise ConfigError(
            f"fsdp_replicas: {replicas} does not divide {world} processes into equal groups of two or more; "
            "give the number of nodes"
        )


def shard(module: Sharded | ActorCritic, mesh: DeviceMesh, mixed: torch.dtype | None = None) -> None:
    """Shard the module in place, one group for each of its blocks, before the optimiser is created.

    mixed: the data type of matrix products, in which the weights of blocks are gathered then, see `casts`. What is
    outside of blocks (embeddings, the last norm, heads) is gathered as it is: a score of bfloat16 would be too coarse.
    Gradients are reduced in float32.
    """
    if isinstance(module, ActorCritic):
        shard(module.policy, mesh, mixed)
        shard(module.critic, mesh, mixed)
        return
    blocks = blocks_of(module)
    _check_types([*blocks, module])
    outer = MixedPrecisionPolicy(reduce_dtype=torch.float32 if mixed else None, cast_forward_inputs=False)
    inner = replace(outer, param_dtype=mixed) if mixed and casts(module, mesh.device_type) else outer
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=inner)
    fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=outer)
    assert isinstance(module, FSDPModule)  # torch really sharded it


def casts(module: nn.Module, device_type: str) -> bool:
    """Return whether the weights of blocks may be gathered in the data type of products.

    That is half of the traffic, and autocast keeps no copies of them until the backward. Only blocks of linear layers
    and norms: routers, state spaces and what an architecture keeps in 32 bits lose too much. On a CPU, torch cannot
    normalise float32 by the bfloat16 weights of nn.LayerNorm.
    """
    lm: Any = causal_lm(module.model)  # type: ignore[arg-type]
    if getattr(lm, "_keep_in_fp32_modules", None) or getattr(lm, "_keep_in_fp32_modules_strict", None):
        return False
    holders = [m for b in blocks_of(module) for m in b.modules() if next(m.parameters(recurse=False), None) is not None]
    norms = [m for m in holders if type(m).__name__.endswith("Norm")]
    return all(type(m) is nn.Linear or m in norms for m in holders) and not (
        device_type == "cpu" and any(isinstance(m, nn.LayerNorm) for m in norms)
    )


def _check_types(units: Sequence[nn.Module]) -> None:
    """Raise ConfigError where a unit trains weights of two data types. units: the whole module is the last one."""
    inside: set[int] = set()
    for unit in units:
        own = [p for p in unit.parameters() if id(p) not in inside]
        inside |= {id(p) for p in own}
        if len(kinds := {str(p.dtype).removeprefix("torch.") for p in own if p.requires_grad}) > 1:
            raise ConfigError(
                f"fsdp shards trained weights of one data type, and these are {' and '.join(sorted(kinds))} (adapters "
                "are float32, trained biases and modules of the model's dtype): use dtype: float32"
            )


def ready(module: Sharded | ActorCritic, device: torch.device) -> None:
    """Read the weights that a sharded module lacks, and prepare it for passes, also of its parts alone."""
    for root in _roots(module):
        if is_unread(root):
            read_parts(root, causal_lm(root.model), device)
        root._get_fsdp_state()._lazy_init()  # else torch takes a block that is called first for the whole


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the architecture's blocks, each of which is gathered and freed as a unit."""
    model = getattr(module, "model", None)
    names = set(causal_lm(model)._no_split_modules or ()) if model is not None else set()
    return [part for part in module.modules() if type(part).__name__ in names]


@contextmanager
def gathered(*modules: nn.Module, blocks: bool = True) -> Iterator[None]:
    """Inside, each rank holds all weights of these modules, and passes wait for no other rank; all ranks must enter.

    blocks: False gathers only what is outside the blocks, for passes of a part of the module, which all ranks make.
    Without effect on modules that are not sharded.
    """
    roots = [root for module in modules for root in _roots(module)]
    units: list[Any] = [
        u for root in roots for u in (root.modules() if blocks else [root]) if isinstance(u, FSDPModule)
    ]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)
        settle(*modules)


def settle(*modules: nn.Module) -> None:
    """Forget the passes without a gradient: torch lists all since the last backward, to prefetch in that order."""
    for root in (root for module in modules for root in _roots(module)):
        if hasattr(root, "reset_iter_state"):  # torch 2.13
            root.reset_iter_state()


def _roots(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, Sharded) and isinstance(m, FSDPModule)]


def is_sharded(module: nn.Module) -> bool:
    """Return whether the module's weights are sharded."""
    return bool(_roots(module))


def whole(t: Tensor) -> Tensor:
    """Return a tensor, gathered where it is sharded; all ranks must call it."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def identity(t: Tensor) -> int:
    """Return a number that tied weights share, also those of which this rank has no part."""
    return id(t) if isinstance(t, DTensor) else t.data_ptr()


def local(t: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in the same memory."""
    return t.to_local() if isinstance(t, DTensor) else t


@torch.no_grad()
def load_part(own: Tensor, values: Tensor) -> None:
    """Copy this rank's part of values, sharded in the same way or whole on every rank, into `own`."""
    if isinstance(own, DTensor) and not isinstance(values, DTensor):
        values = distribute_tensor(values.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    local(own).copy_(local(values))
