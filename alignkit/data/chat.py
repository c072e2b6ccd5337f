"""Messages -> text with a tokenizer's chat template, and which of its characters are learned.

Templates come with models, so they are untrusted programs: they run in transformers' sandbox and under a time limit.
Special tokens inside a message are replaced by private-use characters while the template runs, one for each, so every
control token in the rendered text was written by the template itself.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignkit.data.rows import Content, Fault, FaultyRowsError, Message, Row, shown
from alignkit.errors import AlignkitError, ConfigError, ModelError

Span = tuple[int, int]
_HIDDEN = 0xF0000  # the first private-use character of plane 15


@dataclass(frozen=True)
class Draft:
    """A row as text, before tokenisation.

    prompt: the common beginning of `texts`, never learned. texts: prompt and completion, one for each completion.
    spans: the learned characters of each text, None for everything after the prompt. ended: whether a text already
    ends with a token that closes the turn. hidden: private-use character -> the special token it replaces.
    control: special tokens in the text are control tokens. lost_turns: earlier turns that could not be located.
    """

    row: Row
    prompt: str
    texts: tuple[str, ...] = ()
    spans: tuple[tuple[Span, ...] | None, ...] = ()
    ended: tuple[bool, ...] = ()
    hidden: Mapping[str, str] = field(default_factory=dict)
    control: bool = False
    lost_turns: int = 0

    def restored(self, text: str) -> str:
        """Return `text` with the special tokens that its private-use characters replace."""
        for character, token in self.hidden.items():
            text = text.replace(character, token)
        return text


class SpecialTokens:
    """Finds the control tokens of a tokenizer in text."""

    def __init__(self, tokenizer: Any) -> None:
        added = list(tokenizer.added_tokens_decoder.values())
        flags = {t.content: (t.lstrip, t.rstrip) for t in added if t.special}
        self.names = sorted({*tokenizer.all_special_tokens, *flags}, key=len, reverse=True)
        space = {True: r"\s*", False: ""}  # some tokens absorb the white space next to them
        patterns = []
        for name in self.names:
            left, right = flags.get(name, (False, False))
            patterns.append(space[left] + re.escape(name) + space[right])
        self.pattern = re.compile("|".join(patterns) or r"(?!)")

    def turn_end(self, text: str, begin: int) -> int | None:
        """Return where the special token that closes `text` ends, trailing white space ignored; None without one."""
        end = len(text.rstrip())
        return end if text[begin:end].endswith(tuple(self.names)) else None

    def inside(self, text: str) -> bool:
        """Return whether `text` spells out one of them."""
        return self.pattern.search(text) is not None

    def hide(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
        """Return the messages with private-use characters in place of special tokens, and the token of each."""
        if not any(self.inside(message["content"]) for message in messages):
            return list(messages), {}
        written = {character for message in messages for character in message["content"]}
        free = (chr(code) for code in range(_HIDDEN, 0x10FFFE) if chr(code) not in written)
        hidden = dict(zip(free, self.names, strict=False))
        changed = [dict(message) for message in messages]
        for message in changed:
            for character, name in hidden.items():
                message["content"] = message["content"].replace(name, character)
        return changed, hidden


def turn_end(tokenizer: Any) -> int | None:
    """Return the special token with which the tokenizer's chat template closes an answer; None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    special = SpecialTokens(tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # templates may raise anything; rendering the rows reports it
        return None
    end = special.turn_end(text, text.rfind("b"))
    closing = next((n for n in special.names if end and text[:end].endswith(n)), None)
    return None if closing is None else int(tokenizer.convert_tokens_to_ids(closing))


def render(rows: Sequence[Row], source: str, tokenizer: Any, special: SpecialTokens, seconds: float) -> list[Draft]:
    """Render rows of messages.

    source: the data's name, for messages. seconds: the time limit for each row. Raises ConfigError without a chat
    template, ModelError after the time limit, FaultyRowsError for rows that the template refuses.
    """
    if rows and not tokenizer.chat_template:
        name = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
        raise ConfigError(
            f"row {rows[0].row} holds messages, but {name} has no chat template. Use an instruct model's tokenizer, "
            "set tokenizer.chat_template and save it with the model, or give prompt and completion as text"
        )
    drafts: list[Draft] = []
    faults: list[Fault] = []
    _within(seconds, _drafted(rows, tokenizer, special, drafts, faults), rows)
    if faults:
        raise FaultyRowsError(f"{source}, in the chat template", faults)
    return drafts


