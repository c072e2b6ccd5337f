"""Processors, memory and GPUs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.insight.doctor.parts import Asked, Fact, Trouble

LITTLE = 2 * 2**30  # bytes of memory, below which hardly any model fits
BUSY = 0.5  # of a GPU's memory: less that is free belongs to somebody else


def devices(asked: Asked) -> Iterator[Fact | Trouble]:
    """Yield what there is to compute on."""
    yield from _memory()
    import torch

    from alignkit import sessions

    cores, threads = sessions.cores(), torch.get_num_threads()
    yield Fact("processor", f"{sessions.processor()}, {cores} cores, {threads} threads in use by torch")
    if threads > cores:
        what = f"torch uses {threads} threads on {cores} cores, which is slower than one for each"
        yield Trouble("warn", what, f"export OMP_NUM_THREADS={cores}")
    yield Fact("torch is built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else _other(torch))
    driver = _driver()
    if driver:
        yield Fact("NVIDIA driver", driver)
    if not torch.cuda.is_available():
        yield Fact("GPU", "none that torch can use: runs go to the CPU")
        if driver and torch.version.cuda is None:
            remedy = "install a CUDA build of torch: see the selector on the page of PyTorch"
            yield Trouble("problem", "there is an NVIDIA GPU, and this torch is built for the CPU alone", remedy)
        elif driver:
            what = f"there is an NVIDIA GPU, and torch for CUDA {torch.version.cuda} cannot use it"
            yield Trouble("problem", what, "upgrade the driver, or look at CUDA_VISIBLE_DEVICES")
        return
    for i in range(torch.cuda.device_count()):
        yield from _gpu(torch, i)


def _memory() -> Iterator[Fact | Trouble]:
    """Yield the main memory; what a container may use of it counts."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    group = Path("/sys/fs/cgroup/memory.max")
    limit = group.read_text().strip() if group.is_file() else "max"
    if limit.isdigit() and int(limit) < total:
        used = int(group.with_name("memory.current").read_text())
        total, free = int(limit), min(free, int(limit) - used)
    yield Fact("memory", f"{console.size(total)}, {console.size(free)} free")
    if free < LITTLE:
        what = f"only {console.size(free)} of memory are free"
        yield Trouble("warn", what, "end other programs, or plan first: alignkit plan config.yaml")


def _gpu(torch: Any, i: int) -> Iterator[Fact | Trouble]:
    about = torch.cuda.get_device_properties(i)
    free, total = torch.cuda.mem_get_info(i)
    name, able = f"GPU {i}", f"{about.major}.{about.minor}"
    yield Fact(name, f"{about.name}, capability {able}, {console.size(total)}, {console.size(free)} free")
    if free < BUSY * total:
        what = f"{name}: more than half of its memory is in use already"
        yield Trouble("warn", what, "see by whom: nvidia-smi; choose another with CUDA_VISIBLE_DEVICES")


def _other(torch: Any) -> str:
    return f"ROCm {torch.version.hip}" if torch.version.hip else "the CPU"


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        ran = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip().splitlines()[0] if ran.returncode == 0 and ran.stdout.strip() else None
