"""The matrices that LoRA adapts, and those of fused experts that it does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from alignkit.errors import ModelError, nearest
from alignkit.models.towers import in_towers, trunk_of

Name = str
"""The last two parts of a parameter's path, such as "experts.gate_up_proj"."""


def own_linears(model: nn.Module) -> list[str]:
    """Return the linear modules that return more than their product, such as a router: LoRA cannot wrap them."""
    lm = _inside(model)
    own = {type(lm).__module__, type(trunk_of(lm)).__module__}
    return sorted(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and type(m).__module__ in own)


def fused(model: nn.Module) -> dict[Name, int]:
    """Return the matrices that hold all experts of a layer in one parameter: how many weights each has in all."""
    found: dict[Name, int] = {}
    outside = in_towers(_inside(model))
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) or id(module) in outside:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and "lora_" not in path:
                short = _short(f"{path}.{name}")
                found[short] = found.get(short, 0) + parameter.numel()
    return found


def adapted(model: nn.Module) -> dict[Name, int]:
    """Return what LoRA adapts, modules and single parameters, and the trained weights of each in all."""
    found: dict[Name, int] = {}
    for path, module in _adapters(model):
        parameter = getattr(module, "parameter_name", None)
        short = _short(path if parameter is None else f"{path}.{parameter}")
        own = [p for n, m in module.named_children() if n.startswith("lora_") for p in m.parameters()]
        found[short] = found.get(short, 0) + sum(p.numel() for p in own)
    return found


def check_parameters(model: nn.Module, wanted: Sequence[str]) -> None:
    """Raise ModelError where no adapter is on a parameter that was asked for; peft only warns."""
    there = adapted(model)
    for name in wanted:
        if not any(_short(name) == known or known.endswith(f".{name}") for known in there):
            known = ", ".join(fused(model)) or "none"
            raise ModelError(
                f"lora.target_parameters: no parameter is called '{name}'.{nearest(name, fused(model))} "
                f"The fused matrices of this model: {known}"
            )


def summary(model: nn.Module) -> str:
    """Return what LoRA adapts in one line, at which scale, and which fused experts it does not, with what to set."""
    there = adapted(model)
    line = f"LoRA adapts {', '.join(there)} ({sum(there.values()):,} trained weights; {_scales(model)})"
    left = {name: n for name, n in fused(model).items() if name not in there}
    if not left:
        return line
    share = sum(left.values()) / sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    return (
        f"{line}; the fused experts {', '.join(left)} are not adapted ({share:.0%} of all weights): to adapt them too, "
        f"set lora.target_parameters to [{', '.join(left)}]"
    )


def _scales(model: nn.Module) -> str:
    """Return rank, alpha and scale of the adapters, those of most modules first."""
    adapters: list[Any] = [module for _, module in _adapters(model)]
    found = Counter((a.r[name], a.lora_alpha[name], a.scaling[name]) for a in adapters for name in a.r)
    shown = [f"r {r}, alpha {alpha:g}, scale {scale:.3g}" for (r, alpha, scale), _ in found.most_common(3)]
    return "; ".join([*shown, "..."] if len(found) > len(shown) else shown)


def _adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            yield path, module


def _short(path: str) -> Name:
    # peft nests the wrappers of several parameters of one module
    return ".".join([p for p in path.split(".") if p != "base_layer"][-2:])


def _inside(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[no-any-return]
