"""The trained weights as they were before an update, to score what they sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EarlierWeights:
    """A copy of a module's trained weights, on their devices; frozen ones do not change and are not copied."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._copy: list[Tensor] = []

    @torch.no_grad()
    def take(self) -> None:
        """Copy the weights as they are now."""
        now = self._trained()
        self._copy = self._copy or [torch.empty_like(p) for p in now]
        torch._foreach_copy_(self._copy, now)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Put the copy into the module inside the block, for passes without a gradient; restore it afterwards."""
        trained = self._trained()
        with torch.no_grad():
            now = [p.clone() for p in trained]
            torch._foreach_copy_(trained, self._copy)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(trained, now)

    def _trained(self) -> list[Tensor]:
        return [p for p in self._module.parameters() if p.requires_grad]
