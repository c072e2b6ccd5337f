"""Rows as they were read, the faults found in them, and the report of what was dropped.

This module knows neither the form of a row nor a tokenizer; `alignkit.data.dataset` interprets the rows.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from alignkit.errors import DataError

Message: TypeAlias = dict[str, Any]
Content: TypeAlias = str | list[Message]
_SHOWN_ROWS = 8


class RowNumber(int):
    """The number of a row of several files: it counts on from file to file, and shows as "17 of part-2.jsonl".

    own: the number in the row's own file. file: that file's name.
    """

    own: int
    file: str

    def __new__(cls, number: int, own: int, file: str) -> RowNumber:
        made = super().__new__(cls, number)
        made.own, made.file = own, file
        return made

    def __getnewargs__(self) -> tuple[int, int, str]:  # type: ignore[override]
        return int(self), self.own, self.file

    def __str__(self) -> str:
        return f"{self.own} of {self.file}"


class DroppedRow(Exception):
    """A row that is valid but cannot be used; its text is the reason in the report."""


@dataclass(frozen=True)
class Row:
    """One validated row.

    prompt: text, or messages. completions: of the prompt's type; the chosen one of a pair comes first; empty where the
    method samples its own. numbers: "margin" (pairs that have one) or "desirable" (1.0 or 0.0, unpaired).
    row: 1-based row of the source (the line of a JSONL file; a RowNumber where there are several files). extra:
    columns that the form does not use. source: the name of its source in a mixture. template: what the row gives to the
    chat template beside its messages: tools, documents, variables. declared: values of the columns that the method
    reads, see `alignkit.data.columns`.
    """

    prompt: Content
    completions: tuple[Content, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    row: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    template: Mapping[str, Any] = field(default_factory=dict)
    declared: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """A part of a row that cannot be used: where, what was found, and how to fix it. column "" is the whole row."""

    row: int
    column: str
    found: str
    fix: str

    def __str__(self) -> str:
        place = f"row {self.row}, column '{self.column}'" if self.column else f"row {self.row}"
        return f"{place}: {self.found}; {self.fix}"


class FaultyRowsError(DataError):
    """All faults of one source. `faults` holds all of them; the message shows the first ones in at most six lines."""

    def __init__(self, source: str, faults: Iterable[Fault]) -> None:
        self.faults = sorted(faults, key=lambda fault: fault.row)
        n = len(self.faults)
        shown = self.faults if n <= 5 else self.faults[:4]
        lines = [f"{source}: {n} {'fault' if n == 1 else 'faults'}", *(f"  {fault}" for fault in shown)]
        if n > len(shown):
            lines.append(f"  ... and {n - len(shown)} more")
        super().__init__("\n".join(lines))


def shown(value: object, width: int = 60) -> str:
    """Return `value` as repr on one line, shortened to `width` characters."""
    text = repr(value[: width * 2] if isinstance(value, str) else value)
    return text if len(text) <= width else text[: width - 3] + "..."


# reasons are plural phrases; these have another singular
_SINGULAR = {"ties": "tie", "empty answers": "empty answer", "empty prompts": "empty prompt"}


@dataclass
class Report:
    """The rows of `total` that were dropped, each with the reason, and notes about rows that were kept.

    dropped, noted: reason -> 1-based rows of the source. left: columns that neither the form nor the method reads.
    """

    total: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    noted: dict[str, list[int]] = field(default_factory=dict)
    left: dict[str, None] = field(default_factory=dict)

    def drop(self, reason: str, row: int) -> None:
        """Count a row that is dropped."""
        self.dropped.setdefault(reason, []).append(row)

    def note(self, reason: str, row: int) -> None:
        """Count a note about a row that is kept."""
        self.noted.setdefault(reason, []).append(row)

    @property
    def n_dropped(self) -> int:
        """Number of the source's rows that were dropped, in whole or in part."""
        return len({row for rows in self.dropped.values() for row in rows})

    def __add__(self, later: Report) -> Report:
        """Join the reports of two stages over the same source, the earlier one first."""
        joined = Report(self.total or later.total)
        for part in (self, later):
            for reason, rows in part.dropped.items():
                joined.dropped.setdefault(reason, []).extend(rows)
            for reason, rows in part.noted.items():
                joined.noted.setdefault(reason, []).extend(rows)
            joined.left |= part.left
        return joined

    def lines(self) -> list[str]:
        """Return the lines to print: one for all dropped rows, one for each note; empty without either."""
        lines = []
        if self.dropped:
            reasons = ", ".join(_counted(reason, rows) for reason, rows in self.dropped.items())
            lines.append(f"dropped {self.n_dropped} of {self.total} rows: {reasons}")
        return lines + [_counted(reason, rows) for reason, rows in self.noted.items()]


