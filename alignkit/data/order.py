"""The order in which rows are read, and the source of each: what the stream needs to know of an example's row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from alignkit.data.dataset import Dataset
from alignkit.data.rows import Fault, FaultyRowsError, Row, shown
from alignkit.errors import DataError, nearest
from alignkit.types import Example


def tagged(examples: Sequence[Example], dataset: Dataset, order_by: str | None) -> list[Example]:
    """Return the examples with the sources of their rows, and with their places in the column `order_by`.

    order_by: "column" from the smallest number to the largest, "-column" from the largest. Raises DataError without
    such a column, FaultyRowsError for rows without a number in it.
    """
    if order_by is None and not dataset.parts:
        return list(examples)
    places = _places(dataset, order_by) if order_by is not None else {}
    sources = {row.row: row.source for row in dataset.rows}
    return [replace(e, source=sources[e.row], order=places.get(e.row)) for e in examples]


def _places(dataset: Dataset, order_by: str) -> dict[int, float]:
    column, sign = (order_by[1:], -1.0) if order_by.startswith("-") else (order_by, 1.0)
    values = {row.row: _value(row, column) for row in dataset.rows}
    if all(value is None for value in values.values()):
        there = sorted({name for row in dataset.rows for name in (*row.extra, *row.numbers)})
        raise DataError(
            f"{dataset.source}: no column '{column}', which `order_by` names.{nearest(column, there)} Columns that the "
            f"form '{dataset.form}' leaves: {', '.join(there) or 'none'}"
        )
    numbers = {row: _number(value) for row, value in values.items()}
    if wrong := [row for row, number in numbers.items() if not math.isfinite(number)]:
        fix = "give a finite number, by which the row is ordered"
        faults = [Fault(row, column, f"found {shown(values[row])}", fix) for row in wrong]
        raise FaultyRowsError(dataset.source, faults)
    return {row: sign * number for row, number in numbers.items()}


def _value(row: Row, column: str) -> object:
    return row.extra.get(column, row.numbers.get(column))


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return math.nan
