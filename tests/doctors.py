"""Shared by the tests of `alignkit doctor`: an environment of its own, and what a probe yields."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignkit.insight.doctor.probe import Fact, Probe, Trouble

VARIABLES = (
    "ALIGNKIT_KERNELS", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_CACHE", "TORCHDYNAMO_DISABLE",
    "TORCH_COMPILE_DISABLE", "TRITON_INTERPRET",
)  # fmt: skip


def isolate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and a cache of its own, none of the variables that probes read, and no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache.sqlite"))


def facts(probe: Probe) -> dict[str, str]:
    return dict(found for found in probe() if isinstance(found, Fact))


def troubles(probe: Probe) -> list[Trouble]:
    return [found for found in probe() if isinstance(found, Trouble)]


def one(probe: Probe) -> Trouble:
    (found,) = troubles(probe)
    return found
