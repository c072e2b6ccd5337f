"""The settings of a run that a tool takes which samples from a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.config import RunConfig, gathered, validated
from alignkit.errors import ConfigError
from alignkit.hints import hint

OF_SAMPLING = (
    "sampling",
    "seed",
    "tokenizer",
    "dtype",
    "device",
    "trust_remote_code",
    "tools",
    "chat_template_kwargs",
    "special_tokens_in_text",
    "template_date",
)
"""Settings of a run that decide what a model samples."""


def sampling_config(tool: str, model: str, settings: Mapping[str, Any], used: Sequence[str]) -> RunConfig:
    """Return the settings for a tool's model; used: "sampling", then the others that it takes. Raises ConfigError."""
    given = gathered(settings)
    for name in given:
        if name not in used:
            raise ConfigError(
                f"{tool} has no setting '{name}'.{hint(name, used)} It has {', '.join(used[1:])}, and those of "
                f"{used[0]}, such as sampling.temperature"
            )
    return validated(RunConfig, {**given, "method": tool, "model": model, "data": "-"})
