"""Rows that are read while the run goes on: only a buffer of them is in memory."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from alignkit.data.convert import Wanted
from alignkit.data.dataset import Dataset, reading_of
from alignkit.data.files import Item
from alignkit.data.rows import FaultyRowsError, RawRows, Report
from alignkit.data.sources import Lazy
from alignkit.data.stream import seed_of
from alignkit.errors import DataError, ModelError
from alignkit.method import DataKind
from alignkit.types import Example

PEEKED = 256  # rows at the beginning of the source that decide the form, and on which the model is probed

Encode = Callable[[Dataset], tuple[list[Example], Report]]


class Streamed:
    """The examples of each step, `batch_size` of them, read from a source that is never held as a whole.

    A pass reads every row once: each next row takes a random place in a buffer of `shuffle_buffer` rows, and the row
    that was there is used. After the last row the next pass begins, in another order. Rows are converted and tokenised
    in blocks of `batch_size`. Steps must be read one after the other; `state_dict` holds the position, and
    `load_state_dict` finds it again by reading the rows, without tokenising them.
    encode: tokenises rows. check: once the model is known, raises for examples that do not fit it. wanted: columns that
    the method reads. first: the examples of the first rows. left: columns of these that neither the form nor the method
    reads. Raises DataError for a source without usable rows, FaultyRowsError for faults of its first rows, and later
    for those of a block.
    """

    def __init__(
        self,
        source: Lazy,
        kind: DataKind,
        columns: Mapping[str, str] | None,
        encode: Encode,
        batch_size: int,
        seed: int,
        shuffle_buffer: int,
        wanted: Wanted | None = None,
    ) -> None:
        self._source, self._encode = source, encode
        self.check: Callable[[Sequence[Example]], None] | None = None
        self._batch_size, self._seed, self._buffer = batch_size, seed, shuffle_buffer
        raw = self._source.raw(itertools.islice(source.items(), PEEKED))
        self._reading = reading_of(raw, kind, columns if source.columns is None else source.columns, wanted)
        if self._reading.form.name == "rated" and kind == "pairs":
            raise DataError(
                f"{source.name}: rated rows become pairs by joining the rows of one prompt, which `streaming` cannot; "
                "write the pairs to a file"
            )
        self.first, report = self._examples(raw)
        self.left = report.left
        if not self.first:
            raise DataError(f"{source.name}: no usable row among the first; {'; '.join(report.lines())}")
        self._start()

    def _start(self) -> None:
        self._passes = self._blocks = self._step = self._dropped = 0
        self._left: list[Example] = []
        self._before = self._position = self._now()
        self._rows = self._endless()

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        """Return the optimiser steps of a run, which must be given: the number of rows is not known."""
        assert max_steps is not None
        return max_steps

    def __getitem__(self, step: int) -> tuple[Example, ...]:
        if step != self._step:
            raise IndexError(f"step {step} was asked for, but the stream is at step {self._step}")
        began = self._passes
        while len(self._left) < self._batch_size:
            if self._passes > began + 1 and not self._left:
                raise DataError(f"{self._source.name}: a whole pass over the rows gave nothing to train on")
            found, report = self._examples(self._block())
            self._left += found
            self._dropped += report.n_dropped
        taken, self._left = self._left[: self._batch_size], self._left[self._batch_size :]
        self._step += 1
        self._before, self._position = self._position, self._now()
        return tuple(taken)

    def metrics(self, step: int, examples: Sequence[Example]) -> dict[str, float]:
        """Return the complete passes over the source, the rows that were read, and how many of them were dropped."""
        return {"epoch": self._passes, "rows_read": self._blocks * self._batch_size, "rows_dropped": self._dropped}

    def lines(self) -> list[str]:
        """Return the line to print."""
        form, kind = self._reading.form.name, self._reading.kind
        return [f"{self._source.name}: rows of the form '{form}', read as {kind} while the run goes on"]

    def state_dict(self, step: int | None = None) -> dict[str, int]:
        """Return the position after the last step that was read whole, as JSON values.

        step: the steps that are done; one less than were read where the last one failed, and is repeated.
        """
        return dict(self._before if self._before["step"] == step else self._position)

    def _now(self) -> dict[str, int]:
        return {"step": self._step, "blocks": self._blocks, "left": len(self._left), "dropped": self._dropped}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Read the rows up to the position that `state_dict` returned; what is left of a block is tokenised again."""
        self._start()
        raw = None
        for _ in range(state["blocks"]):
            raw = self._block()
        if state["left"] and raw is not None:
            self._left = self._examples(raw)[0][-state["left"] :]
        self._step, self._dropped = state["step"], state["dropped"]
        self._before = self._position = self._now()

    def _block(self) -> RawRows:
        self._blocks += 1
        return self._source.raw(itertools.islice(self._rows, self._batch_size))

    def _examples(self, raw: RawRows) -> tuple[list[Example], Report]:
        """Return the examples of a block, and what was dropped."""
        if not raw.rows and raw.faults:
            raise FaultyRowsError(raw.source, raw.faults)
        rows, report = self._reading.rows(raw)
        if not rows:
            return [], report
        form = self._reading.form
        dataset = Dataset(rows, self._reading.kind, form.name, raw.source, report, form.kinds)
        examples, later = self._encode(dataset)
        if self.check is not None:
            try:
                self.check(examples)
            except ModelError as error:
                raise DataError(f"{raw.source}: {error}") from None
        return examples, report + later

    def _endless(self) -> Iterator[Item]:
        while True:
            empty = True
            for item in self._shuffled(self._passes):
                empty = False
                yield item
            if empty:
                raise DataError(f"{self._source.name}: no row in pass {self._passes + 1}; it cannot be read again")
            self._passes += 1

    def _shuffled(self, number: int) -> Iterator[Item]:
        """Yield the rows of one pass."""
        generator = random.Random(seed_of(self._seed, 10, number))
        buffer: list[Any] = []
        for item in self._source.items():
            if len(buffer) < self._buffer:
                buffer.append(item)
                continue
            at = generator.randrange(len(buffer))
            yield buffer[at]
            buffer[at] = item
        generator.shuffle(buffer)
        yield from buffer
