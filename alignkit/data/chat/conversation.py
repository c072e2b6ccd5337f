"""A conversation and its renderings: up to each message, and with each turn of the assistant as the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignkit.data.chat.parts import Found, find
from alignkit.data.chat.special import SpecialTokens
from alignkit.data.chat.template import Template
from alignkit.data.rows import Message
from alignkit.errors import AlignkitError


class RewrittenError(AlignkitError):
    """The template renders the prompt differently once an answer follows."""


@dataclass(frozen=True)
class Turn:
    """A turn of the assistant, rendered as the last one.

    number: its place in the conversation. text: up to its end. begin: of what is generated. opened: how much of what
    comes before the turn leads up to it. core: where the special tokens that close it begin. found: its parts.
    """

    number: int
    text: str
    begin: int
    opened: int
    core: int
    found: Found


@dataclass
class Conversation:
    """Prompt and answer with what the row gives to the template, and its renderings.

    n_prompt: messages before the answer. prefill: the beginning of the first turn that the prompt gave. by_hand:
    private-use character -> the text that it stands for.
    """

    template: Template
    special: SpecialTokens
    messages: list[Message]
    n_prompt: int
    arguments: Mapping[str, Any]
    prefill: Message | None = None
    by_hand: dict[str, str] = field(default_factory=dict)
    _texts: dict[tuple[int, bool], str] = field(default_factory=dict)

    def text(self, n: int, answer_next: bool = False) -> str:
        """Return the first n messages as text; answer_next: with the opening of the assistant's turn."""
        key = (n, answer_next)
        if key not in self._texts:
            text = self.template.render(self.messages[:n], self.arguments, answer_next)
            for character, written in self.by_hand.items():
                text = text.replace(character, written)
            self._texts[key] = text
        return self._texts[key]

    @property
    def turns(self) -> list[int]:
        """The places of the assistant's turns in the answer."""
        return [i for i in range(self.n_prompt, len(self.messages)) if self.messages[i]["role"] == "assistant"]

    def start(self, n: int) -> str:
        """Return what comes before turn n: up to the opening of the turn; where it continues a prefill, up to that."""
        if self.prefill is None or n != self.n_prompt:
            return self.text(n, answer_next=True)
        return prefilled(self.template, [*self.messages[:n], self.prefill], self.arguments)


def prefilled(template: Template, messages: Sequence[Message], arguments: Mapping[str, Any]) -> str:
    """Return a prompt whose last message the assistant continues, up to the end of that message."""
    text = template.render(messages, arguments)
    begin = common(template.render(messages[:-1], arguments, answer_next=True), text)
    found = find(text, begin, messages[-1])
    if found.missing:
        raise RewrittenError(f"it leaves out {found.missing[0][0]} of the assistant's message that is to be continued")
    return text[: max(found.end, begin)]


def last_turn(conversation: Conversation, n: int) -> Turn:
    """Return turn n as it is where it is the last one. Raises RewrittenError where what comes before it changes."""
    start, text = conversation.start(n), conversation.text(n + 1)
    begin = opened = common(start, text)
    if begin < len(start[: common(start, conversation.text(n))].rstrip()):  # not only the turn's opening differs
        begin, opened = _after_rewriting(conversation, n, start, text), len(start)
    message = dict(conversation.messages[n])
    if (content := conversation.by_hand.get(str(message.get("content")))) is not None:
        message["content"] = content
    opening = begin if conversation.prefill is None else common(conversation.text(n, answer_next=True), text)
    core = conversation.special.core(text, begin)
    return Turn(n, text, begin, opened, core, find(text, min(opening, begin), message))


def _after_rewriting(conversation: Conversation, n: int, start: str, text: str) -> int:
    """Return where turn n begins in a text that shows earlier turns otherwise than `start` does.

    The message before the turn and the turn's opening must be the same in both. gpt-oss leaves out the reasoning of a
    tool call once the final answer follows.
    """
    before = find(start, 0, conversation.messages[n - 1])
    place = start.rfind(start[before.begin : before.end])
    at = text.rfind(start[place:]) if n > conversation.n_prompt and before.end > before.begin else -1
    if at < 0:
        raise RewrittenError("the template renders the prompt differently once an answer follows")
    return at + len(start) - place


def common(a: Any, b: Any) -> int:
    """Return the number of leading items (characters, tokens) that two sequences share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
