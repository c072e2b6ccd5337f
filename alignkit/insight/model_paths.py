"""The model that an insight tool reads, and the device that it uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def model_folder(name: str) -> str:
    """Return the model's folder where `name` is the folder of a run, else `name` unchanged."""
    inner = Path(name).expanduser() / "model"
    return str(inner) if (inner.parent / "config.yaml").is_file() and inner.is_dir() else name


def is_adapter(name: str) -> bool:
    """Return whether a model's folder contains an adapter, which a run continues to train."""
    return (Path(name) / "adapter_config.json").is_file()


def adapter_settings(name: str) -> dict[str, Any]:
    """Return the settings of the adapter in a model's folder, {} where it has none."""
    return json.loads((Path(name) / "adapter_config.json").read_text()) if is_adapter(name) else {}


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
