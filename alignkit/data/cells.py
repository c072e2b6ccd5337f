"""The cells of one row, read with checks: every problem becomes a Fault with row, column and fix."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkit.data.rows import Content, Fault, Message, shown
from alignkit.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")
RESERVED = (  # variables of a chat template that are not set by chat_template_kwargs
    "messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "return_assistant_tokens_mask",
)  # fmt: skip
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_ONLY_TEXT = "only text is trained, not images, audio or video"
_AS_CONTENT = 'as text or as messages [{"role": "assistant", "content": "..."}]'


@dataclass
class Cells:
    """The cells of one row, read with checks; problems go to `faults`, and a placeholder is returned.

    notes: what to report about the row.
    """

    number: int
    cells: dict[str, Any]
    textual: bool
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def bad(self, column: str, found: str, fix: str) -> None:
        """Record a fault."""
        self.faults.append(Fault(self.number, column, found, fix))

    def content(self, column: str) -> Content:
        """Text, or messages."""
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
        """One message with all of its fields; its content as one text."""
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or role not in ROLES:
            fix = f"use one of {', '.join(ROLES)}"
            close = nearest(role, ROLES) if isinstance(role, str) else ""
            found = f"a message with the role {shown(role)}" if role is not None else f"a message {shown(message)}"
            self.bad(column, found, f"{fix}.{close}" if role is not None else 'write {"role", "content"}')
            return {"role": str(role), "content": ""}
        kept = {str(k): v for k, v in message.items() if v is not None and v != []}
        if "tool_calls" in kept:
            kept["tool_calls"] = self._calls(column, kept["tool_calls"])
        for name in REASONING:
            if not isinstance(kept.get(name, ""), str):
                self.bad(column, f"the {role} message has {name} {shown(kept[name])}", "give it as text")
        empty = not {"tool_calls", *REASONING}.isdisjoint(kept)  # then there may be no content
        return {**kept, "role": role, "content": self._content_of(column, role, kept.get("content"), empty)}

    def _content_of(self, column: str, role: str, content: object, may_be_empty: bool) -> str:
        if content is None and may_be_empty:
            return ""
        if isinstance(content, str):
            return self.text(column, content)
        if not isinstance(content, list):
            found = f"the {role} message has content {shown(content)}"
            self.bad(column, found, "give every message content as text, or as a list of text parts")
            return ""
        texts = []
        for part in content:
            text = part.get("text") if isinstance(part, Mapping) else part
            kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
            if kind != "text" or not isinstance(text, str):
                found = f"the {role} message has a part of the type {shown(kind)}"
                fix = (
                    "give it as `reasoning_content`"
                    if kind in ("thinking", "reasoning")
                    else f"remove the row: {_ONLY_TEXT}"
                )
                self.bad(column, found, fix)
            texts.append(self.text(column, text) if isinstance(text, str) else "")
        return "".join(texts)

    def _calls(self, column: str, value: object) -> list[Any]:
        """Tool calls: objects with a name and arguments, or with these under "function"."""
        calls = _json_list(value) if isinstance(value, str) else value
        if isinstance(calls, list) and all(_names(call) for call in calls):
            return [dict(call) for call in calls]
        self.bad(column, f"tool_calls {shown(value)}", 'give [{"function": {"name": "...", "arguments": {...}}}]')
        return []

    def check_text(self) -> None:
        """Record a fault for each column that holds images, sound or video."""
        for column in MEDIA:
            if _is_filled(self.cells.get(column)):
                fix = f"remove the row, or the column where answers do not depend on it: {_ONLY_TEXT}"
                self.bad(column, "found a cell that is not empty", fix)

    def beside(self) -> dict[str, Any]:
        """What the row gives to the chat template beside its messages: tools, documents, variables."""
        given: dict[str, Any] = {}
        tools = self._parsed("tools")
        if isinstance(tools, list):
            tools = [_json(tool) if isinstance(tool, str) else tool for tool in tools]
        if isinstance(tools, list) and all(_names(tool) for tool in tools):
            given["tools"] = [dict(tool) for tool in tools]
        elif tools is not None:
            self.bad("tools", f"found {shown(tools)}", "give a list of JSON schemas, or null")
        documents = self._parsed("documents")
        if isinstance(documents, list) and all(isinstance(document, Mapping) for document in documents):
            given["documents"] = [dict(document) for document in documents]
        elif documents is not None:  # a column of this name may be for a reward
            self.notes.append("rows whose `documents` are no list of objects, so that no chat template gets them")
        variables = self._parsed("chat_template_kwargs")
        if isinstance(variables, Mapping) and (set_by_us := [name for name in variables if name in RESERVED]):
            self.bad("chat_template_kwargs", f"found '{set_by_us[0]}', which alignkit sets itself", "remove it")
        elif isinstance(variables, Mapping):
            given |= {str(k): v for k, v in variables.items() if v is not None}
        elif variables is not None:
            self.bad("chat_template_kwargs", f"found {shown(variables)}", 'give an object, such as {"name": value}')
        return given

    def _parsed(self, column: str) -> Any:
        """The column's value, read from JSON where it is text; None where there is nothing."""
        value = self.cells.get(column)
        if isinstance(value, str):
            value = _json(value) if value.strip() else None
        return None if value in ([], {}) else value

    def from_text(self, column: str) -> Any:
        """The value that a text cell holds: a number, true or false, a list, ... as JSON, else the text itself."""
        text = str(self.cells[column])
        return _json(text.lower() if text.lower() in ("true", "false") else text)

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


def _names(call: object) -> bool:
    """Return whether a tool call or a tool's schema names a function."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(inner, Mapping) and isinstance(inner.get("name"), str)


def _is_filled(value: object) -> bool:
    """Return whether a cell holds a file's name, its content, or a list of these."""
    if isinstance(value, list):
        return any(_is_filled(part) for part in value)
    if isinstance(value, Mapping):
        return any(_is_filled(part) for part in value.values())
    return value is not None and not (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def _json(cell: str) -> Any:
    """Return the value of JSON text; other text as it is."""
    try:
        return json.loads(cell)
    except (json.JSONDecodeError, RecursionError):
        return cell


def _json_list(cell: str) -> list[Any] | None:
    value = _json(cell)
    return value if isinstance(value, list) else None


def _messages_in(cell: str) -> list[Any] | None:
    """Return the messages that a CSV cell holds as JSON; None for text that only looks like a list."""
    value = _json_list(cell) if cell.lstrip().startswith("[") else None
    return value if value and all(isinstance(m, dict) and "role" in m for m in value) else None
