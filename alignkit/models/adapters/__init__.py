"""Low-rank adapters (peft).

lora.py      adding them, and the model as it was before they were trained
experts.py   what they adapt, and the fused experts that they do not
"""

from alignkit.models.adapters.experts import adapted, fused, own_linears, summary
from alignkit.models.adapters.lora import (
    Kind,
    add_lora,
    before_training,
    check_mergeable,
    has_start,
    save_adapter,
    set_adapter_dropout,
)

__all__ = [
    "Kind", "adapted", "add_lora", "before_training", "check_mergeable", "fused", "has_start", "own_linears",
    "save_adapter", "set_adapter_dropout", "summary",
]  # fmt: skip
