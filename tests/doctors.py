"""What the tests of `alignkit doctor` need: a place of their own, what a probe yields, a cache to look at."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
import torch

from alignkit.insight.doctor import Asked, surroundings
from alignkit.insight.doctor.parts import Fact, Probe, Trouble
from alignkit.reference.cache import LogpCache

NOTHING = Asked()


def set_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and a cache of its own, none of the variables that are looked at, and no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in os.environ:
        if name in (*surroundings.SHOWN, "MASTER_ADDR") or name.startswith(surroundings._FAMILIES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache.sqlite"))


def facts(probe: Probe, asked: Asked = NOTHING) -> dict[str, str]:
    return dict(found for found in probe(asked) if isinstance(found, Fact))


def troubles(probe: Probe, asked: Asked = NOTHING) -> list[Trouble]:
    return [found for found in probe(asked) if isinstance(found, Trouble)]


def one(probe: Probe, asked: Asked = NOTHING) -> Trouble:
    (found,) = troubles(probe, asked)
    return found


def fill(path: Path) -> Path:
    """Write a cache with three values."""
    with LogpCache(path) as cache:
        cache.put({bytes([i]) * 32: torch.ones(3) * i for i in range(3)}, "f" * 64)
    return path


def spoil(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("UPDATE logps SET value = x'00000000' WHERE rowid = 2")
    connection.commit()
    connection.close()
