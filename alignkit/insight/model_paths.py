"""Where the insight tools find a model, and where they put it."""

from __future__ import annotations

from pathlib import Path

import torch


def model_folder(name: str) -> str:
    """Return the folder of a run's model where `name` is the run's, else `name` as it is."""
    inner = Path(name).expanduser() / "model"
    return str(inner) if (inner.parent / "config.yaml").is_file() and inner.is_dir() else name


def is_adapter(name: str) -> bool:
    """Whether a model's folder holds an adapter, which a run trains on."""
    return (Path(name) / "adapter_config.json").is_file()


def device() -> torch.device:
    """Return the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
