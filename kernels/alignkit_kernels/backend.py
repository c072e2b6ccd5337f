"""The choice of the implementation: Triton for tensors on a GPU, plain PyTorch elsewhere.

The environment variable ALIGNKIT_KERNELS=eager|triton forces one; "triton" on CPU tensors needs the interpreter
(TRITON_INTERPRET=1 before the first import), which is for tests: it is thousands of times slower.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheels for this platform, or not installed: plain PyTorch is used for everything
    triton = tl = None

__all__ = ["jit", "launching", "tl", "triton", "uses_triton"]

LOW = (torch.float32, torch.bfloat16, torch.float16)  # the types that the Triton kernels read; float64 is always eager


def jit(kernel: Callable[..., Any]) -> Any:
    """Return the function as a Triton kernel; without Triton, return it unchanged: it is never called then."""
    return kernel if triton is None else triton.jit(kernel)


def uses_triton(values: Tensor) -> bool:
    """Return whether an operation on `values` runs its Triton kernel.

    Raises ValueError on an unknown ALIGNKIT_KERNELS, RuntimeError where Triton is forced and cannot run.
    """
    forced = os.environ.get("ALIGNKIT_KERNELS", "")
    if forced not in ("", "eager", "triton"):
        raise ValueError(f"ALIGNKIT_KERNELS is '{forced}'; it can be 'eager', 'triton', or unset")
    if forced == "eager" or values.dtype not in LOW:
        return False
    if forced == "triton":
        if triton is None:
            raise RuntimeError("ALIGNKIT_KERNELS=triton, but triton is not installed: pip install triton")
        if not values.is_cuda and not triton.knobs.runtime.interpret:
            raise RuntimeError(
                f"ALIGNKIT_KERNELS=triton, but the tensors are on '{values.device}': move them to a GPU, unset "
                f"ALIGNKIT_KERNELS, or set TRITON_INTERPRET=1 to run the kernels in the slow interpreter"
            )
        return True
    return triton is not None and values.is_cuda


def launching(values: Tensor) -> AbstractContextManager[Any]:
    """Return a context that launches kernels on the device of `values`, whichever device is current."""
    return torch.cuda.device(values.device) if values.is_cuda else nullcontext()
