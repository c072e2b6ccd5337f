"""Processors, memory and GPUs."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkit.insight import terminal
from alignkit.insight.doctor.probe import Fact, Trouble, first_line

LITTLE = 2 * 2**30  # bytes of memory, below which hardly any model fits
SIZE = 512  # of matrices that are multiplied
WORTH = 1.5  # times as fast: less is lost again outside of products
BUSY = 0.5  # of a GPU's memory: where less is free, others use it


def devices() -> Iterator[Fact | Trouble]:
    """Yield the processor, memory and GPUs, and what keeps torch from using them."""
    import torch

    yield from _memory()
    yield from _processor(torch)
    yield Fact("torch is built for", _built_for(torch))
    driver, failure = _driver()
    if driver:
        yield Fact("NVIDIA driver", driver)
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            yield from _gpu(torch, i)
    elif os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        yield Fact("GPU", "none: CUDA_VISIBLE_DEVICES hides any")
    else:
        yield Fact("GPU", "none that torch can use: runs use the CPU")
        yield from _unused(torch, driver, failure)


def _processor(torch: Any) -> Iterator[Fact | Trouble]:
    from alignkit.runs import sessions

    cores, threads = sessions.cores(), torch.get_num_threads()
    yield Fact("processor", f"{sessions.processor()}, {cores} cores, {threads} threads in use by torch")
    if threads > cores:
        what = f"torch uses {threads} threads on {cores} core{'s' * (cores != 1)}, which is slower than one for each"
        yield Trouble("warn", what, f"export OMP_NUM_THREADS={cores}")
    ratio = _product_seconds(torch, torch.float32) / _product_seconds(torch, torch.bfloat16)
    gain = "faster with precision: bf16" if ratio >= WORTH else "best left in float32"
    yield Fact("products in bf16", f"{ratio:.1f} times as fast as in float32: runs on this CPU are {gain}")


def _product_seconds(torch: Any, dtype: Any) -> float:
    """Return the seconds of a product of matrices in this type of numbers, a median of seven after the first one."""
    a, b = (torch.ones(SIZE, SIZE, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(8):
        started = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def _unused(torch: Any, driver: str, failure: str) -> Iterator[Trouble]:
    """Yield why an existing GPU is not used."""
    if failure:
        present = any(Path("/dev").glob("nvidia[0-9]*"))
        remedy = "if this machine has an NVIDIA GPU, restart it, or install its driver again"
        yield Trouble("problem" if present else "warn", f"nvidia-smi fails: {failure}", remedy)
    elif driver and torch.version.cuda is None:
        remedy = "install a CUDA build of torch: see the selector on PyTorch's page"
        what = f"there is an NVIDIA GPU, but this torch is built for {_built_for(torch)}"
        yield Trouble("problem", what, remedy)
    elif driver:
        what = f"there is an NVIDIA GPU, but torch for CUDA {torch.version.cuda} cannot use it"
        yield Trouble("problem", what, "upgrade the driver, or check CUDA_VISIBLE_DEVICES")


def _memory() -> Iterator[Fact | Trouble]:
    path = Path("/proc/meminfo")
    if not path.is_file():
        return
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    yield Fact("memory of the machine", f"{terminal.size(total)}, {terminal.size(free)} free")
    if free < LITTLE:
        what = f"only {terminal.size(free)} of memory is free"
        yield Trouble("warn", what, "end other programs, or plan first: alignkit plan config.yaml")


def _gpu(torch: Any, i: int) -> Iterator[Fact | Trouble]:
    name = f"GPU {i}"
    try:
        about = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
    except Exception as error:  # used exclusively by another process, lost from its bus, ...
        what = f"{name} cannot be used: {type(error).__name__}: {first_line(error)}"
        yield Trouble("problem", what, "check it with nvidia-smi, or choose others with CUDA_VISIBLE_DEVICES")
        return
    able = f"{about.major}.{about.minor}"
    yield Fact(name, f"{about.name}, capability {able}, {terminal.size(total)}, {terminal.size(free)} free")
    if free < BUSY * total:
        what = f"{name}: more than half of its memory is in use already"
        yield Trouble("warn", what, "see which processes: nvidia-smi; choose another with CUDA_VISIBLE_DEVICES")


def _built_for(torch: Any) -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "the CPU alone"


def _driver() -> tuple[str, str]:
    """Return the version of NVIDIA's driver and the error of nvidia-smi; one of them or both are empty."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "", ""
    try:
        command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", first_line(error)
    line = next((line.strip() for line in (ran.stdout + ran.stderr).splitlines() if line.strip()), "it printed nothing")
    if ran.returncode == 0 and re.fullmatch(r"\d+(\.\d+)*", line):
        return line, ""
    return "", line[:300]
