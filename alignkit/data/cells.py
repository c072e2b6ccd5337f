"""The cells of one row, read with checks: every problem becomes a Fault with row, column and fix."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkit.data.rows import Content, Fault, Message, shown
from alignkit.errors import nearest

ROLES = ("system", "user", "assistant", "tool")
_AS_CONTENT = 'as text or as messages [{"role": "assistant", "content": "..."}]'


@dataclass
class Cells:
    """The cells of one row, read with checks; problems go to `faults`, and a placeholder is returned."""

    number: int
    cells: dict[str, Any]
    textual: bool
    faults: list[Fault] = field(default_factory=list)

    def bad(self, column: str, found: str, fix: str) -> None:
        """Record a fault."""
        self.faults.append(Fault(self.number, column, found, fix))

    def content(self, column: str) -> Content:
        """Text, or messages reduced to role and content."""
        if column not in self.cells:
            self.bad(column, "the column is missing", f"provide it {_AS_CONTENT}, or remove the row")
            return ""
        return self.checked(column, self.cells[column])

    def checked(self, column: str, value: object) -> Content:
        """Text or messages from a value that was already read."""
        if self.textual and isinstance(value, str):
            value = _messages_in(value) or value
        if isinstance(value, str):
            return self.text(column, value)
        if isinstance(value, Mapping):
            value = [value]
        if isinstance(value, list) and value:
            return [self.message(column, message) for message in value]
        self.bad(column, f"found {shown(value)}", f"provide it {_AS_CONTENT}, or remove the row")
        return ""

    def text(self, column: str, value: str) -> str:
        """Text that can be encoded as UTF-8."""
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.bad(column, f"found half a surrogate pair {shown(value[error.start])}", "fix the encoding of the text")
        return value

    def message(self, column: str, message: object) -> Message:
        """One message, reduced to role and content."""
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if role not in ROLES:
            fix = f"use one of {', '.join(ROLES)}"
            close = nearest(role, ROLES) if isinstance(role, str) else ""
            found = f"a message with the role {shown(role)}" if role is not None else f"a message {shown(message)}"
            self.bad(column, found, f"{fix}.{close}" if role is not None else 'write {"role", "content"}')
        elif not isinstance(content, str):
            self.bad(column, f"the {role} message has content {shown(content)}", "give every message content as text")
        elif isinstance(message, Mapping) and message.get("tool_calls"):
            self.bad(column, "a message with tool_calls", "write the call into the message's content")
        return {"role": str(role), "content": self.text(column, content) if isinstance(content, str) else ""}

    def turns(self, column: str) -> list[Message]:
        """Messages; text is a fault."""
        value = self.content(column)
        if isinstance(value, str):
            if value or self.cells.get(column) == "":
                self.bad(column, f"found {shown(value)}", 'give messages [{"role": "user", "content": "..."}, ...]')
            return [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        return value

    def number_of(self, column: str, value: object) -> float:
        """A finite number."""
        try:
            number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            self.bad(column, f"found {shown(value)}", "give a finite number")
            return 0.0
        return number

    def label(self, column: str) -> bool:
        """True or false, in any unambiguous spelling."""
        value = self.cells.get(column)
        text = str(value).strip().lower() if isinstance(value, bool | int | float | str) else ""
        if text not in ("true", "false", "1", "0", "1.0", "0.0"):
            self.bad(column, f"found {shown(value)}", "give true (desirable) or false")
        return text in ("true", "1", "1.0")

    def list_of(self, column: str) -> list[Any]:
        """A list with at least one entry."""
        value = self.cells.get(column)
        if self.textual and isinstance(value, str):
            value = _json_list(value)
        if not isinstance(value, list) or not value:
            self.bad(column, f"found {shown(self.cells.get(column))}", "give a list with one entry for each completion")
            return []
        return value


def _json_list(cell: str) -> list[Any] | None:
    try:
        value = json.loads(cell)
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _messages_in(cell: str) -> list[Any] | None:
    """Return the messages that a CSV cell holds as JSON; None for text that only looks like a list."""
    value = _json_list(cell) if cell.lstrip().startswith("[") else None
    return value if value and all(isinstance(m, dict) and "role" in m for m in value) else None
