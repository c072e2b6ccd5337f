"""Models that are sharded before their weights are read: each rank then reads its own parts of the files.

A model is built with its parameters on the meta device and its buffers in memory. Where its files cannot be read in
parts, it is loaded as a whole, and the reason is logged.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from alignkit.config import RunConfig

logger = logging.getLogger(__name__)

WHOLE = "each rank loads the whole model before it is sharded: %s"
FILES = "alignkit_files"  # attribute of an unread transformers model: its tensors -> file, and name there
_OF_PEFT = re.compile(r"\.(base_layer|original_module|modules_to_save\.default)(?=\.)")


def unread(name: str, auto: Any, about: Any, options: Mapping[str, Any], reason: str | None = None) -> nn.Module | None:
    """Return a model without its weights, which `read_parts` reads; None, with a line in the log, where it cannot.

    auto, about, options: transformers' class, the configuration, and what `from_config` takes. reason: why it cannot.
    """
    if reason is not None:
        logger.info(WHOLE, reason)
        return None
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model = auto.from_config(about, **options)
    model.tie_weights()  # `init_empty_weights` makes a weight of its own under each name
    files = _files(name)
    reason = "it is not in safetensors files" if files is None else _reason(model, files)
    if reason is not None:
        logger.info(WHOLE, reason)
        return None
    assert files is not None
    setattr(model, FILES, _by_all_names(model, files))
    if model.can_generate():  # `from_config` has only what config.json says
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(name)
    if (head := getattr(model, "score", None)) is not None and "score.weight" not in files:
        zero(head)  # as in `classifier_like`
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key in files:
                buffer.copy_(_part(files[key], key, None))
    logger.info("each rank reads its own parts of the weights")
    return model  # type: ignore[no-any-return]


def in_parts(config: RunConfig) -> bool:
    """Return whether each rank reads only its parts of a model, where its files allow it."""
    return config.fsdp and whole_because(config) is None


def whole_because(config: RunConfig) -> str | None:
    """Return which setting has each rank load the whole model, None where none does."""
    if config.trust_remote_code:
        return "its code is not known (trust_remote_code)"
    if config.lora and (config.lora.dora or config.lora.init != "default"):
        return "its adapter is computed from whole weights (lora.dora, lora.init)"
    return None


def has_only_matrices(adapter: Path) -> bool:
    """Return whether an adapter's file holds low-rank matrices alone: no biases, trained modules or embeddings."""
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return False
    with safe_open(file, framework="pt") as opened:
        return all("lora_" in key for key in list(opened.keys()))


def needs_whole(model: Any) -> str | None:
    """Return why an architecture cannot be read in parts, or None."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    kept = getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)
    if get_model_conversion_mapping(model, add_legacy=False):
        return f"transformers rearranges the weights of {type(model).__name__}"
    if kept and model.dtype != torch.float32:
        return f"{type(model).__name__} keeps some weights in 32 bits"
    return None


def is_unread(model: nn.Module) -> bool:
    """Return whether a model has weights that were not read yet."""
    return any(p.is_meta for p in model.parameters())


def zero(head: nn.Module) -> None:
    """Set the weight of a linear layer to 0, also where the layer was not read."""
    weight: Any = head.weight
    if weight.is_meta:
        head.weight = nn.Parameter(torch.zeros(weight.shape, dtype=weight.dtype))
    else:
        nn.init.zeros_(weight)


@contextmanager
def adapters_in_memory() -> Iterator[None]:
    """Inside, peft makes the adapters of an unread model in memory, with the random numbers of any other model.

    It would move them to the device of the weights that they adapt, which is none yet.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    move, to = BaseTunerLayer._move_adapter_to_device_of_base_layer, nn.Module.to

    def moved(layer: Any, name: str, device: Any = None) -> None:
        meta = any(p.is_meta for p in layer.get_base_layer().parameters())
        move(layer, name, torch.device("cpu") if meta else device)

    def kept(module: nn.Module, *args: Any, **options: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **options)
        if device is None or device.type != "meta":
            return to(module, *args, **options)
        return module if dtype is None else to(module, dtype)

    with (
        patch.object(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", moved),
        patch.object(nn.Module, "to", kept),
    ):
        yield


@torch.no_grad()
def read_parts(root: nn.Module, lm: Any, device: torch.device) -> None:
    """Read this rank's parts of the weights that a sharded module lacks, a weight at a time.

    root: the sharded module around the transformers model `lm`.
    """
    files: dict[str, tuple[str, str]] = getattr(lm, FILES, {})
    names = dict[int, list[str]]()
    for name, p in lm.named_parameters(remove_duplicate=False):
        if p.is_meta:
            names.setdefault(id(p), []).append(name)
    root._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    for tied in names.values():
        parameter: Any = lm.get_parameter(tied[0])
        for other in tied[1:]:  # `_apply` makes a weight of its own under each name
            module, _, last = other.rpartition(".")
            setattr(lm.get_submodule(module), last, parameter)
        key = next(k for k in map(_plain, tied) if k in files)
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if own.numel():
            own.copy_(_part(*files[key], parameter))


def _plain(name: str) -> str:
    return _OF_PEFT.sub("", name)


def _part(file: str, key: str, parameter: Any) -> Tensor:
    """Read this rank's part of a tensor, or all of it; the file is opened anew, so that no page stays mapped."""
    with safe_open(file, framework="pt") as opened:
        if not isinstance(parameter, DTensor):
            return opened.get_tensor(key)  # type: ignore[no-any-return]
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        at = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        return opened.get_slice(key)[at]  # type: ignore[no-any-return]


def _files(name: str) -> dict[str, str] | None:
    """Return the file of each tensor of a folder or a hub name, None where it has no safetensors files."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    there = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if (one := cached_file(name, SAFE_WEIGHTS_NAME, **there)) is not None:
        with safe_open(one, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), one)
    if (index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **there)) is None:
        return None
    with open(index, encoding="utf-8") as opened:
        files = json.load(opened)["weight_map"]
    paths = {file: cached_file(name, file, **there) for file in sorted(set(files.values()))}
    return None if None in paths.values() else {key: str(paths[file]) for key, file in files.items()}


def _by_all_names(model: Any, files: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return file and name there for every tensor, also for the tied names that files leave out."""
    found = {key: (file, key) for key, file in files.items()}
    names = dict[int, list[str]]()
    for key, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(key)
    for tied in names.values():
        if held := next((key for key in tied if key in files), None):
            found |= {key: found[held] for key in tied if key not in files}
    return found


def _reason(model: Any, files: Mapping[str, str]) -> str | None:
    """Return why the files cannot be read in parts, or None."""
    if (reason := needs_whole(model)) is not None:
        return reason
    shapes = _shapes(files)
    names = dict[int, list[str]]()
    for key, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(key)
    for tied in names.values():
        found = next((key for key in tied if key in shapes), None)
        if found is None and tied != ["score.weight"]:
            return f"its files do not hold {tied[0]} under this name"
        if found is not None and shapes[found] != tuple(model.get_parameter(found).shape):
            return f"its files hold {found} with another shape"
    return None


def _shapes(files: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as opened:
            shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    return shapes
