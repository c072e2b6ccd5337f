"""A source's rows -> examples, block by block: the text of a block is dropped once it is tokenised."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from alignkit.data.dataset import Dataset, Reading, reading_of
from alignkit.data.order import Order
from alignkit.data.plain import Tokenised
from alignkit.data.rows import Fault, FaultyRowsError, RawRows, Report, Row
from alignkit.data.sources import Lazy, lazy_parts
from alignkit.data.store import Examples
from alignkit.data_spec import short_names
from alignkit.errors import DataError
from alignkit.method import DataKind

BLOCK = 1024  # rows

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
    source: object, kind: DataKind, columns: Mapping[str, str] | None, encode: Encode, order_by: str | None = None
) -> Encoded:
    """Read, check, convert and tokenise all rows of a source, as `load` and `encode` do for all of them at once.

    order_by: a column whose number each example gets as its `order`. Raises what `load` and `encode` raise; the faults
    of all rows together, those of the template after those of the rows.
    """
    name, parts = lazy_parts(source)
    work = _Work(kind, columns, encode, Order(order_by) if order_by is not None else None)
    names = short_names([part.name for part in parts]) if len(parts) > 1 else [""]
    for part, short in zip(parts, names, strict=True):
        work.read(part, short)
        if part.weight is not None:
            work.made.weights[short] = part.weight
    return work.checked(name)


@dataclass
class _Work:
    """The parts of a source that were read so far. faults: of the rows. of_template: what the template refused."""

    kind: DataKind
    columns: Mapping[str, str] | None
    encode: Encode
    order: Order | None
    made: Encoded = field(default_factory=Encoded)
    faults: list[Fault] = field(default_factory=list)
    of_template: list[Fault] = field(default_factory=list)

    def read(self, part: Lazy, short: str) -> None:
        """Add the examples of a part. short: its name in a mixture. Raises DataError where none is left."""
        reading = reading_of(_outline(part), self.kind, self.columns)
        whole = reading.form.name == "rated" and self.kind == "pairs"  # joins rows that may be anywhere
        total, before = 0, len(self.made.examples)
        for raw in _blocks(part, whole):
            total += len(raw)
            self._add(part, short, reading, raw)
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
            examples, later = self.encode(_dataset(part, reading, rows, Report(len(raw))))
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


def _outline(part: Lazy) -> RawRows:
    """Return the rows of a part without their cells' values: the names of columns decide the form."""
    raw = RawRows(part.name, textual=part.textual, columns=part.columns)
    kinds: dict[tuple[str, ...], dict[str, None]] = {}
    for item in part.items():
        if isinstance(item, Fault):
            raw.faults.append(item)
        elif isinstance(item[1], Mapping):
            names = tuple(item[1])
            raw.rows.append((0, kinds.setdefault(names, dict.fromkeys(names))))
        else:
            raw.add(*item)
    return raw


def _blocks(part: Lazy, whole: bool) -> Iterator[RawRows]:
    items = iter(part.items())
    size = None if whole else BLOCK
    while block := list(itertools.islice(items, size)):
        yield part.raw(block)
