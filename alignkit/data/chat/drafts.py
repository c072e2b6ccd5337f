"""Rows of messages -> drafts: their text, and which of its characters are learned.

Special tokens inside a message are replaced by private-use characters while the template runs, one for each, so every
control token in the rendered text was written by the template itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignkit.data.cells import REASONING
from alignkit.data.chat.conversation import (
    Conversation,
    Rendered,
    begins_to_think,
    behind,
    common,
    prefilled,
)
from alignkit.data.chat.parts import contents, described, locate, shows
from alignkit.data.chat.settings import Chat
from alignkit.data.chat.special import SpecialTokens, free_characters
from alignkit.data.chat.template import Template
from alignkit.data.chat.turns import BY_TURNS, Answer, Span, read_answer, written_by_hand
from alignkit.data.rows import Content, Message, Row, shown

# fields of a message whose parts are looked for, or that only say who speaks
FIELDS = ("role", "content", "tool_calls", "name", "tool_call_id", *REASONING)


@dataclass(frozen=True)
class Draft:
    """A row as text, before tokenisation.

    prompt: the common beginning of `texts`, never learned. texts: prompt and completion, one for each completion.
    spans: the learned characters of each text, None for everything after the prompt. ended: whether a text already
    ends with a token that closes the turn. hidden: private-use character -> the special token it replaces.
    control: special tokens in the text are control tokens. notes: what to report about the row.
    """

    row: Row
    prompt: str
    texts: tuple[str, ...] = ()
    spans: tuple[tuple[Span, ...] | None, ...] = ()
    ended: tuple[bool, ...] = ()
    hidden: Mapping[str, str] = field(default_factory=dict)
    control: bool = False
    notes: tuple[str, ...] = ()

    def restored(self, text: str) -> str:
        """Return `text` with the special tokens that its private-use characters replace."""
        for character, token in self.hidden.items():
            text = text.replace(character, token)
        return text


class RowError(Exception):
    """A row that cannot be rendered as it should be, such as one with an answer that the template cuts."""

    def __init__(self, field: str, found: str, fix: str) -> None:
        super().__init__(found)
        self.field, self.found, self.fix = field, found, fix


@dataclass(frozen=True)
class Drafter:
    """Renders one row after the other with the same template and settings."""

    template: Template
    special: SpecialTokens
    chat: Chat

    def draft(self, row: Row) -> Draft:
        """Return a row's draft. Raises RowError, RewrittenError, and what the template raises."""
        parts = [_messages(row.prompt, "user"), *(_messages(answer, "assistant") for answer in row.completions)]
        tools = {"tools": list(self.chat.tools)} if self.chat.tools else {}
        arguments = {**self.chat.arguments, **tools, **row.template}
        hidden: dict[str, str] = {}
        if not self.chat.special_tokens:
            (arguments, *parts), hidden = self.special.hidden(arguments, *parts)
        prompt, *answers = parts
        if prompt[-1].get("tool_calls"):
            fix = "end the prompt with the tool's result, or move the call into the answer"
            raise RowError("prompt", "found a tool call at the end", fix)
        if not answers:
            start = self._start(prompt, arguments)
            notes = (*self._unread(row, prompt, arguments, start), *self._unread_fields(prompt, arguments))
            return Draft(row, start, hidden=hidden, control=True, notes=notes)
        found, about = list[Answer](), list[str]()
        rendered: Rendered = {}
        for answer in answers:
            conversation = self._conversation(prompt, answer, arguments, rendered)
            read = self._read(conversation, hidden, about)
            found.append(read)
            start, rendered = conversation.start(conversation.n_prompt), conversation.of_prompt()
        about += self._unread(row, prompt, arguments, start)
        about += self._unread_fields([message for part in parts for message in part], arguments)
        texts = tuple(read.text for read in found)
        alone = [len(answer) == 1 and bool(read.spans) for answer, read in zip(answers, found, strict=True)]
        spans = tuple(None if one else read.spans for one, read in zip(alone, found, strict=True))
        shared = start[: min(common(start, text) for text in texts)]
        closed = tuple(read.closed for read in found)
        return Draft(row, shared, texts, spans, closed, hidden, True, tuple(dict.fromkeys(about)))

    def _start(self, prompt: list[Message], arguments: Mapping[str, Any]) -> str:
        if prompt[-1]["role"] == "assistant":
            return prefilled(self.template, prompt, arguments)
        return self.template.render(prompt, arguments, answer_next=True)

    def _conversation(
        self, prompt: list[Message], answer: list[Message], arguments: Mapping[str, Any], rendered: Rendered
    ) -> Conversation:
        """Join prompt and answer; an answer to a prompt that ends with an assistant's message continues it.

        rendered: what was rendered of the prompt before.
        """
        if prompt[-1]["role"] != "assistant":
            messages = prompt + answer
            return Conversation(self.template, self.special, messages, len(prompt), arguments, _texts=dict(rendered))
        prefill, first = prompt[-1], answer[0]
        both = [name for name in ("content", *REASONING) if name in prefill or name in first]
        joined = {**prefill, **first, **{name: f"{prefill.get(name, '')}{first.get(name, '')}" for name in both}}
        messages = [*prompt[:-1], joined, *answer[1:]]
        made = Conversation(self.template, self.special, messages, len(prompt) - 1, arguments, prefill)
        if not begins_to_think(prefill):
            return made
        character = next(free_characters([messages, arguments]))
        text = behind(made.text(made.n_prompt, answer_next=True), joined["content"])
        messages = [*prompt[:-1], {**joined, "content": character}, *answer[1:]]
        return Conversation(
            self.template, self.special, messages, len(prompt) - 1, arguments, prefill, {character: text}
        )

    def _read(self, conversation: Conversation, hidden: Mapping[str, str], notes: list[str]) -> Answer:
        """Return an answer as text, by `on_dropped` where the template leaves out a part of it."""
        read, name = read_answer(conversation, self.chat.train_on), self.template.name
        if read.missing and self.chat.on_dropped == "keep-by-hand":
            unused = (c for c in free_characters([conversation.messages]) if c not in hidden)
            by_hand = written_by_hand(conversation, unused)
            fields = " and ".join(dict.fromkeys(field for field, _ in read.missing))
            read = read_answer(by_hand, self.chat.train_on)
            if not read.missing:
                notes.append(f"rows with {fields} written by hand, because the chat template of {name} leaves it out")
        if read.missing and self.chat.on_dropped != "report":
            field, text = read.missing[0]
            found = f"the chat template of {name} leaves out {shown(text)} of the answer"
            raise RowError(field, found, _fix(field))
        notes += [f"answers without their {f}, which the chat template of {name} leaves out" for f, _ in read.missing]
        notes += [f"rows with {f} of earlier messages left out by the chat template of {name}" for f, _ in read.unread]
        opening = conversation.start(conversation.n_prompt)[read.begin :]
        if opening.strip() and not read.unlearned:
            notes.append(f"rows without {shown(opening)}, with which the chat template of {name} opens sampled answers")
        if read.way == BY_TURNS:
            notes.append("rows rendered turn by turn, because the chat template rewrites earlier turns")
        if read.unlearned:
            notes.append("rows with earlier turns not learned, because the chat template rewrites them")
        return read

    def _unread(self, row: Row, prompt: list[Message], arguments: Mapping[str, Any], start: str) -> list[str]:
        """Return notes about what the row gives, and the template leaves out of the prompt."""
        by = f"left out by the chat template of {self.template.name}"
        masked = self.special.masked(start)
        notes = [f"rows with {field} of the {m['role']} {by}" for m in prompt for field, _ in shows(masked, m)]
        shown_by = {"tools": described, "documents": contents}
        for name in dict.fromkeys((*row.template, *(["tools"] if self.chat.tools else []))):
            wanted = shown_by.get(name)
            if wanted and not all(locate(start, 0, text) for text in wanted(arguments[name])):
                notes.append(f"rows with {name} {by}")
            elif not wanted and not self.template.reads(name, arguments.get("tools")):
                notes.append(f"rows with '{name}', which the chat template of {self.template.name} does not read")
        return notes

    def _unread_fields(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> list[str]:
        """Return notes about fields of messages that the template does not read."""
        fields = dict.fromkeys(
            name for m in messages for name, value in m.items() if name not in FIELDS and value != ""
        )
        unread = [name for name in fields if not self.template.reads(name, arguments.get("tools"))]
        return [
            f"rows with '{name}' in a message, which the chat template of {self.template.name} does not read"
            for name in unread
        ]


def _fix(field: str) -> str:
    report = "on_dropped: report learns the rest"
    if field == "tool_calls":
        return f"write the call into the content as this model writes calls, or choose another template; {report}"
    return f"on_dropped: keep-by-hand writes it as plain text, {report}; or choose another template"


def _messages(content: Content, role: str) -> list[Message]:
    return content if isinstance(content, list) else [{"role": role, "content": content}]
