"""The weights of a mixture of experts: all, those that a token passes, the router's, and adapters on experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from alignkit.config import RunConfig
from alignkit.models.adapters import add_lora
from alignkit.models.loading import causal_lm, from_pretrained
from alignkit.models.towers import in_towers


@dataclass(frozen=True)
class Experts:
    """Counts of single weights. per_layer: experts of a layer. per_token: those that a token is sent to.

    weights: of the model without adapters. active: of these, those that a token passes. adapters, on_experts: trained
    by LoRA, and of these on the experts.
    """

    per_layer: int
    per_token: int
    weights: int
    active: int
    experts: int
    router: int
    adapters: int
    on_experts: int


def experts_of(config: RunConfig) -> Experts | None:
    """Count the weights of the run's model from its configuration; None where it is no mixture of experts."""
    model = from_pretrained(config.model, config, weights=False)
    if config.lora and not hasattr(model, "peft_config"):
        model = add_lora(model, config.lora)
    return count(model)


def count(model: nn.Module) -> Experts | None:
    """Count the weights of a model; None where it is no mixture of experts."""
    about = causal_lm(model).config.get_text_config()
    per_layer = next((n for name in _NAMES if isinstance(n := getattr(about, name, None), int)), 0)
    per_token = getattr(about, "num_experts_per_tok", None)
    sizes = {"weights": 0, "experts": 0, "router": 0, "adapters": 0, "on_experts": 0}
    for path, p in model.named_parameters():
        parts = path.split(".")
        if "lora_" in path:
            sizes["adapters"] += p.numel()
            sizes["on_experts"] += p.numel() * ("experts" in parts)
            continue
        sizes["weights"] += p.numel()
        sizes["experts"] += p.numel() * ("experts" in parts)
        of_router = bool({"gate", "router"} & set(parts)) and "experts" not in parts and p.shape[0] == per_layer
        sizes["router"] += p.numel() * of_router
    if not per_layer or not isinstance(per_token, int) or not sizes["experts"]:
        return None
    outside = in_towers(causal_lm(model))
    towers = {id(p): p.numel() for m in causal_lm(model).modules() if id(m) in outside for p in m.parameters()}
    rest = sizes["weights"] - sizes["experts"] - sum(towers.values())
    active = rest + sizes["experts"] * per_token // per_layer
    return Experts(per_layer, per_token, active=active, **sizes)


_NAMES = ("num_local_experts", "num_experts", "n_routed_experts")  # of their number, by architecture


@contextmanager
def products_without_values() -> Iterator[None]:
    """Let transformers multiply all experts of a layer in one operation that also knows the shapes of fake tensors.

    torch 2.13 describes its own grouped product for bfloat16 only.
    """
    from transformers.integrations import moe

    module: Any = moe
    before = module._can_use_grouped_mm
    module._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        module._can_use_grouped_mm = before
