"""Sequences of examples that are found when they are asked for: chosen ones, and several sequences as one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from alignkit.data.plain import Raw
from alignkit.types import Example


class View(Sequence[Example]):
    """Examples of other sequences, found when they are asked for."""

    @abstractmethod
    def at(self, index: int) -> Example:
        """Return one example; index: from 0."""

    @abstractmethod
    def raw(self, index: int) -> Raw:
        """Return one example as bytes; index: from 0."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        chosen = range(len(self))[index]  # raises IndexError, and counts from the end below 0
        return Selected(self, chosen) if isinstance(chosen, range) else self.at(chosen)

    def __iter__(self) -> Iterator[Example]:
        return (self.at(i) for i in range(len(self)))


def raws(examples: Sequence[Example]) -> Iterator[Raw]:
    """Yield examples as bytes, without building those of a store."""
    if isinstance(examples, View):
        return (examples.raw(i) for i in range(len(examples)))
    return (Raw.of(example) for example in examples)


class Selected(View):
    """Some of the examples of a sequence, by their indices, each changed when it is asked for."""

    def __init__(
        self, examples: Sequence[Example], indices: Sequence[int], change: Callable[[Example], Example] | None = None
    ) -> None:
        self._examples, self._indices, self._change = examples, indices, change

    def __len__(self) -> int:
        return len(self._indices)

    def at(self, index: int) -> Example:
        """Return one example."""
        example = self._examples[self._indices[index]]
        return example if self._change is None else self._change(example)

    def raw(self, index: int) -> Raw:
        """Return one example as bytes."""
        if self._change is None and isinstance(self._examples, View):
            return self._examples.raw(self._indices[index])
        return Raw.of(self.at(index))


class Joined(View):
    """The examples of two sequences, one after the other."""

    def __init__(self, first: Sequence[Example], second: Sequence[Example]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def at(self, index: int) -> Example:
        """Return one example."""
        side, own = self._place(index)
        return side[own]

    def raw(self, index: int) -> Raw:
        """Return one example as bytes."""
        side, own = self._place(index)
        return side.raw(own) if isinstance(side, View) else Raw.of(side[own])

    def _place(self, index: int) -> tuple[Sequence[Example], int]:
        n = len(self._first)
        return (self._first, index) if index < n else (self._second, index - n)
