"""Parsed rows -> rows of the kind that a method needs; what is dropped, and what is a fault."""

from __future__ import annotations

from collections.abc import Mapping

from alignkit.data.cells import REASONING, Cells
from alignkit.data.columns import read_columns
from alignkit.data.forms import Form, Parsed, parse
from alignkit.data.rows import Content, DroppedRow, Fault, RawRows, Report, Row
from alignkit.data.scored import grouped
from alignkit.method import ColumnType, DataKind

Wanted = Mapping[str, ColumnType]
OF_TEMPLATES = ("tools", "documents", "chat_template_kwargs", "system")  # noted where no template reads them


def converted(
    raw: RawRows, form: Form, kind: DataKind, margins: bool, wanted: Wanted
) -> tuple[list[Row], Report, list[Fault]]:
    """Convert rows of `form` to rows of `kind`; return also what was dropped, and all faults.

    margins: every row must have a margin. wanted: the columns that the method reads besides.
    """
    report = Report(total=len(raw))
    if form.name == "rated" and kind == "pairs":
        raw = RawRows(raw.source, grouped(raw.rows), raw.textual, raw.faults)
    rows: list[Row] = []
    known = {*wanted, *OF_TEMPLATES}
    faults = list(raw.faults)
    for number, cells in raw:
        reader = Cells(number, cells, raw.textual)
        try:
            found = _convert(parse(reader, form, kind), form, kind, reader, margins, wanted)
            report.left |= dict.fromkeys(c for row in found for c in row.extra if c not in known)
            rows.extend(found if not reader.faults else ())
        except DroppedRow as dropped:
            if not reader.faults:
                report.drop(str(dropped), number)
        if "system" not in form.asked and isinstance(system := cells.get("system"), str) and system.strip():
            report.note(f"rows with a column 'system', which the form '{form.name}' does not read", number)
        for note in reader.notes:
            report.note(note, number)
        faults += reader.faults
    return rows, report, faults


def _convert(parsed: Parsed, form: Form, kind: DataKind, cells: Cells, margins: bool, wanted: Wanted) -> list[Row]:
    """Convert one parsed row to rows of `kind`, or drop it."""
    numbers: dict[str, float] = {}
    used = set(form.asked) if kind == "prompts" else {"prompt", *form.columns, *form.asked}
    if margins:
        numbers["margin"] = cells.number_of("margin", cells.cells.get("margin"))
        used.add("margin")
    extra = {column: value for column, value in cells.cells.items() if column not in used}

    beside = isinstance(parsed.prompt, list) or any(cells.cells.get(name) for name in ("tools", "chat_template_kwargs"))
    template = cells.beside() if beside else {}
    declared = read_columns(cells, wanted)

    def row(*answers: Content, **more: float) -> Row:
        return Row(
            parsed.prompt, answers, {**numbers, **more}, cells.number, extra, template=template, declared=declared
        )

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
    """Return whether there is nothing to learn: neither text, nor reasoning, nor a tool call."""
    if isinstance(content, str):
        return not content.strip()
    said = [content[-1].get(name) for name in ("content", *REASONING)]
    return not any(isinstance(text, str) and text.strip() for text in said) and not content[-1].get("tool_calls")
