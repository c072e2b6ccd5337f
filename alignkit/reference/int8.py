"""An 8-bit reference: LLM.int8 by bitsandbytes, in memory, with the outlier threshold at 0.

The threshold is not a matter of taste. With bitsandbytes' default of 6, outlier columns are found over the whole batch,
so the values of a sequence depend on the other sequences of its batch, and a cache of such values would be wrong. At 0
every token is quantised by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from alignkit.errors import ModelError
from alignkit.models.quantised import bitsandbytes


def to_int8(model: nn.Module) -> nn.Module:
    """Convert every linear layer but the output embeddings to 8 bit, in place; return it frozen, in evaluation mode.

    Needs about 1/4 of float32's memory for those layers. GPT-2's Conv1D layers are converted too. Convert a model on
    the device where it is to run: bitsandbytes loses a layer's scales when a model that has run is moved.
    Raises ConfigError without bitsandbytes, ModelError where there is nothing to convert.
    """
    bnb = bitsandbytes("an int8 reference")
    find_output: Any = getattr(model, "get_output_embeddings", lambda: None)
    output = find_output()
    chosen = [(n, m) for n, m in model.named_modules() if _is_linear(m) and m is not output]
    if not any(n for n, _ in chosen):
        raise ModelError(
            f"{type(model).__name__} has no linear layer to convert to 8 bit (is it quantised already?). "
            f"Choose another reference: full, cached or adapter-off"
        )
    for name, linear in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _int8(linear, bnb))
    # A Linear8bitLt in training mode silently takes another path.
    return model.eval().requires_grad_(False)


def _is_linear(module: nn.Module) -> bool:
    # By exact type: a subclass may do more than a linear layer, or be quantised already.
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _int8(linear: Any, bnb: Any) -> nn.Module:
    weight = linear.weight.detach()
    if not isinstance(linear, nn.Linear):
        weight = weight.t()  # Conv1D keeps [in, out]
    device = weight.device
    with torch.device("meta"):  # its own weight is replaced at once
        layer = bnb.nn.Linear8bitLt(
            weight.shape[1], weight.shape[0], bias=linear.bias is not None, has_fp16_weights=False, threshold=0.0
        )
    # The move to the device is what quantises, and only from the CPU.
    layer.weight = bnb.nn.Int8Params(weight.cpu().contiguous(), requires_grad=False, has_fp16_weights=False).to(device)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    result: nn.Module = layer
    return result
