"""Models from their configurations alone: they compute shapes and take no memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from alignkit.config import RunConfig
from alignkit.errors import ModelError
from alignkit.models.adapters import Kind, add_lora
from alignkit.models.loading import causal_lm, from_pretrained, set_up
from alignkit.models.towers import in_towers

CPU = torch.device("cpu")


def unloaded(name: str | Path, config: RunConfig, mode: FakeTensorMode, kind: Kind = "causal") -> nn.Module:
    """Return the model of a folder or hub name as in a run, adapters included, without weights. Raises ModelError."""
    model = from_pretrained(str(name), config, kind, weights=False)
    if config.lora and hasattr(model, "peft_config"):
        raise ModelError("the model already has an adapter, which a run continues to train; leave out `lora`")
    if config.quantize and not (config.lora or hasattr(model, "peft_config")):
        raise ModelError("quantize freezes the weights: only adapters can be trained; add `lora`")
    if config.lora:
        model = add_lora(model, config.lora, kind)
    set_up(model, config, CPU)
    return as_fake(model, mode).train()


def as_fake(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replace a model's meta tensors by fake ones on a device, so that real indices work; shared ones stay shared."""
    fakes: dict[int, torch.Tensor] = {}

    def faked(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in fakes:
            fake: torch.Tensor = FakeTensor(mode, tensor.detach().to("meta"), CPU)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = fake
        return fakes[id(tensor)]

    keep = list(model.parameters()) + list(model.buffers())  # or an id might be reused
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in list(held.items()):
                if tensor is not None:
                    held[key] = faked(tensor)  # type: ignore[assignment]
    del keep
    return model


def n_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def resident(model: nn.Module, config: RunConfig) -> int:
    """Return the bytes of a model's weights and buffers as a run holds them: the frozen base may be in 4 bits."""
    return n_bytes(model) - (sum(map(_saved_by_4_bits, base_layers(model))) if config.quantize else 0)


def base_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the frozen linear layers that `quantize` keeps in 4 bits: all but the head and towers."""
    head = causal_lm(model).get_output_embeddings()
    ends = {id(p) for p in head.parameters()} if head is not None else set()
    outside = in_towers(causal_lm(model))
    linear = [m for m in causal_lm(model).modules() if isinstance(m, nn.Linear) and id(m) not in outside]
    return [m for m in linear if not m.weight.requires_grad and id(m.weight) not in ends]


def _saved_by_4_bits(layer: nn.Linear) -> int:
    blocks = -(-layer.weight.numel() // 64)
    # a byte for each block, a float for each 256 of these, and the tables to read them with
    statistics = blocks + 4 * -(-blocks // 256) + 4 * (256 + 16)
    return layer.weight.nbytes - -(-layer.weight.numel() // 2) - statistics


def in_16_bits(block: nn.Module) -> None:
    """Replace a block's weights by others in bfloat16."""
    for module in block.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().to(torch.bfloat16), requires_grad=p.requires_grad))


def in_8_bits(model: nn.Module) -> int:
    """Return the bytes of a model as an 8-bit reference: one per weight of linear layers, except the head."""
    lm = causal_lm(model)
    head = lm.get_output_embeddings()
    linear = [m for m in lm.modules() if isinstance(m, nn.Linear) and m is not head]
    saved = sum(m.weight.nbytes - m.weight.numel() - 4 * m.out_features for m in linear)  # and a float per row
    return n_bytes(model) - saved
