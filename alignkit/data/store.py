"""The examples of a run in a few flat arrays: memory grows with their tokens, not with Python objects."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from alignkit.data.plain import Answer, Raw, Tokenised
from alignkit.data.rows import RowNumber
from alignkit.data.views import View
from alignkit.types import Completion, Example

Values: TypeAlias = "array[Any] | np.ndarray[Any, Any]"


class Arrays(NamedTuple):
    """The arrays of a store, by name; the files, sources and columns of numbers that they count in.

    numbers: float64, nan where an example has none.
    """

    values: Mapping[str, Values]
    files: Sequence[str]
    sources: Sequence[str]
    numbers: Mapping[str, Values]


_ARRAYS = ("tokens", "trained", "starts", "flags", "parts", "rows", "orders", "own", "file", "source_of")


class Examples(View):
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
        self.given: dict[int, tuple[Any, Mapping[str, Any]]] = {}
        self.declared: dict[int, Mapping[str, Any]] = {}
        for example in examples:
            self.append(example)

    @classmethod
    def of(
        cls,
        arrays: Arrays,
        given: Mapping[int, tuple[Any, Mapping[str, Any]]],
        declared: Mapping[int, Mapping[str, Any]],
    ) -> Examples:
        """Return the examples in arrays that were filled before; none can be added."""
        made: Any = cls()
        for name in _ARRAYS:
            setattr(made, f"_{name}", arrays.values[name])
        for name, known in (("files", arrays.files), ("sources", arrays.sources)):
            setattr(made, f"_{name}", {one: number for number, one in enumerate(known)})
        made._numbers, made.given, made.declared = arrays.numbers, given, declared
        return cast(Examples, made)

    def arrays(self) -> Arrays:
        """Return the arrays, to be kept."""
        values = {name: getattr(self, f"_{name}") for name in _ARRAYS}
        return Arrays(values, [*self._files], [*self._sources], self._numbers)

    def append(self, example: Example) -> None:
        """Add an example."""
        answers = tuple(
            Answer(c.tokens.tolist(), None if c.trained is None else c.trained.tolist()) for c in example.completions
        )
        e = example
        made = Tokenised(e.prompt.tolist(), answers, e.numbers, e.row, e.asked, e.columns, e.declared)
        self.add(made, e.source, e.order)

    def add(self, made: Tokenised, source: str = "", order: float | None = None) -> None:
        """Add an example from its lists."""
        n = len(self)
        self._add(made.prompt)
        self._flags.append(-1)
        for ids, trained in made.answers:
            self._add(ids)
            self._flags.append(-1 if trained is None else len(self._trained))
            if trained is not None:
                self._trained.extend(trained)
        self._parts.append(len(self._starts) - 1)
        self._rows.append(int(made.row))
        place = made.row if isinstance(made.row, RowNumber) else None
        self._own.append(place.own if place else 0)
        self._file.append(self._files.setdefault(place.file, len(self._files)) if place else -1)
        self._orders.append(math.nan if order is None else order)
        for name in made.numbers:
            if name not in self._numbers:
                self._numbers[name] = array("d", [math.nan]) * n
        for name, column in self._numbers.items():
            column.append(made.numbers.get(name, math.nan))
        self._source_of.append(self._sources.setdefault(source, len(self._sources)))
        if not made.answers:
            self.given[n] = (made.asked, made.columns)
        if made.declared:
            self.declared[n] = made.declared

    def _add(self, ids: Sequence[int]) -> None:
        self._tokens.extend(ids)
        self._starts.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, index: int) -> Example:
        """Build one example."""
        prompt, *answers = range(self._parts[index], self._parts[index + 1])
        asked, columns = self.given.get(index, ("", {}))
        return Example(
            _tensor(self._part(prompt)),
            tuple(Completion(_tensor(self._part(part)), self._trained_of(part)) for part in answers),
            self._numbers_of(index),
            self._row(index),
            asked,
            columns,
            self._source(index),
            self._order(index),
            self.declared.get(index, {}),
        )

    def raw(self, index: int) -> Raw:
        """Return one example as bytes."""
        prompt, *answers = range(self._parts[index], self._parts[index + 1])
        found = []
        for part in answers:
            flags = self._flags_of(part)
            found.append((self._part(part).tobytes(), None if flags is None else flags.tobytes()))
        columns = self.given[index][1] if index in self.given else {}
        numbers, source, order = self._numbers_of(index), self._source(index), self._order(index)
        declared = self.declared.get(index, {})
        return Raw(self._part(prompt).tobytes(), tuple(found), numbers, columns, source, order, declared)

    def _part(self, part: int) -> Values:
        return self._tokens[self._starts[part] : self._starts[part + 1]]

    def _flags_of(self, part: int) -> Values | None:
        begin, n = self._flags[part], self._starts[part + 1] - self._starts[part]
        return None if begin < 0 else self._trained[begin : begin + n]

    def _trained_of(self, part: int) -> Tensor | None:
        flags = self._flags_of(part)
        return None if flags is None else _tensor(flags).bool()

    def _numbers_of(self, i: int) -> dict[str, float]:
        return {name: float(column[i]) for name, column in self._numbers.items() if not math.isnan(column[i])}

    def _source(self, i: int) -> str:
        return [*self._sources][self._source_of[i]]

    def _order(self, i: int) -> float | None:
        order = float(self._orders[i])
        return None if math.isnan(order) else order

    def _row(self, i: int) -> int:
        row = int(self._rows[i])
        return row if self._file[i] < 0 else RowNumber(row, int(self._own[i]), [*self._files][self._file[i]])


def _tensor(values: Values) -> Tensor:
    return torch.from_numpy(np.array(values))  # a copy: an array may move while it grows, a file may be read-only
