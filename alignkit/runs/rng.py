"""The state of the random generators, as tensors and JSON values."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignkit.errors import CheckpointError


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of every global random generator: torch (CPU, each CUDA device), numpy, python.

    Returns (tensors, JSON values) for `save`; `set_rng_state` takes both back.
    """
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return tensors, {
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }


def set_rng_state(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned; CUDA devices that this machine does not have are ignored.

    Raises CheckpointError where the generators do not accept the state.
    """
    try:
        torch.set_rng_state(tensors["torch"])
        for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            if f"cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
        name, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))
        version, internal, gauss_next = state["python"]
        random.setstate((version, tuple(internal), gauss_next))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the saved state of the random generators cannot be restored: {error!r}") from error
