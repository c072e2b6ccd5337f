"""FSDP2: the policy's weights, gradients and optimiser state sharded over the ranks (torch's `fully_shard`).

Called directly, not through Accelerate, which silently ignores it without a GPU; so the same code is tested with gloo.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from alignkit.errors import ConfigError
from alignkit.models.loading import causal_lm
from alignkit.models.scoring import Scorer
from alignkit.models.values import Valuer


def shard(scorer: Scorer | Valuer, device_type: str, world: int) -> None:
    """Shard the module in place, one group for each of its blocks, before the optimiser is created.

    Raises ConfigError with a single process.
    """
    if world == 1:
        raise ConfigError(
            "fsdp needs several processes, but there is one; start it with "
            "`torchrun --standalone --nproc_per_node=N -m alignkit run ...`"
        )
    mesh = init_device_mesh(device_type, (world,))
    for block in blocks_of(scorer):
        fully_shard(block, mesh=mesh)
    fully_shard(scorer, mesh=mesh)
    assert isinstance(scorer, FSDPModule)  # torch really sharded it


def blocks_of(scorer: Scorer | Valuer) -> list[nn.Module]:
    """Return the architecture's blocks, each of which is gathered and freed as a unit."""
    names = set(causal_lm(scorer.model)._no_split_modules or ())
    return [module for module in scorer.modules() if type(module).__name__ in names]
