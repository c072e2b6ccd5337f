"""Methods on single answers that are good or bad: KTO and BCO.

kto.py and bco.py are the methods, labels.py is what they share.
"""

from alignkit import Method, hookimpl
from alignkit_kto.bco import BCO
from alignkit_kto.kto import KTO, MAX_WEIGHT, mismatched, weights

__all__ = ["BCO", "KTO", "MAX_WEIGHT", "mismatched", "register_methods", "weights"]


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "kto" and "bco"."""
    return [KTO, BCO]
