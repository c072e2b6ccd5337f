"""Communication between the ranks (processes) of a run; a single rank communicates with nobody."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.models.heartbeat import Heartbeat

T = TypeVar("T")


def part_of(items: Sequence[T], rank: int, ranks: int) -> Sequence[T]:
    """Return a rank's part of a list that all ranks have: every n-th item, starting at its own number."""
    return items[rank::ranks]


def part_in_row(items: Sequence[T], rank: int, ranks: int) -> Sequence[T]:
    """Return a rank's part of a list that all ranks have: of its own files, where names begin with the ranks."""
    return items[len(items) * rank // ranks : len(items) * (rank + 1) // ranks]


class Ranks:
    """The ranks (processes) of a run, seen from one of them; every method must be called by all ranks or by none.

    n: the number of ranks. own: the number of this one, from 0. accelerator: Accelerate's, None for a single process.
    minutes: the time-out of the communication; where it is given, the ranks tell each other that they live. step: where
    the run is, for that.
    """

    def __init__(self, accelerator: Any = None, minutes: float | None = None) -> None:
        self.accelerator = accelerator
        self.n = 1 if accelerator is None else int(accelerator.num_processes)
        self.own = 0 if accelerator is None else int(accelerator.process_index)
        self.step = self._calls = 0
        self._minutes = minutes
        self._heartbeat: Heartbeat | None = None
        if minutes is not None and self.n > 1 and "MASTER_ADDR" in os.environ:
            self._heartbeat = Heartbeat(self.own, self.n, minutes, lambda: (self._calls, self.step))

    @property
    def is_main(self) -> bool:
        """True for the rank that writes the files."""
        return self.own == 0

    @property
    def patience(self) -> float | None:
        """Seconds that a rank may work alone, a little less than the others wait for it; None: nobody waits."""
        return None if self.n == 1 or self._minutes is None else 0.9 * 60 * self._minutes

    def explained(self, error: Exception) -> Exception:
        """Return a TrainingError naming the ranks that do not answer, where `error` comes from that, else `error`."""
        return self._heartbeat.explained(error) if self._heartbeat else error

    def close(self, failed: bool) -> None:
        """Stop telling the other ranks that this one lives; a run that has not failed leaves their group at exit."""
        if self._heartbeat:
            self._heartbeat.close()
        if self.n > 1:
            atexit.unregister(_leave)
            if not failed:  # leaving waits for communication that has begun, whose other ranks may be gone
                atexit.register(_leave)

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.n > 1:
            self._calls += 1
            self.accelerator.wait_for_everyone()

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of a list that all ranks have."""
        return part_of(items, self.own, self.n)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks."""
        if self.n == 1:
            return value
        self._calls += 1
        return self.accelerator.reduce(value.to(self.accelerator.device), "sum")  # type: ignore[no-any-return]

    def largest(self, value: Tensor) -> Tensor:
        """Return the largest entries over the ranks, [k] -> [k]."""
        if self.n == 1:
            return value
        self._calls += 1
        gathered = self.accelerator.gather(value[None].to(self.accelerator.device))
        return gathered.amax(0)  # type: ignore[no-any-return]

    def most(self, n: int) -> int:
        """Return the largest of the ranks' whole numbers."""
        return int(self.largest(torch.tensor([n]))[0])

    def parts(self, value: Tensor) -> list[Tensor]:
        """Return every rank's tensor, [k] with another k on each, on the CPU."""
        if self.n == 1:
            return [value.cpu()]
        padded = value.new_zeros(self.most(len(value)))
        padded[: len(value)] = value
        self._calls += 2
        device = self.accelerator.device
        sizes = self.accelerator.gather(torch.tensor([len(value)], device=device)).tolist()
        rows = self.accelerator.gather(padded[None].to(device)).cpu()
        return [row[:size] for row, size in zip(rows, sizes, strict=True)]

    def texts(self, text: str) -> list[str]:
        """Return every rank's text."""
        raw = bytearray(text, "utf-8", "replace")
        return [bytes(part.tolist()).decode() for part in self.parts(torch.tensor(list(raw), dtype=torch.uint8))]

    def together(self, call: Callable[[], T], kind: type[AlignkitError]) -> T:
        """Return `call()`; where it raises an error of this kind on one rank, all raise one that says the same."""
        problem, found = None, None
        try:
            found = call()
        except kind as error:
            problem = error
        if self.most(int(problem is not None)):
            said = self.texts("" if problem is None else str(problem) or "no message")
            raise problem or kind(next(f"rank {rank}: {text}" for rank, text in enumerate(said) if text))
        return found  # type: ignore[return-value]

    def all_of(self, numbers: list[int]) -> list[int]:
        """Join the ranks' lists of numbers >= 0."""
        most = self.most(len(numbers))
        if self.n == 1 or most == 0:
            return numbers
        self._calls += 1
        padded = torch.tensor(numbers + [-1] * (most - len(numbers)), device=self.accelerator.device)
        return [int(r) for r in self.accelerator.gather(padded) if r >= 0]


def _leave() -> None:
    """Leave the group of ranks while Python still runs.

    A thread of gloo frees the tensors of the last communication after the caller has gone on; where Python ends
    meanwhile, that aborts the process (torch 2.13).
    """
    gc.collect()  # wrapped models hold the group too
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


SINGLE = Ranks()
"""A single process."""
