"""The environment and cost of each session of a run (its start and every resumption): sessions.json in its folder.

    [{"started": "2026-11-21T13:22:01+00:00", "ended": "done", "from_step": 0, "to_step": 32,
      "preparing_seconds": 2.1, "seconds": 24.0, "tokens": 61440, "peak_memory_bytes": 911212544,
      "environment": {...}, "facts": {...}}]

ended: done | stopped (a signal, an alarm) | failed | running (also of a killed session). seconds: of the loop, with
evaluations; preparing_seconds: before it. tokens: as in `tokens_per_second`, over all ranks and steps.
peak_memory_bytes: of the first process; on a GPU, allocated by torch. The cost of a killed session is known to within a
minute. No host name, user name or folder is written.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from alignkit.config import RunConfig, validated
from alignkit.errors import AlarmError, ConfigError
from alignkit.files import replace_text, sha256
from alignkit.reference.reference import Reference

FILE = "sessions.json"
_LIBRARIES = ("alignkit", "alignkit-kernels", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "triton")
_EVERY = 60.0  # seconds between writes of the file while the loop runs
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Seconds = Annotated[float, Field(ge=0, lt=2**63, allow_inf_nan=False)]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Reference(_Checked):
    values_read: _Count = 0
    values_computed: _Count = 0


class _Facts(_Checked):
    parameters: _Count = 0
    trained_parameters: _Count = 0
    reference: _Reference | None = None


class _Environment(_Checked):
    gpu_memory_bytes: _Count = 0


class _Entry(_Checked):
    """The values of an entry that readers compute with; other values are only displayed."""

    preparing_seconds: _Seconds = 0.0
    seconds: _Seconds = 0.0
    tokens: _Count = 0
    peak_memory_bytes: _Count = 0
    environment: _Environment
    facts: _Facts


class Session:
    """The record of one session: created at its start, opened with its loop, updated by every step."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._tokens, self._step = 0.0, 0
        self._path: Path | None = None
        self._cache: Any = None
        self._earlier: list[dict[str, Any]] = []
        self._entry: dict[str, Any] = {}

    def open(
        self, folder: Path, done: int, environment: Mapping[str, Any], facts: Mapping[str, Any], cache: Any = None
    ) -> None:
        """Start the session's entry, on the main process only. cache: the reference's, whose hits are counted."""
        self._path, self._earlier, self._cache = folder / FILE, read(folder), cache
        now = time.perf_counter()
        self._loop_began, self._written, self._step = now, now, done
        self._entry = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "from_step": done,
            "preparing_seconds": round(now - self._began, 3),
            "environment": dict(environment),
            "facts": dict(facts),
        }
        self._write("running")

    def count_step(self, tokens: float) -> None:
        """Count a finished step and its tokens, those of all ranks."""
        self._tokens, self._step = self._tokens + tokens, self._step + 1
        if self._path and time.perf_counter() - self._written > _EVERY:
            self._write("running")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # on other ranks the session was never opened
        if self._path:
            stopped = kind is not None and (not issubclass(kind, Exception) or issubclass(kind, AlarmError))
            self._write("done" if kind is None else "stopped" if stopped else "failed")

    def _write(self, ended: str) -> None:
        assert self._path is not None
        self._written = time.perf_counter()
        self._entry |= {
            "ended": ended,
            "to_step": self._step,
            "seconds": round(self._written - self._loop_began, 3),
            "tokens": int(self._tokens),
            "peak_memory_bytes": peak_memory(self._entry["environment"]["device"] == "cuda"),
        }
        if self._cache is not None:
            counted = {"values_read": self._cache.hits, "values_computed": self._cache.misses}
            self._entry["facts"]["reference"] |= counted
        replace_text(self._path, json.dumps([*self._earlier, self._entry], indent=1) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the sessions of a run, oldest first; empty without the file. Raises ConfigError: it cannot be read."""
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        found = [{"environment": {}, "facts": {}, **one} for one in json.loads(path.read_text(encoding="utf-8"))]
        for one in found:
            validated(_Entry, one)
        return found
    except (OSError, ValueError, TypeError, RecursionError, ConfigError) as error:
        raise ConfigError(
            f"cannot read {path}: {error}. Remove the file; the record of the run's cost so far is lost"
        ) from None


def total(sessions: list[dict[str, Any]], key: str) -> float:
    """Return the sum over all sessions of "seconds", "preparing_seconds" or "tokens"."""
    return float(sum(one.get(key, 0) for one in sessions))


def environment(accelerator: Any) -> dict[str, Any]:
    """Return versions and hardware as JSON values."""
    device, mixed = accelerator.device, accelerator.mixed_precision
    about: dict[str, Any] = {name: found for name in _LIBRARIES if (found := _version(name))}
    about |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    about |= {"processor": processor(), "cores": cores(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        about |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory, "cuda": torch.version.cuda}
    precision = "fp32" if mixed == "no" else mixed
    return about | {"device": device.type, "ranks": accelerator.num_processes, "precision": precision}


def peak_memory(gpu: bool) -> int:
    """Return the peak memory of this process in bytes; gpu: of torch's allocations there instead."""
    if gpu:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def digest(source: object) -> str | None:
    """Return the sha256 of a data file, None where the source is not a file."""
    path = Path(source) if isinstance(source, str | Path) else None
    return sha256(path) if path is not None and path.is_file() else None


def facts(
    config: RunConfig,
    model: nn.Module,
    reference: Reference | None,
    learning_rate: float,
    rows: int | None,
    held_out: int,
) -> dict[str, Any]:
    """Return the facts about a run in a session's entry, as JSON values.

    model: the trained one. rows: None where they are streamed.
    """
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    about: dict[str, Any] | None = None
    if reference is not None:
        about = {"mode": reference.mode, "fingerprint": reference.fingerprint[:12]}
        about |= {"temperature": reference.temperature}
    return {
        "parameters": sum(n for n, _ in numbers),
        "trained_parameters": sum(n for n, trained in numbers if trained),
        "rows": rows,
        "held_out_rows": held_out,
        "data_sha256": digest(config.data),
        "eval_data_sha256": digest(config.eval_data),
        "learning_rate": learning_rate,
        "reference": about,
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Return the name of the processor."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
