"""Processes of the bench: threads that add up their values."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from alignkit.types import Batch


class SimulatedRanks:
    """Sums over simulated ranks, each a thread."""

    def __init__(self, n: int) -> None:
        self.n, self._barrier, self._values = n, threading.Barrier(n), [torch.empty(0)] * n

    def sum(self, rank: int, value: Tensor) -> Tensor:
        """Return the sum over all ranks; each calls it."""
        self._values[rank] = value
        self._barrier.wait()
        total = torch.stack(self._values).sum(0)
        self._barrier.wait()
        return total

    def collect(self, work: Any) -> list[Batch]:
        """Run work(rank) for all ranks concurrently; raise the original error, not a broken barrier."""

        def guarded(rank: int) -> Batch:
            try:
                with torch.no_grad():
                    return work(rank)  # type: ignore[no-any-return]
            except BaseException:
                self._barrier.abort()  # else the other ranks would wait forever
                raise

        with ThreadPoolExecutor(self.n) as pool:
            futures = [pool.submit(guarded, rank) for rank in range(self.n)]
        errors = [e for f in futures if (e := f.exception()) is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [f.result() for f in futures]
