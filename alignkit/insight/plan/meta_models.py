"""Models that are known by their configurations alone: they compute shapes, and take no memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from alignkit.config import RunConfig
from alignkit.errors import ModelError
from alignkit.models.loading import Kind, add_lora, causal_lm, from_pretrained, set_up

CPU = torch.device("cpu")


def unloaded(name: str | Path, config: RunConfig, mode: FakeTensorMode, kind: Kind = "causal") -> nn.Module:
    """Return the model of a folder or hub name as a run would have it, adapters included. Raises ModelError."""
    model = from_pretrained(str(name), config, kind, weights=False)
    if config.lora and hasattr(model, "peft_config"):
        raise ModelError("the model already carries an adapter: it is trained on; leave out `lora`")
    if config.lora:
        model = add_lora(model, config.lora, kind)
    set_up(model, config, CPU)
    return on_paper(model, mode).train()


def on_paper(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Give the meta tensors of a model a device, so that they meet real indices; what is shared stays shared."""
    made: dict[int, torch.Tensor] = {}

    def faked(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            fake: torch.Tensor = FakeTensor(mode, tensor.detach().to("meta"), CPU)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            made[id(tensor)] = fake
        return made[id(tensor)]

    keep = list(model.parameters()) + list(model.buffers())  # or an id might be given twice
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in list(held.items()):
                if tensor is not None:
                    held[key] = faked(tensor)  # type: ignore[assignment]
    del keep
    return model


def n_bytes(model: nn.Module) -> int:
    """Return the memory of its weights and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def in_8_bits(model: nn.Module) -> int:
    """Return the memory of its weights as an 8-bit reference: linear layers but the head at a byte a weight."""
    lm = causal_lm(model)
    head = lm.get_output_embeddings()
    linear = [m for m in lm.modules() if isinstance(m, nn.Linear) and m is not head]
    saved = sum(m.weight.nbytes - m.weight.numel() - 4 * m.out_features for m in linear)  # and a float a row
    return n_bytes(model) - saved
