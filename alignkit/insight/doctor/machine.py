"""Processors, memory and GPUs."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkit.insight import terminal
from alignkit.insight.doctor import container
from alignkit.insight.doctor.parts import Asked, Fact, Trouble, first

LITTLE = 2 * 2**30  # bytes of memory, below which hardly any model fits
BUSY = 0.5  # of a GPU's memory: less that is free belongs to somebody else


def devices(asked: Asked) -> Iterator[Fact | Trouble]:
    """Yield what there is to compute on."""
    try:
        yield from _memory()
    except (OSError, LookupError, ValueError) as error:
        yield Fact("memory", f"unknown: {type(error).__name__}: {first(error)}")
    import torch

    yield from _processor(torch)
    yield Fact("torch is built for", _built_for(torch))
    driver, complaint = _driver()
    if driver:
        yield Fact("NVIDIA driver", driver)
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            yield from _gpu(torch, i)
    elif hidden() and has_gpu():
        yield Fact("GPU", "none: CUDA_VISIBLE_DEVICES hides them")
    else:
        yield Fact("GPU", "none that torch can use: runs go to the CPU")
        yield from _unused(torch, driver, complaint)


def has_gpu() -> bool:
    """Say whether this machine seems to have a GPU, whatever torch can use."""
    files = any(Path("/dev").glob("nvidia*")) or Path("/dev/kfd").exists()  # the latter is AMD's
    return files or shutil.which("nvidia-smi") is not None


def hidden() -> bool:
    """Say whether CUDA_VISIBLE_DEVICES hides every GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def _processor(torch: Any) -> Iterator[Fact | Trouble]:
    from alignkit.runs import sessions

    cores, threads, share = sessions.cores(), torch.get_num_threads(), container.cores()
    least = cores if share is None else min(cores, math.ceil(share))
    limited = f" ({share:.3g} by a container's limit)" if share is not None and share < cores else ""
    yield Fact("processor", f"{sessions.processor()}, {cores} cores{limited}, {threads} threads in use by torch")
    if threads > least:
        what = f"torch uses {threads} threads on {least} core{'s' * (least != 1)}, which is slower than one for each"
        yield Trouble("warn", what, f"export OMP_NUM_THREADS={least}")


def _unused(torch: Any, driver: str, complaint: str) -> Iterator[Trouble]:
    """Yield why a GPU that is there is not used."""
    if complaint:
        present = any(Path("/dev").glob("nvidia[0-9]*"))
        remedy = "if this machine has an NVIDIA GPU, restart it, or install its driver again"
        yield Trouble("problem" if present else "warn", f"nvidia-smi fails: {complaint}", remedy)
    elif driver and torch.version.cuda is None:
        remedy = "install a CUDA build of torch: see the selector on the page of PyTorch"
        what = f"there is an NVIDIA GPU, and this torch is built for {_built_for(torch)}"
        yield Trouble("problem", what, remedy)
    elif driver:
        what = f"there is an NVIDIA GPU, and torch for CUDA {torch.version.cuda} cannot use it"
        yield Trouble("problem", what, "upgrade the driver, or look at CUDA_VISIBLE_DEVICES")


def _memory() -> Iterator[Fact | Trouble]:
    """Yield the main memory; what a container may use of it counts."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limits = [found for found in container.memory() if found.limit < total]
    free = min([free, *(max(found.limit - found.used, 0) for found in limits)])
    total = min([total, *(found.limit for found in limits)])
    yield Fact("memory", f"{terminal.size(total)}, {terminal.size(free)} free")
    if free < LITTLE:
        what = f"only {terminal.size(free)} of memory are free"
        yield Trouble("warn", what, "end other programs, or plan first: alignkit plan config.yaml")


def _gpu(torch: Any, i: int) -> Iterator[Fact | Trouble]:
    name = f"GPU {i}"
    try:
        about = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
    except Exception as error:  # kept by another process for itself, fallen off its bus, ...
        what = f"{name} cannot be used: {type(error).__name__}: {first(error)}"
        yield Trouble("problem", what, "look at it with nvidia-smi, or choose others with CUDA_VISIBLE_DEVICES")
        return
    able = f"{about.major}.{about.minor}"
    yield Fact(name, f"{about.name}, capability {able}, {terminal.size(total)}, {terminal.size(free)} free")
    if free < BUSY * total:
        what = f"{name}: more than half of its memory is in use already"
        yield Trouble("warn", what, "see by whom: nvidia-smi; choose another with CUDA_VISIBLE_DEVICES")


def _built_for(torch: Any) -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "the CPU alone"


def _driver() -> tuple[str, str]:
    """Return the version of NVIDIA's driver and what nvidia-smi complains of, one of them or both empty."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "", ""
    try:
        asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        ran = subprocess.run(asked, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", first(error)
    said = next((line.strip() for line in (ran.stdout + ran.stderr).splitlines() if line.strip()), "it says nothing")
    if ran.returncode == 0 and re.fullmatch(r"\d+(\.\d+)*", said):
        return said, ""
    return "", said[:300]
