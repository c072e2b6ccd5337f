"""The order in which rows are read, and the source of each: what the stream needs to know of an example's row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alignkit.data.dataset import Dataset
from alignkit.data.rows import Fault, FaultyRowsError, Row, shown
from alignkit.errors import DataError, nearest


class Order:
    """Places of rows in the column of `order_by`: "column" from the smallest number, "-column" from the largest."""

    def __init__(self, order_by: str) -> None:
        self._column = order_by.removeprefix("-")
        self._sign = -1.0 if order_by.startswith("-") else 1.0
        self._wrong: list[tuple[int, object]] = []
        self._there: set[str] = set()
        self._found = False

    def of(self, rows: Sequence[Row]) -> dict[int, float]:
        """Return the places of rows that have a number; `check` raises for the others."""
        values = {row.row: _value(row, self._column) for row in rows}
        numbers = {row: _number(value) for row, value in values.items()}
        self._wrong += [(row, values[row]) for row, number in numbers.items() if not math.isfinite(number)]
        self._found = self._found or any(value is not None for value in values.values())
        self._there.update(name for row in rows for name in (*row.extra, *row.numbers))
        return {row: self._sign * number for row, number in numbers.items() if math.isfinite(number)}

    def check(self, source: str, datasets: Sequence[Dataset]) -> None:
        """Raise DataError without such a column, FaultyRowsError for rows without a number in it."""
        if not self._found:
            there = sorted(self._there)
            forms = ", ".join(dict.fromkeys(dataset.form for dataset in datasets))
            raise DataError(
                f"{source}: no column '{self._column}', which `order_by` names.{nearest(self._column, there)} Columns "
                f"that the form '{forms}' leaves: {', '.join(there) or 'none'}"
            )
        if self._wrong:
            fix = "give a finite number, by which the row is ordered"
            faults = [Fault(row, self._column, f"found {shown(value)}", fix) for row, value in self._wrong]
            raise FaultyRowsError(source, faults)


def _value(row: Row, column: str) -> object:
    return row.extra.get(column, row.numbers.get(column))


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return math.nan
