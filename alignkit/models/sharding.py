"""FSDP2: the policy's weights, gradients and optimiser state spread over the ranks (torch's `fully_shard`).

Called directly rather than through Accelerate, which passes over it in silence where there is no GPU; so the same code
runs, and is tested, under gloo.
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
    """Shard the module in place, a group for each of the architecture's blocks; before the optimiser is made.

    Raises ConfigError with a single process.
    """
    if world == 1:
        raise ConfigError(
            "fsdp shards over several processes, and this is one; start it by "
            "`torchrun --standalone --nproc_per_node=N -m alignkit run ...`"
        )
    mesh = init_device_mesh(device_type, (world,))
    for block in blocks_of(scorer):
        fully_shard(block, mesh=mesh)
    fully_shard(scorer, mesh=mesh)
    assert isinstance(scorer, FSDPModule)  # what was asked for was really set up


def blocks_of(scorer: Scorer | Valuer) -> list[nn.Module]:
    """Return the architecture's blocks, each of which is gathered and let go as one."""
    names = set(causal_lm(scorer.model)._no_split_modules or ())
    return [module for module in scorer.modules() if type(module).__name__ in names]
