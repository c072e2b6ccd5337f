"""Milliseconds and peak memory of a call, on a CPU or a GPU, and the versions of the measured libraries."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

MIB = 1 << 20
FLUSH_BYTES = 256 * MIB  # several times any second-level cache
SLEEP_CYCLES = 2_000_000  # about a millisecond
# measured ceilings: bf16 matrix products in FLOP/s, and bytes/s
RATES = {"NVIDIA H200": (790e12, 4.3e12)}


class Times(NamedTuple):
    """Milliseconds of the rounds."""

    median: float
    least: float
    most: float


def alternate(
    calls: Mapping[str, Callable[[int], object]], device: torch.device, seconds: float, least_rounds: int = 5
) -> dict[str, Times]:
    """Time the calls in turn, A B C A B C ..., for about `seconds` in total, and at least `least_rounds` rounds.

    Each call gets the number of the round, so that it can use inputs that are in no cache.
    """
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    estimates = {name: clock(call, 0, 1) for name, call in calls.items()}
    # a call of microseconds is repeated within a round, because reading the clock takes microseconds too
    repeats = {name: max(1, min(1000, int(2 / max(ms, 1e-4)))) for name, ms in estimates.items()}
    once = sum(estimates[name] * repeats[name] for name in calls) / 1000
    rounds = max(least_rounds, min(100, int(seconds / max(once, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call, i + 1, repeats[name] if device.type == "cpu" else 1))
    return {name: Times(statistics.median(t), min(t), max(t)) for name, t in times.items()}


def _cpu_clock(call: Callable[[int], object], i: int, repeats: int) -> float:
    started = time.perf_counter()
    for k in range(repeats):
        call(i + k)
    return (time.perf_counter() - started) / repeats * 1000


def _cuda_clock(device: torch.device) -> Callable[[Callable[[int], object], int, int], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def clock(call: Callable[[int], object], i: int, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        flush.zero_()
        # the host queues the call while the device waits: a millisecond of launches is not counted
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        call(i)
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))

    return clock


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak memory of the call, beyond the memory held before it; None when it cannot be read."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def matmul_rate(n: int, h: int, v: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s of hidden [n, h] @ weight [v, h].T with the library of this device, alone."""
    hidden, weight = torch.randn(n, h).to(device, dtype), torch.randn(v, h).to(device, dtype)
    logits = torch.empty(n, v, dtype=dtype, device=device)
    times = alternate({"matmul": lambda _: torch.mm(hidden, weight.T, out=logits)}, device, 2.0, 5)
    return 2.0 * n * h * v / (times["matmul"].least / 1000)


def rates(device: torch.device) -> tuple[float, float] | None:
    """Return (FLOP/s, bytes/s) of a device with known ceilings, else None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((r for known, r in RATES.items() if name.startswith(known)), None)


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Describe the machine: device, cores, versions, date."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": threads,
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version_of(name) for name in ("triton", "trl", "liger_kernel", "cut_cross_entropy")},
        "date": datetime.date.today().isoformat(),
    }


def version_of(module: str) -> str | None:
    """Return the version of an installed distribution, else None."""
    metadata = importlib.import_module("importlib.metadata")
    try:
        return str(metadata.version(module))
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):
        return None