def _drafted(
    rows: Sequence[Row], tokenizer: Any, special: SpecialTokens, drafts: list[Draft], faults: list[Fault]
) -> Iterator[None]:
    for row in rows:
        try:
            drafts.append(_draft(row, tokenizer, special))
        except _Rewritten as error:
            faults.append(Fault(row.row, "", str(error), "give prompt and completion as text for this model"))
        except Exception as error:  # templates may raise anything
            fix = "change the messages, or the template"
            faults.append(Fault(row.row, "", f"the template raised {shown(str(error), 100)}", fix))
        yield


class _Stop(BaseException):
    """Raised in a rendering thread from outside, to stop a template that does not end."""


def _within(seconds: float, steps: Iterator[None], rows: Sequence[Row]) -> None:
    """Run `steps` in a thread, so that a step that never ends can be abandoned: signals reach the main thread only."""
    done = 0
    failures: list[Exception] = []

    def work() -> None:
        nonlocal done
        try:
            for _ in steps:
                done += 1
        except _Stop:
            pass
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        before = done
        thread.join(seconds)
        if thread.is_alive() and done == before:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stop))
            raise ModelError(
                f"the chat template did not finish row {rows[done].row} within {seconds:g} s. "
                "Read tokenizer.chat_template before you trust this model, or set another template"
            )
    if failures:
        raise failures[0]


class _Rewritten(AlignkitError):
    """The template renders the prompt differently once an answer follows."""


def _messages(content: Content, role: str) -> list[Message]:
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def _draft(row: Row, tokenizer: Any, special: SpecialTokens) -> Draft:
    def rendered(messages: list[Message], answer_next: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next))

    parts = [_messages(row.prompt, "user"), *(_messages(completion, "assistant") for completion in row.completions)]
    hidden_all, hidden = special.hide([message for part in parts for message in part])
    taken = iter(hidden_all)
    prompt, *answers = [[next(taken) for _ in part] for part in parts]
    start = rendered(prompt, True)
    texts, spans, ended, lost = [], [], [], 0
    for answer in answers:
        text = rendered(prompt + answer, False)
        if not text.startswith(start):
            _check_start(start, rendered(prompt, False), text)
        end = special.turn_end(text, common(start, text))
        text = text[:end]
        found = None
        if len(answer) > 1:
            found = tuple(_turns(prompt, answer, text, rendered, special))
            lost += sum(message["role"] == "assistant" for message in answer) - len(found)
        texts.append(text)
        spans.append(found)
        ended.append(end is not None)
    shared = start[: min((common(start, text) for text in texts), default=len(start))]
    return Draft(row, shared, tuple(texts), tuple(spans), tuple(ended), hidden, control=True, lost_turns=lost)


def _check_start(start: str, prompt: str, text: str) -> None:
    """Accept a generation prompt that differs from the answer's header; raise where the messages before it differ."""
    if common(start, text) < len(start[: common(start, prompt)].rstrip()):
        raise _Rewritten("it renders the prompt differently once an answer follows, so the answer cannot be located")


def _turns(
    prompt: list[Message], answer: list[Message], text: str, rendered: Any, special: SpecialTokens
) -> list[Span]:
    """Return the characters of each assistant turn: those added by rendering one message more.

    A turn that is rendered differently once others follow cannot be located this way and is left out: not learning it
    is safer than learning the user's text.
    """
    spans = []
    for k, message in enumerate(answer):
        if message["role"] != "assistant":
            continue
        before, start = (rendered(prompt + answer[:k], gen) for gen in (False, True))
        after = rendered(prompt + answer[: k + 1], False) if k + 1 < len(answer) else text
        begin, end = common(start, text), common(after, text)
        stable = begin >= len(start[: common(start, before)].rstrip()) and end >= len(after.rstrip())
        if stable:
            spans.append((begin, special.turn_end(text[:end], begin) or end))
    return spans


def common(a: Any, b: Any) -> int:
    """Return the number of leading items (characters, tokens) that two sequences share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
