"""A tokenizer's chat template: rendering, the forms of a message that it accepts, and the date that it writes.

Templates come with models, so they are untrusted programs: they run in transformers' sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import date, datetime, time
from functools import cached_property
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from alignkit.data.cells import REASONING, RESERVED
from alignkit.data.rows import Message
from alignkit.errors import ConfigError, nearest

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CALL = {"type": "function", "id": "call00001", "function": {"name": "probe", "arguments": {"key": "value"}}}
_TOOL = {"type": "function", "function": {"name": "other", "description": "d", "parameters": {
    "type": "object", "properties": {"key": {"type": "string", "description": "d"}}, "required": ["key"]}}}  # fmt: skip


_PINNED: ContextVar[date | None] = ContextVar("pinned", default=None)


@contextmanager
def pinned(day: date | None) -> Iterator[None]:
    """Inside of it, templates write this date: those of reward models and judges too, which have no settings of it."""
    token = _PINNED.set(day)
    try:
        yield
    finally:
        _PINNED.reset(token)


class Template:
    """The chat template of a tokenizer; `day`: the date that it writes, None for the pinned one, else today."""

    def __init__(self, tokenizer: Any, day: date | None = None) -> None:
        self._tokenizer, self._day = tokenizer, day or _PINNED.get()
        self._sources: dict[bool, str] = {}
        self.name = str(getattr(tokenizer, "name_or_path", "") or "the tokenizer")

    def source(self, tools: Any = None) -> str:
        """Return its text: tokenizers may have another one for rows with tools. A pinned date is filled in."""
        if bool(tools) not in self._sources:
            source = str(self._tokenizer.get_chat_template(None, tools))
            if self._day is not None and "strftime_now" in source:
                source = _pinned_now(self._day) + source
            self._sources[bool(tools)] = source
        return self._sources[bool(tools)]

    def sources(self) -> tuple[str, str]:
        """Return its text for rows without tools, and with them."""
        return self.source(), self.source([_TOOL])

    @cached_property
    def writes_date(self) -> bool:
        """True if the text depends on the day on which it is rendered."""
        return "strftime_now" in self.source() + self.source([_TOOL])

    @cached_property
    def has_marks(self) -> bool:
        """True if the template marks what the assistant generates."""
        return _MARKS.search(self.source()) is not None

    def reads(self, name: str, tools: Any = None) -> bool:
        """Return whether the template's text mentions a variable or a field of this name."""
        return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", self.source(tools)) is not None

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Raise ConfigError for variables that the template does not have."""
        for name in arguments:
            if name in RESERVED:
                raise ConfigError(f"chat_template_kwargs: '{name}' is set by alignkit; remove it")
            if not self.reads(name) and not self.reads(name, [_TOOL]):
                names = sorted(set(re.findall(r"[A-Za-z_]{4,}", self.source())))
                hint = nearest(name, names)
                raise ConfigError(f"chat_template_kwargs: the chat template of {self.name} reads no '{name}'.{hint}")

    def render(
        self, messages: Sequence[Message], arguments: Mapping[str, Any] | None = None, answer_next: bool = False
    ) -> str:
        """Return the text of messages. arguments: tools, documents, variables. answer_next: with the turn's opening."""
        return self._rendered([self._form(m) for m in messages], arguments or {}, answer_next=answer_next)[0]

    def marked(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of messages, and the characters that the template marks as generated."""
        return self._rendered([self._form(m) for m in messages], arguments, marks=True)

    def _rendered(
        self, messages: list[Message], arguments: Mapping[str, Any], answer_next: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self.source(arguments.get("tools")),
            add_generation_prompt=answer_next,
            return_assistant_tokens_mask=marks,
            **{"tools": None, "documents": None, **self._tokenizer.special_tokens_map, **arguments},
        )
        return str(texts[0]), list(spans[0]) if marks else []

    # ---- the form in which a message is passed -----------------------------------------------------------------------

    def _form(self, message: Message) -> Message:
        """Return a message as this template reads it."""
        form = self._with_reasoning(message)
        if form.get("tool_calls"):
            form = self._with_calls(form)
        if not self._takes_text:
            form = {**form, "content": [{"type": "text", "text": form.get("content") or ""}]}
        return form

    def _with_reasoning(self, message: Message) -> Message:
        given = next((name for name in REASONING if message.get(name)), None)
        if given is None or given in self._reasoning or not self._reasoning:
            return message
        return {**message, self._reasoning[0]: message[given]}

    def _with_calls(self, message: Message) -> Message:
        """Return the message with its arguments as an object or as JSON text, and an empty content left out or not."""
        calls = []
        for call in message["tool_calls"]:
            inner = call.get("function", call)
            arguments = inner.get("arguments")
            if isinstance(arguments, str) and self._empty_content["text"] is None:
                with suppress(ValueError):
                    arguments = json.loads(arguments)
            elif not isinstance(arguments, str) and self._empty_content["object"] is None and self._takes_call_text:
                arguments = json.dumps(arguments, ensure_ascii=False)
            inner = {**inner, "arguments": arguments}
            calls.append({**call, "function": inner} if "function" in call else inner)
        as_text = isinstance((calls[0].get("function", calls[0])).get("arguments"), str)
        form, emptied = {**message, "tool_calls": calls}, self._empty_content["text" if as_text else "object"]
        return form if form.get("content") else (emptied or _empty)(form)

    @cached_property
    def _reasoning(self) -> tuple[str, ...]:
        """The names under which the template reads an assistant's reasoning."""
        text = self.source() + self.source([_TOOL])
        return tuple(name for name in REASONING if re.search(rf"[.'\"]{name}\b", text))

    @cached_property
    def _takes_text(self) -> bool:
        """True unless the template reads lists of parts only, as those of some vision-language models do."""

        def shows(content: Any) -> bool:
            with suppress(Exception):  # templates may raise anything
                return "probe" in self._rendered([{"role": "user", "content": content}], {})[0]
            return False

        return shows("probe") or not shows([{"type": "text", "text": "probe"}])

    @property
    def _takes_call_text(self) -> bool:
        return self._empty_content["text"] is not None

    @cached_property
    def _empty_content(self) -> dict[str, Callable[[Message], Message] | None]:
        """How a tool call's empty content is passed where its arguments are an "object" or "text"; None: unread."""
        return {"object": self._first_read({"key": "value"}), "text": self._first_read('{"key": "value"}')}

    def _first_read(self, arguments: Any) -> Callable[[Message], Message] | None:
        call = {**_CALL, "function": {**_CALL["function"], "arguments": arguments}}  # type: ignore[dict-item]
        user, asked = {"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}
        for way in (_left_out, _empty, _none):
            with suppress(Exception):  # templates may raise anything
                text, _ = self._rendered([user, way(asked)], {"tools": [_TOOL]})
                shown = text[text.find("probe") :]
                if "probe" in shown and "value" in shown and (isinstance(arguments, dict) or arguments in shown):
                    return way
        return None


def _pinned_now(day: date) -> str:
    """Return a macro that takes the place of transformers' `strftime_now`, which it lets no caller replace."""
    moment = datetime.combine(day, time())
    values = {f"%{flag}{d}": moment.strftime(f"%{flag}{d}") for flag in ("-", "") for d in "aAbBcdHIjmMpSUwWxXyY"}
    chain = "".join(f"|replace({name!r}, {value!r})" for name, value in values.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{chain} }}}}{{% endmacro %}}\n"


def _left_out(message: Message) -> Message:
    return {k: v for k, v in message.items() if k != "content"}


def _empty(message: Message) -> Message:
    return {**message, "content": ""}


def _none(message: Message) -> Message:
    return {**message, "content": None}
