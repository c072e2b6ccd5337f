"""Norms and feed-forward layers compiled by torch.compile; attention stays, whose masks differ in every batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from alignkit.errors import ConfigError, first_line

_NAMES = ("Norm", "MLP")  # the ends of transformers' class names
# versions of one layer's code: with and without gradients, autocast and adapters, for one token and for more, ...
_VERSIONS = 64
_COMPILED = "alignkit_compiled"


def compile_parts(lm: nn.Module, device: torch.device) -> None:
    """Compile the norms and feed-forward layers of a model in place; names and weights stay as they are.

    Raises ConfigError where torch.compile does not work on the device, or the model has no such layers.
    """
    parts = [module for module in lm.modules() if type(module).__name__.endswith(_NAMES)]
    if not parts:
        raise ConfigError("torch_compile: this model has no norms or feed-forward layers that are known; leave it out")
    try:
        torch.compile(torch.neg, dynamic=True)(torch.ones(2, device=device))
    except Exception as error:  # torch raises many types here
        raise ConfigError(
            f"torch_compile: it does not work here ({first_line(error)}); it needs a C++ "
            "compiler on a CPU and Triton on a GPU. Install it, or leave `torch_compile` out"
        ) from error
    setattr(lm, _COMPILED, True)
    for module in parts:
        # casts to 16 bits stay where they are: without them a layer's values would be others than uncompiled
        module.compile(dynamic=True, recompile_limit=_VERSIONS, options={"emulate_precision_casts": True})


def is_compiled(lm: nn.Module) -> bool:
    """Return whether `compile_parts` was called with this model."""
    return getattr(lm, _COMPILED, False)


@contextmanager
def uncompiled(lm: nn.Module) -> Iterator[None]:
    """Run compiled layers as they are: sampling has its own fast layers, which torch.compile cannot see through."""
    if not is_compiled(lm):  # without an import of the compiler, which takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