def _counted(reason: str, rows: list[int]) -> str:
    """Return "2 identical answers (rows 17, 204)"."""
    distinct = list(dict.fromkeys(rows))
    numbers = ", ".join(map(str, distinct[:_SHOWN_ROWS])) + (", ..." if len(distinct) > _SHOWN_ROWS else "")
    name = _SINGULAR.get(reason, reason) if len(rows) == 1 else reason
    return f"{len(rows)} {name} ({'row' if len(distinct) == 1 else 'rows'} {numbers})"


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a columnar file without the null fields of its objects; its own null columns stay.

    There all objects of a list have the same fields, null where one has none: the arguments of other tools, say.
    """
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


@dataclass
class RawRows:
    """Rows as they were read.

    source: its name for messages. rows: (1-based number, columns). textual: every cell is text, as in a CSV file.
    faults: rows that could not be read at all. parts: the sources that these rows come from, where there are several;
    each is checked and converted by itself. columns: a source's own names of columns, instead of the run's.
    weight: of a source in a mixture.
    """

    source: str
    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    textual: bool = False
    faults: list[Fault] = field(default_factory=list)
    parts: list[RawRows] = field(default_factory=list)
    columns: Mapping[str, str] | None = None
    weight: float | None = None

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, number: int, row: object) -> None:
        """Append a row, or a fault where it is not an object with named columns."""
        if isinstance(row, Mapping):
            self.rows.append((number, dict(row)))
        else:
            fix = 'make it an object such as {"prompt": "...", "chosen": "...", "rejected": "..."}'
            self.faults.append(Fault(number, "", f"found {shown(row)}", fix))

    def numbered_from(self, before: int) -> RawRows:
        """Return the same rows with numbers that count on from `before`, and that name their file."""

        def number(n: int) -> RowNumber:
            own, file = (n.own, n.file) if isinstance(n, RowNumber) else (n, self.source)
            return RowNumber(before + n, own, file)

        rows: list[tuple[int, dict[str, Any]]] = [(number(n), cells) for n, cells in self.rows]
        faults = [replace(fault, row=number(fault.row)) for fault in self.faults]
        return replace(self, rows=rows, faults=faults)

    def only(self, numbers: Container[int]) -> RawRows:
        """Return the rows with these numbers, without the faults."""
        rows = [(n, cells) for n, cells in self.rows if n in numbers]
        return replace(self, rows=rows, faults=[], parts=[part.only(numbers) for part in self.parts])

    @property
    def last(self) -> int:
        """The largest row number, 0 without rows."""
        return max([0, *(n for n, _ in self.rows), *(fault.row for fault in self.faults)])


def joined(source: str, parts: Iterable[RawRows]) -> RawRows:
    """Join the rows of several files or sources in their order; see `RowNumber`."""
    whole = RawRows(source)
    last = 0
    for part in parts:
        own = part.numbered_from(last)
        last = own.last or last
        whole.parts.append(own)
        whole.rows += own.rows
        whole.faults += own.faults
    whole.textual = all(part.textual for part in whole.parts)
    return whole
