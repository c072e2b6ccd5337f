"""The columns that a method reads besides those of a form (`alignkit.Method.columns`): there, and of their type."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from alignkit.data.cells import Cells
from alignkit.data.rows import shown
from alignkit.errors import DataError, nearest
from alignkit.method import ColumnType

_GIVE: dict[type, str] = {
    float: "a finite number", int: "a whole number", bool: "true or false", str: "text", list: "a list",
    dict: "an object",
}  # fmt: skip


def check_there(source: str, wanted: Mapping[str, ColumnType], there: Collection[str]) -> None:
    """Raise DataError where no row has a wanted column. there: the rows' columns, under our names."""
    for name in wanted:
        if name not in there:
            raise DataError(
                f"{source}: no row has the column '{name}', which the method reads.{nearest(name, there)} Columns: "
                f"{', '.join(sorted(there)) or 'none'}. Add it, or name yours: columns: {{{name}: <yours>}}"
            )


def read_columns(cells: Cells, wanted: Mapping[str, ColumnType]) -> dict[str, Any]:
    """Return the row's values of the wanted columns; a missing or wrong one is a fault of the row."""
    return {name: _read(cells, name, kind) for name, kind in wanted.items()}


def _read(cells: Cells, name: str, kind: ColumnType) -> Any:
    if name not in cells.cells:
        cells.bad(name, "the column is missing", f"give {_GIVE[kind]}, which the method reads")
        return None
    value = cells.cells[name]
    if cells.textual and isinstance(value, str) and kind is not str:
        value = cells.from_text(name)
    if kind is bool and value in (0, 1) and isinstance(value, int | float):
        return bool(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        return cells.number_of(name, value)
    if kind is int and number and value == value // 1:
        return int(value)
    if kind not in (float, int) and type(value) is kind:
        return value
    cells.bad(name, f"found {shown(value)}", f"give {_GIVE[kind]}, which the method reads")
    return None
