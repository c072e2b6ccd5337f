"""Dropout: removed for a whole run, or set where a method trains with it."""

from __future__ import annotations

from torch import nn


def drop_dropout(model: nn.Module, probability: float = 0.0) -> None:
    """Set every dropout probability; 0 makes policy, reference and old policy compute the same function.

    Attributes are found by name too (residual_dropout, layerdrop, router_jitter_noise, ...): those that do not end in
    "dropout" are always set to 0.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = probability
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, probability if name.endswith("dropout") else 0.0)
