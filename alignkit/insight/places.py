"""Where the insight tools find a model, and on which device it goes."""

from __future__ import annotations

from pathlib import Path

import torch


def model_folder(name: str) -> str:
    """Return the model's folder where `name` is the folder of a run, else `name` unchanged."""
    model = Path(name).expanduser() / "model"
    return str(model) if (model.parent / "config.yaml").is_file() and model.is_dir() else name


def is_adapter(name: str) -> bool:
    """Whether a model's folder holds an adapter, which a run continues to train."""
    return (Path(name) / "adapter_config.json").is_file()


def device() -> torch.device:
    """Return the GPU where one is available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
