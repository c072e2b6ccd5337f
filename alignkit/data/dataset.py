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

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from alignkit.data.cells import Cells
from alignkit.data.forms import FORMS, KINDS, OUR_COLUMNS, Form, Parsed, parse
from alignkit.data.rows import Content, DroppedRow, Fault, FaultyRowsError, Message, RawRows, Report, Row
from alignkit.data.scored import grouped
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


def load(source: object, kind: DataKind, columns: Mapping[str, str] | None = None) -> Dataset:
    """Read, check and convert all rows of `source` to what a method with `data = kind` needs.

    source: as for `read_rows`; each of several sources has its own form. columns: {our column: the source's} where
    names differ; "form" sets the form's name. Raises ConfigError for an unknown kind, column name or form; DataError
    where the form does not provide the kind or no row is left; FaultyRowsError (a DataError) with all faults of the
    rows.
    """
    if kind not in get_args(DataKind):
        raise ConfigError(f"unknown kind of data '{kind}'.{nearest(kind, KINDS)} Kinds: {', '.join(KINDS)}")
    raw = read_rows(source)
    if not raw.parts:
        return _converted(raw, kind, columns)
    parts, faults = list[Dataset](), list[Fault]()
    for part in raw.parts:
        try:
            parts.append(_converted(part, kind, columns))
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


def _converted(raw: RawRows, kind: DataKind, columns: Mapping[str, str] | None) -> Dataset:
    """Check and convert the rows of one source."""
    wanted = dict(columns or {} if raw.columns is None else raw.columns)
    forced = wanted.pop("form", None)
    raw = _renamed(raw, wanted)
    if not raw.rows:
        raise FaultyRowsError(raw.source, raw.faults) if raw.faults else DataError(f"{raw.source}: holds no rows")
    form = _detect(raw, kind, forced)
    report = Report(total=len(raw))
    if form.name == "rated" and kind == "pairs":
        raw = RawRows(raw.source, grouped(raw.rows), raw.textual, raw.faults)
    # a margin in some rows only is a fault in the others: a column that is half empty cannot be averaged
    margins = kind == "pairs" and any("margin" in cells for _, cells in raw)
    rows: list[Row] = []
    faults = list(raw.faults)
    for number, cells in raw:
        reader = Cells(number, cells, raw.textual)
        try:
            found = _convert(parse(reader, form, kind), form, kind, reader, margins)
            rows.extend(found if not reader.faults else ())
        except DroppedRow as dropped:
            if not reader.faults:
                report.drop(str(dropped), number)
        if "system" not in form.asked and isinstance(system := cells.get("system"), str) and system.strip():
            report.note(f"rows with a column 'system', which the form '{form.name}' does not read", number)
        faults += reader.faults
    if faults:
        raise FaultyRowsError(raw.source, faults)
    if not rows:
        raise DataError(f"{raw.source}: no row is left; {'; '.join(report.lines())}")
    return Dataset(rows, kind, form.name, raw.source, report, form.kinds)


def _renamed(raw: RawRows, wanted: Mapping[str, str]) -> RawRows:
    """Return the rows under our column names."""
    for ours in wanted:
        if ours not in OUR_COLUMNS:
            names = ", ".join([*OUR_COLUMNS, "form"])
            raise ConfigError(f"columns: unknown name '{ours}'.{nearest(ours, [*OUR_COLUMNS, 'form'])} Names: {names}")
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
    taken = set(wanted.values())
    rows = []
    for number, cells in raw:
        rest = {column: value for column, value in cells.items() if column not in taken}
        rows.append((number, {**rest, **{ours: cells[theirs] for ours, theirs in wanted.items() if theirs in cells}}))
    return replace(raw, rows=rows)


def _detect(raw: RawRows, kind: DataKind, forced: str | None) -> Form:
    # a column counts where half of the rows have it, so that a single odd row does not decide for all
    seen = Counter(column for _, cells in raw for column in cells)
    columns = {column for column, n in seen.items() if 2 * n >= len(raw)}
    known = {form.name for form in FORMS}
    if forced is not None and forced not in known:
        raise ConfigError(
            f"columns: unknown form '{forced}'.{nearest(forced, known)} Forms: {', '.join(sorted(known))}"
        )
    present = [f for f in FORMS if columns.issuperset(f.columns) and forced in (None, f.name)]
    serving = [form for form in present if kind in form.kinds]
    if serving:
        return serving[0]
    raise DataError(_mismatch(raw.source, kind, columns, present, forced))


def _mismatch(source: str, kind: DataKind, columns: set[str], present: list[Form], forced: str | None) -> str:
    """Return what was found, what is needed, and what to type."""
    serving = [form for form in FORMS if kind in form.kinds]
    ours = [form for form in serving if form.rewrite is None or form.name == "messages"]
    choices = list(dict.fromkeys(form.name for form in ours))
    listed = "; ".join(next(" + ".join(form.columns) for form in ours if form.name == name) for name in choices)
    if others := dict.fromkeys(form.name for form in serving if form not in ours):
        listed += f"; or rows of {', '.join(others)} (docs/data.md)"
    if present:
        found = f"found rows of the form '{present[0].name}' ({' + '.join(present[0].columns)})"
    elif forced is not None:
        wants = " or ".join(" + ".join(form.columns) for form in FORMS if form.name == forced)
        found = f"the form '{forced}' needs the columns {wants}; found {', '.join(sorted(columns))}"
    else:
        found = f"found the columns {', '.join(sorted(columns)) or '(none)'}, which match no known form"
    wanted = {"pairs": "pairs", "unpaired": "unpaired", "text": "completion", "prompts": "prompt"}[kind]
    example = ", ".join(f"{c}: <yours>" for c in next(form.columns for form in FORMS if form.name == wanted))
    return (
        f"{source}: {found}.\n"
        f"The method needs {kind}, which can be read from: {listed}.\n"
        f"Map your columns (columns: {{{example}}}), or choose a method that reads this data."
    )


def _convert(parsed: Parsed, form: Form, kind: DataKind, cells: Cells, margins: bool) -> list[Row]:
    """Convert one parsed row to rows of `kind`, or drop it."""
    numbers: dict[str, float] = {}
    used = set(form.asked) if kind == "prompts" else {"prompt", *form.columns, *form.asked}
    if margins:
        numbers["margin"] = cells.number_of("margin", cells.cells.get("margin"))
        used.add("margin")
    extra = {column: value for column, value in cells.cells.items() if column not in used}

    def row(*answers: Content, **more: float) -> Row:
        return Row(parsed.prompt, answers, {**numbers, **more}, cells.number, extra)

    if kind == "prompts" and not cells.faults:
        if _is_empty(parsed.prompt):
            raise DroppedRow("empty prompts")
        return [row()]
    if cells.faults:
        return []
    answers = parsed.answers[:1] if kind == "text" else parsed.answers
    if any(_is_empty(answer) for answer in answers):
        raise DroppedRow("empty answers")
    if len(answers) == 2 and answers[0] == answers[1]:
        raise DroppedRow("identical answers")
    if kind == "text" and not parsed.label:
        raise DroppedRow("with an undesirable answer")
    if kind == "unpaired" and len(answers) == 2:
        return [row(answers[0], desirable=1.0), row(answers[1], desirable=0.0)]
    return [row(*answers, desirable=float(parsed.label))] if kind == "unpaired" else [row(*answers)]


def _is_empty(content: Content) -> bool:
    return not (content if isinstance(content, str) else content[-1]["content"]).strip()
