"""Methods on sampled completions without a critic: GRPO, RLOO and REINFORCE++."""

from alignkit import Method, hookimpl
from alignkit_grpo.grpo import GRPO
from alignkit_grpo.reinforce import Reinforce
from alignkit_grpo.rloo import RLOO

__all__ = ["GRPO", "RLOO", "Reinforce", "register_methods"]


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "grpo", "rloo" and "reinforce"."""
    return [GRPO, RLOO, Reinforce]
