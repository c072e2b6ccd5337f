"""The policy's weights as a folder that a server can read: written whole or absent, adapters alone or merged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from alignkit.errors import RolloutError
from alignkit.files import remove, share, sync
from alignkit.models.adapters import save_adapter
from alignkit.models.loading import causal_lm
from alignkit.models.quantised import is_4bit, layers_4bit, merged_weight

Weights = dict[str, Tensor] | None


def publish(model: Any, folder: Path, adapter: bool, weights: Weights = None) -> None:
    """Write the weights, or the adapter alone, as `folder`, under a temporary name first. Raises RolloutError.

    weights: those of a sharded model, whole; None: the model's own.
    """
    temporary = folder.with_name(f".{folder.name}")
    try:
        remove(temporary)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if adapter:
            save_adapter(model, temporary, weights)
        else:
            _save_whole(model, temporary, weights)
        share(temporary)
        sync(temporary)
        remove(folder)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:  # the writer of safetensors has an error of its own for a full disk
        remove(temporary)
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise RolloutError(
            f"the weights for the servers cannot be written to {folder}: {why}; free some space, "
            "or set rollout.sync_folder to a folder with room that the servers see too"
        ) from error
    except BaseException:
        remove(temporary)
        raise


def why_no_adapter(model: Any) -> str | None:
    """Return why a server cannot load the model's adapter alone, None where it can."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return "the run has no adapter"
    if layers_4bit(model):
        return "the base has 4-bit weights, which the server's has not"
    config = configs[model.active_adapter]
    if config.use_dora:
        return "vLLM does not serve DoRA"
    if config.modules_to_save:
        return "modules are trained in full (modules_to_save)"
    if config.bias != "none":
        return "biases are trained"
    if config.target_parameters:
        return "adapters on parameters (target_parameters) are not served"
    return None


def _save_whole(model: Any, folder: Path, weights: Weights) -> None:
    lm = causal_lm(model)
    if model is lm and not layers_4bit(model):
        model.save_pretrained(folder, state_dict=weights)
        return
    if weights is not None:
        raise RolloutError(
            "adapters of a sharded policy are not merged for the servers; let these load adapters at run time "
            "(start them with `alignkit serve`), or remove fsdp"
        )
    whole = {name: value.contiguous() for name, value in merged_state(model, lm)}
    if not layers_4bit(model):
        lm.save_pretrained(folder, state_dict=whole)
        return
    folder.mkdir()  # transformers would save a quantised model
    tied = {name for name in getattr(lm, "all_tied_weights_keys", None) or {} if name in whole}
    save_file({k: v for k, v in whole.items() if k not in tied}, folder / "model.safetensors", {"format": "pt"})


def merged_state(model: Any, lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of the language model's weights with the adapters merged in, a layer at a time.

    The model itself is not changed: merging and taking it back would round the base. Raises RolloutError where an
    adapter cannot be merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    done: set[str] = set()
    for name, module in lm.named_modules():
        inside = any(name == top or name.startswith(f"{top}.") for top in done)
        if inside or not (isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) or is_4bit(module)):
            continue
        done.add(name)
        for key, value in _layer(name, module).items():
            yield f"{name}.{key}", value
    for key, value in lm.state_dict().items():
        if not any(key.startswith(f"{top}.") for top in done):
            yield key, value


def _layer(name: str, module: Any) -> dict[str, Tensor]:
    """Return the weights that a layer with adapters, or with 4-bit weights, has when they are merged."""
    if hasattr(module, "modules_to_save"):
        return dict(module.modules_to_save[module.active_adapters[0]].state_dict())
    base = getattr(module, "base_layer", module)
    if is_4bit(base):
        bias = {} if base.bias is None else {"bias": base.bias.data}
        return {"weight": merged_weight(module), **bias}
    if getattr(module, "parameter_name", None) is not None:
        raise RolloutError(f"the adapter on {name} cannot be merged for the servers: it is on a parameter, not a layer")
    with torch.no_grad():
        merged = copy.deepcopy(module)
        merged.merge()
        return dict(merged.get_base_layer().state_dict())
