"""The input of rewards and judges, and the output of rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignkit.data.rows import Content, shown


@dataclass(frozen=True)
class Answers:
    """Sampled completions with their prompts and rows; every list has S entries.

    prompts: as the rows gave them, text or messages. completions: text, or [{"role": "assistant", "content": ...}]
    where the prompt is messages. columns: the rows' other columns. rows: their 1-based numbers, for messages.
    lengths: tokens of each completion. ended: False where `max_new_tokens` cut it.
    """

    prompts: list[Content]
    completions: list[Content]
    columns: Mapping[str, list[Any]]
    rows: list[int]
    lengths: list[int]
    ended: list[bool]

    def __len__(self) -> int:
        return len(self.completions)

    def place(self, i: int) -> str:
        """Return the words that identify entry i in a message: its row, and its prompt shortened."""
        return f"row {self.rows[i]}, prompt {shown(text_of(self.prompts[i]), 80)}"


@dataclass(frozen=True)
class Scores:
    """The rewards of S completions.

    total: the weighted sum, [S]. parts: each reward's own values before its weight, [S], by name; 0 where it does not
    apply. An ensemble's members are listed as "ensemble/member".
    """

    total: list[float]
    parts: dict[str, list[float]]


def text_of(content: Content) -> str:
    """Return text as it is; messages as their only content, or as lines "role: content" where there are several."""
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return str(content[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in content)
