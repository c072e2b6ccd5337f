"""The weights and the optimiser of a checkpoint, as tensors and JSON values.

No pickle: a value that is not a tensor is a number, a text, or a list or dict of these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from alignkit.errors import CheckpointError
from alignkit.models.sharding import identity, local

# of frozen 4-bit weights, which are in the state dict without being parameters
_STATISTICS = re.compile(r"\.weight\.((nested_)?(absmax|quant_map)|quant_state\..+)$")
_WRAPPERS = re.compile(r"\b(?:module|_orig_mod|_checkpoint_wrapped_module)\.")


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained weights and the buffers, sharded where they are; every rank must call it.

    Tied weights are one tensor under several names.
    """
    options = StateDictOptions(cpu_offload=not _sharded(model), ignore_frozen_params=True)
    state: dict[str, Any] = dict(get_model_state_dict(model, options=options))
    first: dict[int, str] = {}
    for name, parameter in _parameters(model).items():
        if not parameter.requires_grad:  # torch leaves out only the first name of a frozen tied weight
            state.pop(name, None)
        elif name in state:
            state[name] = state[first.setdefault(id(parameter), name)]
    return {name: t for name, t in state.items() if not _STATISTICS.search(name)}


def set_model_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what `model_state` returned, sharded as the model is, or whole on every rank; every rank must call it.

    Raises CheckpointError naming a weight that is missing, unknown, of another shape, or not finite.
    """
    trained = {n: p for n, p in _parameters(model).items() if p.requires_grad}
    buffers = {_WRAPPERS.sub("", n): b for n, b in model.named_buffers(remove_duplicate=False)}
    there = {**_parameters(model), **buffers}
    if missing := sorted(trained.keys() - tensors.keys()):
        raise CheckpointError(f"it lacks {len(missing)} trained weights, such as '{missing[0]}'")
    if unknown := sorted(tensors.keys() - there.keys()):
        raise CheckpointError(f"it holds {len(unknown)} weights that the model does not have, such as '{unknown[0]}'")
    for name, t in tensors.items():
        if t.shape != there[name].shape:
            raise CheckpointError(f"'{name}' has shape {list(t.shape)}, but the model's has {list(there[name].shape)}")
    check_finite({name: tensors[name] for name in trained})
    options = StateDictOptions(full_state_dict=_whole(tensors), strict=False)
    set_model_state_dict(model, dict[str, Any](tensors), options=options)


def weight_like(model: nn.Module) -> Callable[[str, torch.Size], Tensor | None]:
    """Return what finds the weight that a tensor of `model_state` or `optimizer_state` belongs to."""
    own = _parameters(model)

    def find(name: str, shape: torch.Size) -> Tensor | None:
        weight = own.get(name) if name in own else own.get(name.removeprefix("optimizer/state/").rpartition("/")[0])
        return weight if weight is not None and weight.shape == shape else None

    return find


def _sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def _whole(tensors: Mapping[str, Tensor]) -> bool:
    return not any(isinstance(t, DTensor) for t in tensors.values())


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a number is not finite: such a state is never saved."""
    for name, t in tensors.items():
        if t.is_floating_point() and not bool(local(t).isfinite().all()):
            raise CheckpointError(f"'{name}' has numbers that are not finite")


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by their names without wrappers, tied ones under each name."""
    return {_WRAPPERS.sub("", n): p for n, p in model.named_parameters(remove_duplicate=False)}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Return the optimiser's state as (tensors, sharded as the weights are, JSON value); every rank must call it."""
    if not optimizer.state:
        # torch would create the missing state by a step on zero gradients, which sets AdamW's step count to 1
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return flatten_optimizer({"groups": groups})
    options = StateDictOptions(cpu_offload=not _sharded(model))
    return flatten_optimizer(get_optimizer_state_dict(model, optimizer, options=options))


def set_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], layout: Any
) -> None:
    """Load what `optimizer_state` returned into a new optimiser; every rank must call it, see `set_model_state`.

    Raises CheckpointError where the state belongs to other parameters.
    """
    check_finite(tensors)
    saved = unflatten_optimizer(tensors, layout)
    if "groups" in saved:
        for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
            group.update(values)
        return
    _check_shapes(model, saved["state"])
    options = StateDictOptions(full_state_dict=_whole(tensors), strict=False)
    set_optimizer_state_dict(model, optimizer, saved, options=options)
    names: dict[Tensor, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, set()).add(_WRAPPERS.sub("", name))
    stateful = {_WRAPPERS.sub("", name) for name in saved["state"]}
    for untouched in [p for p in optimizer.state if not names[p] & stateful]:
        # it never had a gradient; torch created its state by a step on zeros (see `optimizer_state`)
        del optimizer.state[untouched]
    if lost := stateful - {name for p in optimizer.state for name in names[p]}:
        raise CheckpointError(
            f"the checkpoint holds optimiser state of {len(lost)} parameters that are not trained here, such as "
            f"'{min(lost)}'. Resume with the settings that the run was started with"
        )


def _check_shapes(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a moment has another shape than its weight, which torch would load."""
    own = _parameters(model)
    for name, values in state.items():
        for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            t, weight = values.get(kind), own.get(_WRAPPERS.sub("", name))
            if isinstance(t, Tensor) and weight is not None and t.shape != weight.shape:
                raise CheckpointError(f"{kind} of '{name}' has shape {list(t.shape)}, not {list(weight.shape)}")


def flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Split a tree of dicts, lists, tuples, numbers, texts and tensors into (named tensors, JSON value).

    Raises CheckpointError on any other kind of value.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            while path in tensors:
                path += "+"
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"dict": [[walk(k, path), walk(v, f"{path}/{k}")] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [walk(v, f"{path}/{i}") for i, v in enumerate(value)]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise CheckpointError(
            f"optimiser state '{path}' is a {type(value).__name__}; a checkpoint holds plain values only"
        )

    return tensors, walk(dict(state), "optimizer")


def unflatten_optimizer(tensors: Mapping[str, Tensor], layout: Any) -> dict[str, Any]:
    """Rebuild exactly what `flatten_optimizer` split."""

    def walk(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        [(kind, inner)] = value.items()
        if kind == "tensor":
            return tensors[inner]
        if kind == "dict":
            return {walk(k): walk(v) for k, v in inner}
        return [walk(v) for v in inner] if kind == "list" else tuple(walk(v) for v in inner)

    result: dict[str, Any] = walk(layout)
    return result


def without_aliases(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Remove tensors that occurred before under another name (tied weights): (the rest, name -> that other name)."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, t in named.items():
        same = (identity(t), t.device, t.dtype, t.shape, t.stride()) if t.numel() else (name,)
        if seen.setdefault(same, name) == name:
            kept[name] = t
        else:
            aliases[name] = seen[same]
    return kept, aliases


def with_aliases(named: dict[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """Give the tensors their other names back."""
    return named | {name: named[first] for name, first in aliases.items()}


def packed(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, each with its own storage, as safetensors requires."""
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, t in named.items():
        t = t.detach().cpu().contiguous()
        storage = t.untyped_storage().data_ptr()
        result[name] = t.clone() if storage in storages else t
        storages.add(storage)
    return result
