"""Direct Preference Optimization.

dpo.py is the method, losses.py has its losses of a pair, ratios.py what its variants do to the log-ratios.
"""

from alignkit import Method, hookimpl
from alignkit_dpo.dpo import DPO

__all__ = ["DPO", "register_methods"]


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "dpo"."""
    return [DPO]
