"""The examples of a run in a few flat arrays: memory grows with their tokens, not with Python objects."""

from __future__ import annotations

import math
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from alignkit.data.rows import RowNumber
from alignkit.types import Completion, Example


class _View(Sequence[Example]):
    """Examples of other sequences, found when they are asked for."""

    @abstractmethod
    def at(self, index: int) -> Example:
        """Return one example; index: from 0."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        chosen = range(len(self))[index]  # raises IndexError, and counts from the end below 0
        return Selected(self, chosen) if isinstance(chosen, range) else self.at(chosen)

    def __iter__(self) -> Iterator[Example]:
        return (self.at(i) for i in range(len(self)))


class Examples(_View):
    """Examples that are built when they are asked for, from arrays.

    A token takes 4 bytes, an answer with tokens that are only read a byte more for each of its tokens, an example about
    50 bytes. Python objects are kept of what prompts of methods that sample were given, with their rows' columns, and
    of the columns that a method declares.
    """

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._tokens, self._trained = array("i"), array("B")
        # of each part (the prompt, then the answers): its first token, and of answers where their flags begin, or -1
        self._starts, self._flags = array("q", [0]), array("q")
        self._parts = array("q", [0])  # of each example: its first part
        self._rows, self._orders = array("q"), array("d")
        # the row's number in its own file, and which file; -1: there is only one
        self._own, self._file = array("q"), array("i")
        self._files: dict[str, int] = {}
        self._numbers: dict[str, array[float]] = {}
        self._sources: dict[str, int] = {}
        self._source_of = array("i")
        self._given: dict[int, tuple[Any, Mapping[str, Any]]] = {}
        self._declared: dict[int, Mapping[str, Any]] = {}
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        """Add an example."""
        n = len(self)
        self._add(example.prompt)
        self._flags.append(-1)
        for completion in example.completions:
            self._add(completion.tokens)
            self._flags.append(-1 if completion.trained is None else len(self._trained))
            if completion.trained is not None:
                self._trained.frombytes(completion.trained.to(torch.uint8).numpy().tobytes())
        self._parts.append(len(self._starts) - 1)
        self._rows.append(int(example.row))
        place = example.row if isinstance(example.row, RowNumber) else None
        self._own.append(place.own if place else 0)
        self._file.append(self._files.setdefault(place.file, len(self._files)) if place else -1)
        self._orders.append(math.nan if example.order is None else example.order)
        for name in dict.fromkeys((*self._numbers, *example.numbers)):
            column = self._numbers.setdefault(name, array("d", [math.nan]) * n)
            column.append(example.numbers.get(name, math.nan))
        self._source_of.append(self._sources.setdefault(example.source, len(self._sources)))
        if not example.completions:
            self._given[n] = (example.asked, example.columns)
        if example.declared:
            self._declared[n] = example.declared

    def _add(self, tokens: Tensor) -> None:
        self._tokens.frombytes(tokens.to(torch.int32).numpy().tobytes())
        self._starts.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, index: int) -> Example:
        """Build one example."""
        prompt, *answers = range(self._parts[index], self._parts[index + 1])
        asked, columns = self._given.get(index, ("", {}))
        order = self._orders[index]
        return Example(
            self._part(prompt),
            tuple(Completion(self._part(part), self._flags_of(part)) for part in answers),
            {name: column[index] for name, column in self._numbers.items() if not math.isnan(column[index])},
            self._row(index),
            asked,
            columns,
            [*self._sources][self._source_of[index]],
            None if math.isnan(order) else order,
            self._declared.get(index, {}),
        )

    def _part(self, part: int) -> Tensor:
        # a copy: the array may move while it grows
        return _tensor(self._tokens[self._starts[part] : self._starts[part + 1]], torch.int32)

    def _flags_of(self, part: int) -> Tensor | None:
        begin, n = self._flags[part], self._starts[part + 1] - self._starts[part]
        return None if begin < 0 else _tensor(self._trained[begin : begin + n], torch.uint8).bool()

    def _row(self, i: int) -> int:
        row = self._rows[i]
        return row if self._file[i] < 0 else RowNumber(row, self._own[i], [*self._files][self._file[i]])


def _tensor(values: array[int], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


class Selected(_View):
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


class Joined(_View):
    """The examples of two sequences, one after the other."""

    def __init__(self, first: Sequence[Example], second: Sequence[Example]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def at(self, index: int) -> Example:
        """Return one example."""
        n = len(self._first)
        return self._first[index] if index < n else self._second[index - n]
