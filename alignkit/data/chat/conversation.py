"""A conversation and its renderings: up to each message, and with each turn of the assistant as the last one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from alignkit.data.cells import REASONING
from alignkit.data.chat.parts import Found, find
from alignkit.data.chat.special import SpecialTokens, free_characters
from alignkit.data.chat.template import Template
from alignkit.data.rows import Message
from alignkit.errors import AlignkitError

Rendered: TypeAlias = dict[tuple[int, bool], str]
"""Texts of the first n messages, with and without the opening of the next turn."""


class RewrittenError(AlignkitError):
    """The template renders the prompt differently once an answer follows."""


@dataclass(frozen=True)
class Turn:
    """A turn of the assistant, rendered as the last one.

    number: its place in the conversation. text: up to its end. begin: of what is generated. opened: how much of what
    comes before the turn leads up to it. core: where the special tokens that close it begin. found: its parts.
    rewritten: whether `text` shows what comes before the turn otherwise than the model is given it.
    """

    number: int
    text: str
    begin: int
    opened: int
    core: int
    found: Found
    rewritten: bool = False


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
    _texts: Rendered = field(default_factory=dict)

    def of_prompt(self) -> Rendered:
        """Return the renderings of the prompt, for another answer to it."""
        return {key: text for key, text in self._texts.items() if key[0] <= self.n_prompt}

    def text(self, n: int, answer_next: bool = False) -> str:
        """Return the first n messages as text; answer_next: with the opening of the assistant's turn."""
        key = (n, answer_next)
        if key not in self._texts:
            text = self.template.render(self.messages[:n], self.arguments, answer_next)
            last = "" if answer_next or n == 0 else self.messages[n - 1].get("content")
            if last in self.by_hand and last in text:  # the model writes it behind the opening of the turn
                text = self.text(n - 1, answer_next=True) + text[text.rfind(last) :]
            for character, written in self.by_hand.items():
                text = text.replace(character, written)
            self._texts[key] = text
        return self._texts[key]

    def message(self, n: int) -> Message:
        """Return message n with the text that is written by hand in it."""
        message = self.messages[n]
        written = self.by_hand.get(message.get("content") or "")
        return message if written is None else {**message, "content": written}

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
    opening = template.render(messages[:-1], arguments, answer_next=True)
    if begins_to_think(messages[-1]):
        return opening + behind(opening, messages[-1]["content"])
    text = template.render(messages, arguments)
    begin = common(opening, text)
    found = find(text, begin, messages[-1])
    if found.missing:
        raise RewrittenError(f"it leaves out {found.missing[0][0]} of the assistant's message that is to be continued")
    return text[: max(found.end, begin)]


def begins_to_think(message: Message) -> bool:
    """Return whether a message begins a think block: templates take it for an answer behind a block of their own."""
    return "<think>" in message["content"] and "</think>" not in message["content"]


def behind(opening: str, text: str) -> str:
    """Return what is left of a text behind an opening that begins its think block, with its own white space."""
    opened = re.search(r"<think>\s*$", opening) is not None and text.startswith("<think>")
    return text.removeprefix("<think>").lstrip() if opened else text


def last_turn(conversation: Conversation, n: int) -> Turn:
    """Return turn n as it is where it is the last one. Raises RewrittenError where what comes before it changes."""
    start, text = conversation.start(n), conversation.text(n + 1)
    begin = opened = common(start, text)
    rewritten = False
    if begin < len(start):  # more than the turn's opening may differ
        rewritten = begin < len(start[: common(start, conversation.text(n))].rstrip())
    if rewritten:
        begin, opened = _after_rewriting(conversation, n, start, text), len(start)
    opening = begin if conversation.prefill is None else common(conversation.text(n, answer_next=True), text)
    core = conversation.special.core(text, begin)
    found = find(conversation.special.masked(text), min(opening, begin), conversation.message(n))
    if not found.missing and text[begin:core].strip() != conversation.message(n)["content"].strip():
        found = replace(found, missing=_unmarked(conversation, n))
    return Turn(n, text, begin, opened, core, found, rewritten)


def _unmarked(conversation: Conversation, n: int) -> tuple[tuple[str, str], ...]:
    """Return the fields of turn n that are not shown, though their texts occur: a character at their end is not."""
    message = conversation.messages[n]
    fields = [name for name in ("content", *REASONING) if str(message.get(name) or "").strip()]
    if message.get("content") in conversation.by_hand:
        return ()
    marks = dict(zip(fields, free_characters([conversation.messages, conversation.arguments]), strict=False))
    marked = {**message, **{name: f"{message[name].rstrip()}{mark}" for name, mark in marks.items()}}
    text = conversation.template.render([*conversation.messages[:n], marked], conversation.arguments)
    return tuple((name, message[name].strip()) for name, mark in marks.items() if mark not in text)


def _after_rewriting(conversation: Conversation, n: int, start: str, text: str) -> int:
    """Return where turn n begins in a text that shows earlier turns otherwise than `start` does.

    The message before the turn and the turn's opening must be the same in both. gpt-oss leaves out the reasoning of a
    tool call once the final answer follows.
    """
    before = find(start, 0, conversation.message(n - 1)) if n > 0 else Found(0, 0)
    place = start.rfind(start[before.begin : before.end])
    at = text.rfind(start[place:]) if before.end > before.begin else -1
    if at < 0:
        raise RewrittenError("the template renders the prompt differently once an answer follows")
    return at + len(start) - place


def common(a: Any, b: Any) -> int:
    """Return the number of leading items (characters, tokens) that two sequences share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
