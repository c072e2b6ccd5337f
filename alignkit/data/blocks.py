"""A source's rows -> examples, block by block: the text of a block is dropped once it is tokenised."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

from alignkit.data.convert import Wanted
from alignkit.data.dataset import Dataset, Reading, reading_of
from alignkit.data.files import Item
from alignkit.data.order import Order
from alignkit.data.plain import Tokenised
from alignkit.data.rows import Fault, FaultyRowsError, RawRows, Report, Row
from alignkit.data.sources import Lazy, lazy_parts
from alignkit.data.store import Examples
from alignkit.data_spec import short_names
from alignkit.errors import AlignkitError, DataError
from alignkit.method import DataKind

BLOCK = 1024  # rows

Progress: TypeAlias = Callable[[int], object]
Encode: TypeAlias = Callable[[Dataset], tuple[list[Tokenised], Report]]


@dataclass
class Encoded:
    """The examples of a source. datasets: what each of its parts was read as, without rows. weights: of a mixture."""

    examples: Examples = field(default_factory=Examples)
    datasets: list[Dataset] = field(default_factory=list)
    report: Report = field(default_factory=Report)
    weights: dict[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the lines to print: what was found in each part, then the dropped rows and the notes."""
        return [*(line for dataset in self.datasets for line in dataset.found()), *self.report.lines()]


def encoded(
    source: object,
    kind: DataKind,
    columns: Mapping[str, str] | None,
    encode: Encode,
    order_by: str | None = None,
    wanted: Wanted | None = None,
    progress: Progress | None = None,
) -> Encoded:
    """Read, check, convert and tokenise all rows of a source, as `load` and `encode` do for all of them at once.

    order_by: a column whose number each example gets as its `order`. wanted: columns that the method reads. progress:
    called with the rows read so far. Raises what `load` and `encode` raise; the faults of all rows together, those of
    the template after those of the rows.
    """
    how = _How(kind, columns, encode, order_by, wanted, progress)
    try:
        return _encoded(source, how, ahead=False)
    except _OtherReadingError:
        return _encoded(source, how, ahead=True)


def _encoded(source: object, how: _How, ahead: bool) -> Encoded:
    name, parts = lazy_parts(source)
    work = _Work(how, ahead, Order(how.order_by) if how.order_by is not None else None)
    names = short_names([part.name for part in parts]) if len(parts) > 1 else [""]
    for part, short in zip(parts, names, strict=True):
        work.read(part, short)
        if part.weight is not None:
            work.made.weights[short] = part.weight
    return work.checked(name)


class _How(NamedTuple):
    kind: DataKind
    columns: Mapping[str, str] | None
    encode: Encode
    order_by: str | None
    wanted: Wanted | None
    progress: Progress | None

    def reading_of(self, outline: RawRows) -> Reading:
        return reading_of(outline, self.kind, self.columns, self.wanted)


class _OtherReadingError(Exception):
    """The first block of a source does not tell how the whole source is read."""


@dataclass
class _Work:
    """The parts of a source that were read so far. faults: of the rows. of_template: what the template refused.

    ahead: all rows are read a first time, to find how they are read; else the first block decides, and the others are
    compared with it: for nearly every source, that is one pass instead of two.
    """

    how: _How
    ahead: bool
    order: Order | None
    made: Encoded = field(default_factory=Encoded)
    faults: list[Fault] = field(default_factory=list)
    of_template: list[Fault] = field(default_factory=list)
    n_read: int = 0

    def read(self, part: Lazy, short: str) -> None:
        """Add the examples of a part. short: its name in a mixture. Raises DataError where none is left."""
        if self.ahead:
            self._convert(part, short, self.how.reading_of(_outline(part, part.items())), part.items())
            return
        rest = iter(part.items())
        first = list(itertools.islice(rest, BLOCK))
        try:
            reading = self.how.reading_of(_outline(part, first))
        except AlignkitError as error:
            raise _OtherReadingError from error
        outline = _outline(part, ())
        try:
            self._convert(part, short, reading, _noted(itertools.chain(first, rest), outline))
        except AlignkitError as error:
            # the rest may show that these rows should not have been read like this
            if self.how.reading_of(_outline(part, part.items())) != reading:
                raise _OtherReadingError from error
            raise
        if self.how.reading_of(outline) != reading:
            raise _OtherReadingError

    def _convert(self, part: Lazy, short: str, reading: Reading, items: Iterable[Item]) -> None:
        whole = reading.form.name == "rated" and reading.kind == "pairs"  # joins rows that may be anywhere
        total, before = 0, len(self.made.examples)
        for raw in _blocks(part, items, whole):
            total += len(raw)
            self._add(part, short, reading, raw)
            self.n_read += len(raw)
            if self.how.progress is not None:
                self.how.progress(self.n_read)
        self.made.datasets.append(_dataset(part, reading, [], Report(total)))
        if len(self.made.examples) == before and not (self.faults or self.of_template):
            raise DataError(f"{part.name}: no row is left; {'; '.join(self.made.report.lines())}")

    def _add(self, part: Lazy, short: str, reading: Reading, raw: RawRows) -> None:
        rows, report, found = reading.converted(raw)
        self.faults += found
        self.made.report += report
        if not rows or self.faults:
            return
        rows = [replace(row, source=short) for row in rows] if short else rows
        try:
            examples, later = self.how.encode(_dataset(part, reading, rows, Report(len(raw))))
        except FaultyRowsError as error:
            self.of_template += error.faults
            return
        self.made.report += later
        orders = self.order.of(rows) if self.order is not None else {}
        for example in examples:
            self.made.examples.add(example, short, orders.get(example.row))

    def checked(self, name: str) -> Encoded:
        """Return what was read. Raises FaultyRowsError and DataError; name: the source's."""
        made = self.made
        made.report.total = sum(dataset.report.total for dataset in made.datasets)
        if self.faults:
            raise FaultyRowsError(name, self.faults)
        if self.of_template:
            raise FaultyRowsError(f"{name}, in the chat template", self.of_template)
        if not made.examples:
            raise DataError(f"{name}: no usable row is left; {'; '.join(made.report.lines())}")
        if self.order is not None:
            self.order.check(name, made.datasets)
        return made


def _dataset(part: Lazy, reading: Reading, rows: list[Row], report: Report) -> Dataset:
    return Dataset(rows, reading.kind, reading.form.name, part.name, report, reading.form.kinds)


def _outline(part: Lazy, items: Iterable[Item]) -> RawRows:
    """Return rows without their cells' values: the names of columns decide the form."""
    outline = RawRows(part.name, textual=part.textual, columns=part.columns)
    for _ in _noted(items, outline):
        pass
    return outline


def _noted(items: Iterable[Item], outline: RawRows) -> Iterator[Item]:
    """Yield the items, and add them to the outline."""
    kinds: dict[tuple[str, ...], tuple[int, dict[str, Any]]] = {}
    for item in items:
        if isinstance(item, Fault):
            outline.faults.append(item)
        elif isinstance(item[1], Mapping):
            names = tuple(item[1])
            outline.rows.append(kinds.setdefault(names, (0, dict.fromkeys(names))))
        else:
            outline.add(*item)
        yield item


def _blocks(part: Lazy, items: Iterable[Item], whole: bool) -> Iterator[RawRows]:
    rest = iter(items)
    while block := list(itertools.islice(rest, None if whole else BLOCK)):
        yield part.raw(block)
