"""Rows in any known form -> validated rows of the kind that a method needs.

    dataset = load("pairs.jsonl", "pairs")
    dataset = load("gsm8k.jsonl", "prompts", columns={"prompt": "question"})

The form is detected from the columns: the first of FORMS that is present and provides the kind. How a row of one form
is converted to another kind:

    pairs -> unpaired   the chosen answer desirable, the rejected one undesirable: two rows with one number
    pairs -> text       the chosen answer only
    ranked -> pairs     the best-scored against the worst-scored answer: one pair per row, so that a long list weighs
                        as much as a short one; equal scores are a tie
    unpaired -> text    the desirable answers only
    messages -> text    the completion begins at the first assistant message
    rated -> pairs      the rows of one prompt are joined, then as for ranked
    any -> prompts      the prompt; all other columns stay in `Row.extra` for reward functions

Ties, empty answers and equal answers occur in real data: such rows are dropped and counted. Values that are certainly
wrong (None, a wrong type, an unknown role) are faults, and all faults of a source are raised together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, get_args

from alignkit.data.columns import check_there
from alignkit.data.convert import Wanted, converted
from alignkit.data.detection import detect
from alignkit.data.forms import KINDS, OUR_COLUMNS, Form
from alignkit.data.rows import Fault, FaultyRowsError, Message, RawRows, Report, Row
from alignkit.data.sources import read_rows
from alignkit.data_spec import short_names
from alignkit.errors import ConfigError, DataError, nearest
from alignkit.method import DataKind

__all__ = ["Dataset", "Fault", "FaultyRowsError", "Message", "RawRows", "Report", "Row", "load", "read_rows"]


@dataclass(frozen=True)
class Dataset:
    """Validated rows of one kind.

    rows: in the source's order. kind: what the method reads. form: the detected form; of several sources with different
    forms, all of them. source: its name for messages. report: the dropped rows, with row numbers. kinds: what the rows
    can be read as. parts: the data sets of several sources; their rows are joined in `rows`. weights: of a mixture's
    sources, by their names.
    """

    rows: list[Row]
    kind: DataKind
    form: str
    source: str
    report: Report
    kinds: tuple[DataKind, ...] = KINDS
    parts: tuple[Dataset, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def found(self) -> list[str]:
        """Return a line for each source: the form that was found, and the kind that it is read as."""
        if self.parts:
            return [line for part in self.parts for line in part.found()]
        return [f"{self.source}: {self.report.total} rows of the form '{self.form}', read as {self.kind}"]

    def lines(self) -> list[str]:
        """Return the lines to print: what was found, then the dropped rows."""
        return [*self.found(), *self.report.lines()]


def load(
    source: object,
    kind: DataKind,
    columns: Mapping[str, str] | None = None,
    may_be_empty: bool = False,
    wanted: Wanted | None = None,
) -> Dataset:
    """Read, check and convert all rows of `source` to what a method with `data = kind` needs.

    source: as for `read_rows`; each of several sources has its own form. columns: {our column: the source's} where
    names differ; "form" sets the form's name. may_be_empty: return a data set whose rows were all dropped. wanted:
    columns that the method reads besides those of the form. Raises
    ConfigError for an unknown kind, column name or form; DataError where the form does not provide the kind or no row
    is left; FaultyRowsError (a DataError) with all faults of the rows.
    """
    if kind not in get_args(DataKind):
        raise ConfigError(f"unknown kind of data '{kind}'.{nearest(kind, KINDS)} Kinds: {', '.join(KINDS)}")
    raw = read_rows(source)
    if not raw.parts:
        return _converted(raw, kind, columns, may_be_empty, wanted)
    parts, faults = list[Dataset](), list[Fault]()
    for part in raw.parts:
        try:
            parts.append(_converted(part, kind, columns, may_be_empty, wanted))
        except FaultyRowsError as error:
            faults += error.faults
    if faults:
        raise FaultyRowsError(raw.source, faults)
    return _together(raw, kind, parts)


def _together(raw: RawRows, kind: DataKind, parts: Sequence[Dataset]) -> Dataset:
    """Join the data sets of several sources; each row keeps the name of its source."""
    names = short_names([part.source for part in parts])
    rows = [replace(row, source=name) for name, part in zip(names, parts, strict=True) for row in part.rows]
    report = Report()
    for part in parts:
        report += part.report
    report.total = sum(part.report.total for part in parts)
    forms = list(dict.fromkeys(part.form for part in parts))
    kinds = tuple(k for k in KINDS if all(k in part.kinds for part in parts))
    weights = {name: part.weight for name, part in zip(names, raw.parts, strict=True) if part.weight is not None}
    return Dataset(rows, kind, ", ".join(forms), raw.source, report, kinds, tuple(parts), weights)


def of_forms(columns: Mapping[str, str] | None) -> dict[str, str] | None:
    """Return the names of columns without those that a method declares, to read rows without the method."""
    return None if columns is None else {k: v for k, v in columns.items() if k in (*OUR_COLUMNS, "form")}


class Reading(NamedTuple):
    """How the rows of a source are read: their form, the kind that they become, and the names of columns.

    margins: whether every row must have a margin. wanted: the columns that the method reads besides.
    """

    form: Form
    kind: DataKind
    columns: Mapping[str, str]
    margins: bool
    wanted: Wanted = {}  # noqa: RUF012

    def rows(self, raw: RawRows) -> tuple[list[Row], Report]:
        """Check and convert rows, also a part of a source. Raises FaultyRowsError with the faults of all of them."""
        rows, report, faults = self.converted(raw)
        if faults:
            raise FaultyRowsError(raw.source, faults)
        return rows, report

    def converted(self, raw: RawRows) -> tuple[list[Row], Report, list[Fault]]:
        """Check and convert rows, also a part of a source; return also what was dropped, and all faults."""
        return converted(_under_our_names(raw, self.columns), self.form, self.kind, self.margins, self.wanted)


def reading_of(
    raw: RawRows, kind: DataKind, columns: Mapping[str, str] | None, wanted: Wanted | None = None
) -> Reading:
    """Return how a source is read, by its rows or by the first of them. Raises DataError, ConfigError.

    wanted: the columns that the method reads besides those of the form.
    """
    names, wanted = dict(columns or {} if raw.columns is None else raw.columns), wanted or {}
    forced = names.pop("form", None)
    renamed = _renamed(raw, names, wanted)
    if not raw.rows:
        raise FaultyRowsError(raw.source, raw.faults) if raw.faults else DataError(f"{raw.source}: holds no rows")
    # a margin in some rows only is a fault in the others: a column that is half empty cannot be averaged
    margins = kind == "pairs" and any("margin" in cells for _, cells in renamed)
    form = detect(renamed, kind, forced)
    check_there(raw.source, wanted, {column for _, cells in renamed for column in cells})
    return Reading(form, kind, names, margins, wanted)


def _converted(
    raw: RawRows, kind: DataKind, columns: Mapping[str, str] | None, may_be_empty: bool, wanted: Wanted | None
) -> Dataset:
    """Check and convert the rows of one source."""
    reading = reading_of(raw, kind, columns, wanted)
    rows, report = reading.rows(raw)
    if not rows and not may_be_empty:
        raise DataError(f"{raw.source}: no row is left; {'; '.join(report.lines())}")
    return Dataset(rows, kind, reading.form.name, raw.source, report, reading.form.kinds)


def _renamed(raw: RawRows, wanted: Mapping[str, str], more: Iterable[str] = ()) -> RawRows:
    """Return the rows under our column names. more: names that the method declares."""
    known = [*OUR_COLUMNS, *more, "form"]
    for ours in wanted:
        if ours not in known:
            raise ConfigError(f"columns: unknown name '{ours}'.{nearest(ours, known)} Names: {', '.join(known)}")
    if not wanted or not raw.rows:
        return raw
    found = {column for _, cells in raw for column in cells}
    for ours, theirs in wanted.items():
        if theirs not in found:
            there = ", ".join(sorted(found))
            hint = nearest(theirs, found)
            raise DataError(
                f"{raw.source}: no column '{theirs}', which `columns` names for {ours}.{hint} Columns: {there}"
            )
    return _under_our_names(raw, wanted)


def _under_our_names(raw: RawRows, wanted: Mapping[str, str]) -> RawRows:
    taken = set(wanted.values())
    rows = []
    for number, cells in raw if wanted else ():
        rest = {column: value for column, value in cells.items() if column not in taken}
        rows.append((number, {**rest, **{ours: cells[theirs] for ours, theirs in wanted.items() if theirs in cells}}))
    return replace(raw, rows=rows) if wanted else raw
