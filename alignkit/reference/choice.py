"""The choice of the reference's form for a run, and checks that its method can use that form."""

from __future__ import annotations

from typing import Any

import torch

from alignkit.config import ReferenceMode, RunConfig
from alignkit.errors import ConfigError
from alignkit.method import Method


def check_reference(config: RunConfig, method: Method[Any]) -> None:
    """Raise ConfigError where the method cannot use the configured form of the reference; loads nothing."""
    _check_dropout(config, method)
    if "reference" not in method.roles():
        return
    need, mode = method.reference_need(), config.reference
    if need == "moving" and config.lora:
        # averaging the factors of two adapters does not average their weights
        raise ConfigError(f"'{method.name}' moves its reference, which needs all weights: remove lora")
    if need == "moving" and mode not in ("auto", "full"):
        raise ConfigError(f"'{method.name}' moves its reference, which needs reference: full, got {mode}")
    if mode == "adapter-off" and config.lora is None:
        raise ConfigError("reference: adapter-off needs new adapters; add `lora`, or use reference: auto")
    if mode == "adapter-off" and config.lora and config.lora.bias != "none":
        raise ConfigError(
            f"lora.bias: {config.lora.bias} trains biases of the base, which stay when the adapters are switched off; "
            "use reference: auto, or lora.bias: none"
        )
    if mode == "int8" and config.quantize:
        raise ConfigError("reference: int8 would round 4-bit weights again; use reference: auto, which needs no memory")
    if mode == "int8" and config.fsdp:
        raise ConfigError("reference: int8 would be whole on each rank; use reference: full, which fsdp shards")
    if mode == "cached" and need != "rows":
        raise ConfigError(
            f"'{method.name}' cannot use reference: cached, because it scores rows that are created during the run; "
            f"use reference: auto, full or int8"
        )
    if mode == "cached" and config.streaming:
        raise ConfigError(
            "reference: cached scores all rows before the first step, but streaming does not hold them; use reference: "
            "auto, full or int8"
        )
    if mode == "cached" and not config.reference_cache:
        raise ConfigError("reference: cached needs reference_cache: true")


def _check_dropout(config: RunConfig, method: Method[Any]) -> None:
    given = {"lora.dropout": config.lora.dropout if config.lora else None, "neftune_alpha": config.neftune_alpha}
    name = next((name for name, value in given.items() if value), None)
    if name and not method.allows_dropout():
        other = "the policy that sampled" if method.data == "prompts" else "the reference"
        raise ConfigError(
            f"{name} is {given[name]}, but '{method.name}' compares the policy with {other}, and "
            f"{'noise' if name == 'neftune_alpha' else 'dropout'} would make them different functions: remove it"
        )


def resolve_reference(
    config: RunConfig, method: Method[Any], device: torch.device, n_bytes: int
) -> ReferenceMode | None:
    """Return the reference's form, None where the method has no reference; call `check_reference` first.

    n_bytes: memory of a second copy of the policy.
    """
    if "reference" not in method.roles():
        return None
    if config.reference != "auto":
        return config.reference
    need = method.reference_need()
    if need == "moving":
        return "full"
    if config.lora is not None and config.lora.bias == "none":
        return "adapter-off"
    if need == "rows" and config.caches_reference:
        return "cached"
    if device.type == "cuda" and not config.fsdp and torch.cuda.mem_get_info(device)[0] < 3 * n_bytes:
        return "int8"
    return "full"
