"""Rendering rows of messages in a process with limits, which is kept for the next rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from alignkit.data.chat.conversation import RewrittenError
from alignkit.data.chat.drafts import Draft, Drafter, RowError
from alignkit.data.chat.helper import Helper
from alignkit.data.chat.settings import Chat
from alignkit.data.chat.special import SpecialTokens
from alignkit.data.chat.template import Template
from alignkit.data.chat.timeout import within
from alignkit.data.rows import Fault, FaultyRowsError, Row, shown
from alignkit.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)
_KEPT = 2  # helpers: of the policy's tokenizer, and of a reward model's


@dataclass(frozen=True)
class _Kept:
    """A helper and what it was started for; the tokenizer is held, so that its id belongs to no other one."""

    helper: Helper
    drafter: Drafter
    sources: tuple[str, str]
    tokenizer: Any

    def serves(self, drafter: Drafter, tokenizer: Any) -> bool:
        same = self.tokenizer is tokenizer and self.drafter.chat == drafter.chat
        return same and self.sources == drafter.template.sources() and self.helper.alive()


_HELPERS: list[_Kept] = []


def render(rows: Sequence[Row], source: str, tokenizer: Any, special: SpecialTokens, chat: Chat) -> list[Draft]:
    """Render rows of messages.

    source: the data's name, for messages. Raises ConfigError without a chat template or for variables that it does not
    have, ModelError beyond the limits of time and memory, FaultyRowsError for rows that the template refuses or cuts.
    """
    if not rows:
        return []
    if not tokenizer.chat_template:
        name = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
        raise ConfigError(
            f"row {rows[0].row} holds messages, but {name} has no chat template. Use an instruct model's tokenizer, "
            "set tokenizer.chat_template and save it with the model, or give prompt and completion as text"
        )
    template = Template(tokenizer, chat.date)
    template.check_arguments(chat.arguments)
    drafter = Drafter(template, special, chat)
    drafts: list[Draft] = []
    faults: list[Fault] = []
    for row, (kind, *found) in zip(rows, _answers(rows, drafter, tokenizer), strict=True):
        if kind == "draft":
            drafts.append(_draft(row, *found))
        else:
            faults.append(Fault(row.row, *map(str, found)))
    if faults:
        raise FaultyRowsError(f"{source}, in the chat template", faults)
    return drafts


def close() -> None:
    """End the processes that are kept."""
    while _HELPERS:
        _HELPERS.pop().helper.close()


@lru_cache(8)
def _closing_text(tokenizer: Any, template: str) -> str:
    """Return a short conversation that ends with an answer "b", rendered within the limits; empty where it fails."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        helper = Helper(lambda items: (Template(tokenizer).render(turns) for _ in items), template[:40])
    except OSError:
        return Template(tokenizer).render(turns)
    try:
        return str(next(helper.ask([None], [1], Chat().seconds)))
    finally:
        helper.close()


def turn_end(tokenizer: Any) -> int | None:
    """Return the special token with which the tokenizer's chat template closes an answer; None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    special = SpecialTokens(tokenizer)
    try:
        text = _closing_text(tokenizer, Template(tokenizer).source()).rstrip()
    except Exception:  # templates may raise anything; rendering the rows reports it
        return None
    closing = next((name for name in special.names if text[text.rfind("b") :].endswith(name)), None)
    return None if closing is None else int(tokenizer.convert_tokens_to_ids(closing))


def _answers(rows: Sequence[Row], drafter: Drafter, tokenizer: Any) -> Iterator[list[Any]]:
    numbers, seconds = [row.row for row in rows], drafter.chat.seconds
    helper = _helper(drafter, tokenizer)
    if helper is not None:
        items = [[row.prompt, row.completions, row.template] for row in rows]
        yield from helper.ask(items, numbers, seconds)
        if helper.large:
            close()
        return
    found: list[list[Any]] = []

    def one_by_one() -> Iterator[None]:
        for row in rows:
            found.append(_answer(drafter, row))
            yield

    within(seconds, one_by_one(), numbers)
    yield from found


def _helper(drafter: Drafter, tokenizer: Any) -> Helper | None:
    """Return a process that renders as `drafter` does; None where no process can be started."""
    for kept in _HELPERS:
        if kept.serves(drafter, tokenizer):
            return kept.helper

    def work(items: list[Any]) -> Iterator[list[Any]]:
        return (_answer(drafter, Row(prompt, tuple(answers), template=more)) for prompt, answers, more in items)

    try:
        helper = Helper(work, drafter.template.name)
    except OSError as error:
        _warn(str(error))
        return None
    while len(_HELPERS) >= _KEPT:
        _HELPERS.pop(0).helper.close()
    _HELPERS.append(_Kept(helper, drafter, drafter.template.sources(), tokenizer))
    return helper


@lru_cache
def _warn(why: str) -> None:
    logger.warning("chat templates are rendered with a limit of time, and none of memory: %s", why)


def _answer(drafter: Drafter, row: Row) -> list[Any]:
    """Return a row's draft, or what is wrong with the row, as JSON values."""
    try:
        made = drafter.draft(row)
    except RowError as error:
        return ["fault", error.field, error.found, error.fix]
    except RewrittenError as error:
        return ["fault", "", str(error), "give prompt and completion as text for this model"]
    except MemoryError:  # the helper's limit
        raise
    except Exception as error:  # templates may raise anything
        fix = "change the messages, or the template"
        return ["fault", "", f"the template raised {shown(str(error), 100)}", fix]
    return ["draft", made.prompt, made.texts, made.spans, made.ended, dict(made.hidden), made.control, made.notes]


def _draft(row: Row, prompt: str, texts: Any, spans: Any, ended: Any, hidden: Any, control: bool, notes: Any) -> Draft:
    """Return the draft that an answer describes. Raises ModelError where it does not describe one."""
    try:
        at = tuple(None if one is None else tuple((int(a), int(b)) for a, b in one) for one in spans)
        known = {str(character): str(token) for character, token in hidden.items()}
        plain = tuple(map(str, texts)), at, tuple(map(bool, ended)), known, bool(control), tuple(map(str, notes))
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"the chat template broke the process that renders it, at row {row.row}: {error}") from None
    return Draft(row, str(prompt), *plain)
