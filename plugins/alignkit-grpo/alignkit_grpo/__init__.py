"""Methods that compare the completions of one prompt with each other, without a critic: GRPO and RLOO."""

from alignkit import Method, hookimpl
from alignkit_grpo.grpo import GRPO
from alignkit_grpo.rloo import RLOO

__all__ = ["GRPO", "RLOO", "register_methods"]


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "grpo" and "rloo"."""
    return [GRPO, RLOO]
