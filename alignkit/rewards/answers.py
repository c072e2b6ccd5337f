"""The input of rewards and judges, and the output of rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkit.data.rows import Content, Message, shown


@dataclass(frozen=True)
class Answers:
    """Sampled completions with their prompts and rows; every list has S entries.

    prompts: as the rows gave them, text or messages. completions: text, or [{"role": "assistant", "content": ...}]
    where the prompt is messages; most functions get them as text. columns: the rows' other columns. rows: their 1-based
    numbers, for messages. lengths: tokens of each completion. ended: False where `max_new_tokens` cut it.
    Of sampled completions, empty for others: completion_ids: their tokens. raw_completions: their text with special
    tokens. tool_calls: the calls in them, each {"name": ..., "arguments": {...}}. earned: what an
    environment paid for each, None without one.
    """

    prompts: list[Content]
    completions: list[Content]
    columns: Mapping[str, list[Any]]
    rows: list[int]
    lengths: list[int]
    ended: list[bool]
    completion_ids: list[list[int]] = field(default_factory=list)
    raw_completions: list[str] = field(default_factory=list)
    tool_calls: list[list[dict[str, Any]]] = field(default_factory=list)
    earned: list[float | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def completion_messages(self) -> list[list[Message]]:
        """The completions as messages, also those to prompts of text."""
        return [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in self.completions]

    def place(self, i: int) -> str:
        """Return the words that identify entry i in a message: its row, and its prompt shortened."""
        return f"row {self.rows[i]}, prompt {shown(text_of(self.prompts[i]), 80)}"


@dataclass(frozen=True)
class Scores:
    """The rewards of S completions.

    total: the weighted sum of the rewards that apply, [S]; None where none does. parts: each reward's own values before
    its weight, [S], by name; None where it does not apply. An ensemble's members are listed as "ensemble/member".
    """

    total: list[float | None]
    parts: dict[str, list[float | None]]

    @property
    def numbers(self) -> list[float]:
        """The total, with 0 where no reward applies."""
        return [0.0 if value is None else value for value in self.total]


def text_of(content: Content) -> str:
    """Return text as it is; messages as their only content, or as lines "role: content" where there are several."""
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return _said(content[0])
    return "\n\n".join(f"{message['role']}: {_said(message)}" for message in content)


def _said(message: Message) -> str:
    """Return a message's content, and its tool calls as JSON."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([*([message["content"]] if message["content"] or not calls else []), *calls])
