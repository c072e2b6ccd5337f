"""The kernels that a run uses on each device, and why; a small computation with them."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkit.insight.doctor.probe import Fact, Trouble, first_line

TOLERANCE = 1e-5  # nats


def kernels() -> Iterator[Fact | Trouble]:
    """Yield what computes log-probabilities and losses, and whether the results are right."""
    import torch

    from alignkit_kernels import backend, selective_logps

    places = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for place in places:
        try:
            empty = torch.empty(1, device=place)
        except Exception as error:
            yield _failed(place, error)
            continue
        try:
            triton = backend.uses_triton(empty)
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and place.type == "cpu" and len(places) > 1 and backend.triton:
                yield Fact(f"on {place}", "nothing: ALIGNKIT_KERNELS=triton is for GPUs")
                continue
            yield Trouble("problem", first_line(error), "unset ALIGNKIT_KERNELS")
            return
        yield Fact(f"on {place}", _reason(backend, place, triton))
        if triton and backend.triton.knobs.runtime.interpret:
            what = f"the kernels on {place} run in Triton's interpreter, hundreds of times slower"
            yield Trouble("problem", what, "unset TRITON_INTERPRET")
        elif triton and not _has_compiler():
            what = "Triton compiles with a C compiler and Python's headers, and one of them is missing"
            yield Trouble("problem", what, "install gcc and python3-dev, or export ALIGNKIT_KERNELS=eager")
        elif place.type == "cuda" and backend.triton is None:
            what = f"triton is not installed: plain PyTorch on {place} is slower and takes more memory"
            yield Trouble("warn", what, "pip install triton")
        yield from _check(torch, selective_logps, place)


def _reason(backend: Any, place: Any, triton: bool) -> str:
    forced = os.environ.get("ALIGNKIT_KERNELS")
    if triton:
        return f"Triton {backend.triton.__version__}{', by ALIGNKIT_KERNELS' if forced else ''}"
    if forced:
        return "plain PyTorch, by ALIGNKIT_KERNELS"
    return "plain PyTorch: Triton is for GPUs" if place.type == "cpu" else "plain PyTorch: triton is not installed"


def _has_compiler() -> bool:
    """Return whether Triton finds a compiler and headers, where triton.runtime.build looks for them."""
    named, scheme = os.environ.get("CC"), sysconfig.get_default_scheme()
    found = any(shutil.which(name) for name in ([named] if named else ["gcc", "clang"]))
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own scheme, whose folder has no headers
    return found and Path(sysconfig.get_paths(scheme)["include"], "Python.h").is_file()


def _failed(place: Any, error: Exception) -> Trouble:
    what = f"computing on {place} fails: {type(error).__name__}: {first_line(error)}"
    return Trouble("problem", what, "try a build of torch for this device, or export ALIGNKIT_KERNELS=eager")


def _check(torch: Any, selective_logps: Any, place: Any) -> Iterator[Trouble]:
    values = torch.arange(60.0).reshape(4, 15).sin()
    targets = torch.tensor([0, 3, 7, 14])
    expected = values.double().log_softmax(-1)[range(4), targets]
    try:
        moved = values.to(place) * 1  # a computation by torch itself, which may have no code for this GPU
        found = selective_logps(moved, targets.to(place)).cpu().double()
    except Exception as error:
        yield _failed(place, error)
        return
    if not (off := (found - expected).abs().max().item()) <= TOLERANCE:
        what = f"the kernels on {place} are wrong by {off:.2g} nats"
        yield Trouble("problem", what, "export ALIGNKIT_KERNELS=eager, and report this text as a bug")
