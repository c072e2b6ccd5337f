"""The speakers of a conversation, from the names of models and runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from alignkit.config import RunConfig, read_yaml
from alignkit.errors import ConfigError
from alignkit.insight.model_paths import adapter_settings, device, is_adapter, model_folder
from alignkit.insight.sampling_settings import OF_SAMPLING, sampling_config
from alignkit.insight.talk.speaker import Speaker
from alignkit.models.loading import from_pretrained, load_tokenizer


def speakers(model: str, against: str | None = None, settings: Mapping[str, Any] | None = None) -> list[Speaker]:
    """Return the model as a speaker, and the one it is compared with.

    model: folder or hub name of a model, an adapter, or a run, whose sampling and chat settings are kept. against: the
    same, or "base": the model that the run began with, or below the adapter, which is then loaded once for both.
    settings: those in OF_SAMPLING, such as {"sampling.temperature": 0.8}. The global seed is set. Raises AlignkitError.
    """
    folder, kept = model_folder(model), _of_run(model)
    shared = against == "base" and is_adapter(folder)
    other = None if against is None or shared else model_folder(_base(model) if against == "base" else against)
    # the model's folder has the tokenizer, which a run may have been given as an object
    given = {name: value for name, value in kept.items() if name in OF_SAMPLING and name != "tokenizer"}
    config = sampling_config("chat", folder, {**given, **(settings or {})}, OF_SAMPLING)
    torch.manual_seed(config.seed)
    first = _speaker(model, folder, config)
    if shared:
        below = adapter_settings(folder)["base_model_name_or_path"]
        return [first, Speaker(_name(below), first.model, first.tokenizer, config, first.model.disable_adapter)]
    if other is None:
        return [first]
    # another model may have another tokenizer, of the run's settings only what is asked for
    own = sampling_config("chat", other, {"sampling": config.sampling, **(settings or {})}, OF_SAMPLING)
    second = _speaker(other if against == "base" else str(against), other, own)
    if second.name == first.name:
        first.name, second.name = model, str(against)
    return [first, second]


def _speaker(name: str, folder: str, config: RunConfig) -> Speaker:
    run_on = torch.device("cpu") if config.device == "cpu" else device()
    return Speaker(_name(name), from_pretrained(folder, config).to(run_on).eval(), load_tokenizer(config), config)


def _name(of: str) -> str:
    """Return the last part of a path or a hub name, a run's for its folder model/."""
    path = Path(of).expanduser()
    return path.parent.name if path.name == "model" and (path.parent / "config.yaml").is_file() else path.name


def _of_run(name: str) -> dict[str, Any]:
    """Return the settings of a run, {} where the name is of a model."""
    file = Path(name).expanduser() / "config.yaml"
    return read_yaml(file) if file.is_file() else {}


def _base(name: str) -> str:
    base = _of_run(name).get("model")
    if base is None:
        raise ConfigError(f"--against base: '{name}' is neither a run nor an adapter; name the model to compare with")
    if str(base).startswith("<"):
        raise ConfigError(f"--against base: the run began with a model object, {base}; name the model to compare with")
    return str(base)
