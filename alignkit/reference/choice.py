"""Which form of the reference a run takes, and which forms cannot serve its method."""

from __future__ import annotations

from typing import Any

import torch

from alignkit.config import ReferenceMode, RunConfig
from alignkit.errors import ConfigError
from alignkit.method import Method


def check_reference(config: RunConfig, method: Method[Any]) -> None:
    """Raise ConfigError where the form of the reference that was asked for cannot serve the method; loads nothing."""
    if "reference" not in method.roles():
        return
    need, mode = method.reference_need(), config.reference
    if need == "moving" and (config.fsdp or config.lora):
        # mixing two adapters factor by factor is not mixing the weights that they stand for
        raise ConfigError(f"'{method.name}' moves its reference, which needs all weights: leave out lora and fsdp")
    if need == "moving" and mode not in ("auto", "full"):
        raise ConfigError(f"'{method.name}' moves its reference, which needs reference: full; given: {mode}")
    if mode == "adapter-off" and config.lora is None:
        raise ConfigError("reference: adapter-off needs fresh adapters; add `lora`, or use reference: auto")
    if mode == "adapter-off" and not _switchable(config, method):
        raise ConfigError(f"reference: adapter-off cannot serve '{method.name}' under fsdp; use reference: full")
    if mode == "cached" and need != "rows":
        raise ConfigError(
            f"reference: cached cannot serve '{method.name}', which asks the reference about rows that are made "
            f"during the run; use reference: auto, full or int8"
        )
    if mode == "cached" and not config.reference_cache:
        raise ConfigError("reference: cached needs reference_cache: true")


def resolve_reference(
    config: RunConfig, method: Method[Any], device: torch.device, n_bytes: int
) -> ReferenceMode | None:
    """Decide the reference's form, None where the method has none; `check_reference` has passed.

    n_bytes: memory of a second copy of the policy.
    """
    if "reference" not in method.roles():
        return None
    if config.reference != "auto":
        return config.reference
    need = method.reference_need()
    if need == "moving":
        return "full"
    if _switchable(config, method):
        return "adapter-off"
    if need == "rows" and config.reference_cache:
        return "cached"
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 3 * n_bytes:
        return "int8"
    return "full"


def _switchable(config: RunConfig, method: Method[Any]) -> bool:
    """May the policy with its adapters off be the reference?"""
    if config.lora is None:
        return False
    # once the policy is sharded, ranks that ask it about different numbers of rows would wait for each other
    return not config.fsdp or (method.reference_need() == "rows" and config.reference_cache)
