"""Communication between the ranks (processes) of a run; a single rank communicates with nobody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def part_of(items: Sequence[T], rank: int, ranks: int) -> Sequence[T]:
    """Return a rank's part of a list that all ranks have: every n-th item, starting at its own number."""
    return items[rank::ranks]


class Ranks:
    """The ranks (processes) of a run, seen from one of them; every method must be called by all ranks or by none.

    n: the number of ranks. own: the number of this one, from 0. accelerator: Accelerate's, None for a single process.
    """

    def __init__(self, accelerator: Any = None) -> None:
        self.accelerator = accelerator
        self.n = 1 if accelerator is None else int(accelerator.num_processes)
        self.own = 0 if accelerator is None else int(accelerator.process_index)

    @property
    def is_main(self) -> bool:
        """True for the rank that writes the files."""
        return self.own == 0

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.n > 1:
            self.accelerator.wait_for_everyone()

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of a list that all ranks have."""
        return part_of(items, self.own, self.n)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks."""
        if self.n == 1:
            return value
        return self.accelerator.reduce(value.to(self.accelerator.device), "sum")  # type: ignore[no-any-return]

    def largest(self, value: Tensor) -> Tensor:
        """Return the largest entries over the ranks, [k] -> [k]."""
        if self.n == 1:
            return value
        gathered = self.accelerator.gather(value[None].to(self.accelerator.device))
        return gathered.amax(0)  # type: ignore[no-any-return]

    def most(self, n: int) -> int:
        """Return the largest of the ranks' whole numbers."""
        return int(self.largest(torch.tensor([n]))[0])

    def all_of(self, numbers: list[int]) -> list[int]:
        """Join the ranks' lists of numbers >= 0."""
        most = self.most(len(numbers))
        if self.n == 1 or most == 0:
            return numbers
        padded = torch.tensor(numbers + [-1] * (most - len(numbers)), device=self.accelerator.device)
        return [int(r) for r in self.accelerator.gather(padded) if r >= 0]


SINGLE = Ranks()
"""A single process."""
