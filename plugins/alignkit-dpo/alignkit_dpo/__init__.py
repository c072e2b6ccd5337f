"""Direct Preference Optimization: from pairs, and from the policy's own completions.

dpo.py and online.py are the methods, losses.py has their losses of a pair, ratios.py what DPO's variants do to the
log-ratios.
"""

from alignkit import Method, hookimpl
from alignkit_dpo.dpo import DPO
from alignkit_dpo.online import OnlineDPO

__all__ = ["DPO", "OnlineDPO", "register_methods"]


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "dpo" and "online_dpo"."""
    return [DPO, OnlineDPO]
