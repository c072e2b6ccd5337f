"""A frozen base in 4 bits (QLoRA, 2305.14314): NF4 with double quantisation by bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import ConfigError, ModelError

# what transformers and peft read to recognise such a model
_MARKS = ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer")


def bitsandbytes(purpose: str) -> Any:
    """Return the module. Raises ConfigError where it cannot be imported; purpose: what needs it, for the message."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs bitsandbytes, which cannot be imported: {error}. "
            "Install it: pip install 'alignkit[int8]', or leave that setting out"
        ) from error
    return bitsandbytes


def nf4(compute_dtype: torch.dtype, without: Sequence[str] = ()) -> Any:
    """Return transformers' settings that quantise linear layers, except the head, while a model is loaded.

    without: paths of more modules that stay as they are.
    """
    bitsandbytes("quantize: nf4")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        # a list takes the place of transformers' own, which has the head
        llm_int8_skip_modules=["lm_head", *without] if without else None,
    )


def is_4bit(module: nn.Module) -> bool:
    """Return whether a module has 4-bit weights itself."""
    return type(module._parameters.get("weight")).__name__ == "Params4bit"


def layers_4bit(model: nn.Module) -> dict[str, Any]:
    """Return the layers with 4-bit weights by name."""
    return {name: module for name, module in model.named_modules() if is_4bit(module)}


def settle(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Make each 4-bit layer compute the same in every mode, in `compute_dtype`.

    bitsandbytes would otherwise repack a layer in evaluation mode on a CPU with bfloat16 instructions: its products are
    then in bfloat16, and its later passes have no gradient. It would also round biases in the first pass.
    """
    for layer in layers_4bit(model).values():
        layer.support_avx512bf16_for_cpu = False
        layer.compute_dtype, layer.compute_type_is_set = compute_dtype, True
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(compute_dtype)


def check_frozen(model: nn.Module, asked: bool) -> None:
    """Raise ModelError where a 4-bit model has nothing to train, or `asked` for and not in 4 bits."""
    found = layers_4bit(model)
    if asked and not found:
        raise ModelError(
            f"quantize: nf4, but {type(model).__name__} has no 4-bit layer: a loaded model is trained as it is. "
            "Give its folder, or load it with BitsAndBytesConfig(load_in_4bit=True)"
        )
    if found and not hasattr(model, "peft_config"):
        raise ModelError(
            f"{type(model).__name__} has 4-bit weights, which are frozen: only adapters can be trained; add `lora`"
        )


def floating(model: nn.Module) -> torch.dtype:
    """Return the data type of the weights that are not quantised."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def weight(layer: Any) -> Tensor:
    """Return a 4-bit layer's weights in float32 [out, in]."""
    functional = bitsandbytes("a 4-bit model").functional
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()  # type: ignore[no-any-return]


def copy_marks(model: nn.Module, other: nn.Module) -> None:
    """Mark `other`, which has layers of the 4-bit `model`, as such a model."""
    for name in _MARKS:
        if hasattr(model, name):
            setattr(other, name, getattr(model, name))


def merged(model: Any) -> Any:
    """Merge the adapters, in place, and return a model of plain layers that computes the same as the 4-bit one did.

    The merged weights are not quantised again: that would round the update away.
    """
    dtype = floating(model.get_base_model())
    for name, wrapper in list(model.named_modules()):
        base = getattr(wrapper, "base_layer", None)
        if base is not None and is_4bit(base):
            _replace(model, name, base, merged_weight(wrapper), dtype)
    plain = model.merge_and_unload()  # what has adapters on weights that are not quantised
    for name, layer in layers_4bit(plain).items():
        _replace(plain, name, layer, weight(layer), dtype)
    for mark in _MARKS:
        if hasattr(plain, mark):
            setattr(plain, mark, None if mark in ("hf_quantizer", "quantization_method") else False)
    del plain.config.quantization_config
    return plain


def merged_weight(wrapper: Any) -> Tensor:
    """Return the weights [out, in] of a 4-bit layer, in float32, with the adapters around it, if there are any."""
    if not hasattr(wrapper, "base_layer"):
        return weight(wrapper)
    found = weight(wrapper.base_layer)
    for adapter in wrapper.active_adapters:
        if variant := wrapper.lora_variant.get(adapter):  # DoRA
            found = variant.merge_safe(wrapper, adapter, found)
        else:
            found = found + wrapper.get_delta_weight(adapter)
    return found.detach()


def _replace(model: nn.Module, name: str, layer: Any, values: Tensor, dtype: torch.dtype) -> None:
    from transformers.pytorch_utils import Conv1D

    n_out, n_in = values.shape
    transposed = getattr(layer, "source_cls", None) is Conv1D  # GPT-2's linear layers
    with torch.device("meta"):
        plain: Any = Conv1D(n_out, n_in) if transposed else nn.Linear(n_in, n_out, bias=layer.bias is not None)
    kept = values.t().contiguous() if transposed else values
    plain.weight = nn.Parameter(kept.to(dtype), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, plain)
