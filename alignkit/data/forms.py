"""The forms of rows: which columns identify each form, and how one of its rows is parsed.

Adding a form is a line in FORMS and a parser in `_parsed`, or a function that rewrites its rows to another form
(`alignkit.data.published`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from alignkit.data import published, scored
from alignkit.data.cells import Cells
from alignkit.data.rows import Content, DroppedRow, Message, shown
from alignkit.method import DataKind

ASSISTANT = "\n\nAssistant:"


class Form(NamedTuple):
    """A form of rows.

    name: several forms of one name differ in their columns. columns: identify it. kinds: of data that it can provide.
    asked: the columns that make up the prompt, also those that a row may leave out. rewrite: turns a row into one of
    another form.
    """

    name: str
    columns: tuple[str, ...]
    kinds: tuple[DataKind, ...]
    asked: tuple[str, ...] = ("prompt",)
    rewrite: published.Rewrite | None = None


KINDS: tuple[DataKind, ...] = ("pairs", "unpaired", "text", "prompts")
LABELLED: tuple[DataKind, ...] = ("unpaired", "text", "prompts")
ANSWERED: tuple[DataKind, ...] = ("text", "prompts")
SHAREGPT = ("conversations", "system")
ALPACA = ("instruction", "input", "system", "history")
TWO_ANSWERS = (("response_a", "response_b"), ("answer_a", "answer_b"), ("completion_a", "completion_b"))
FORMS = (
    Form("pairs", ("prompt", "chosen", "rejected"), KINDS),
    Form("sharegpt", ("conversations", "chosen", "rejected"), KINDS, SHAREGPT, published.sharegpt_pair),
    Form("alpaca", ("instruction", "chosen", "rejected"), KINDS, ALPACA, published.alpaca_pair),
    Form("question", ("question", "chosen", "rejected"), KINDS, ("question", "system"), published.question_pair),
    Form("conversations", ("chosen", "rejected"), KINDS, ("chosen", "rejected")),
    *(Form("winner", ("prompt", "winner", *two), KINDS) for two in TWO_ANSWERS),
    *(Form("winner", ("prompt", "preference", *two), KINDS, rewrite=scored.preference) for two in TWO_ANSWERS),
    Form("helpsteer", ("prompt", "response_1", "response_2", "preference_strength"), KINDS, rewrite=scored.helpsteer2),
    Form(
        "helpsteer", ("context", "response1", "response2", "overall_preference"), KINDS, ("context",), scored.helpsteer3
    ),
    Form("ranked", ("prompt", "completions", "scores"), KINDS),
    Form("ultrafeedback", ("instruction", "completions"), KINDS, ("instruction",), scored.ultrafeedback),
    Form("unpaired", ("prompt", "completion", "label"), LABELLED),
    Form("sharegpt", ("conversations", "kto_tag"), LABELLED, SHAREGPT, published.sharegpt_label),
    Form("sharegpt", ("conversations", "label"), LABELLED, SHAREGPT, published.sharegpt_label),
    Form("sharegpt", ("messages", "kto_tag"), LABELLED, ("messages", "system"), published.sharegpt_label),
    Form("alpaca", ("instruction", "output", "kto_tag"), LABELLED, ALPACA, published.alpaca_label),
    Form("alpaca", ("instruction", "output", "label"), LABELLED, ALPACA, published.alpaca_label),
    Form("rated", ("prompt", "response", "helpfulness"), KINDS, rewrite=scored.rated),
    Form("completion", ("prompt", "completion"), ANSWERED),
    Form("messages", ("messages",), ANSWERED, ("messages", "system"), published.messages),
    Form("text", ("text",), ANSWERED, ("text",)),
    Form("sharegpt", ("conversations",), ANSWERED, SHAREGPT, published.sharegpt),
    Form("alpaca", ("instruction", "output"), ANSWERED, ALPACA, published.alpaca),
    Form("question", ("question", "answer"), ANSWERED, ("question", "system"), published.question),
    Form("prompt", ("prompt",), ("prompts",)),
)
BESIDE = ("margin", "tools", "documents", "chat_template_kwargs")  # columns that every form may have
OUR_COLUMNS = sorted({column for form in FORMS for column in (*form.columns, *form.asked)} | {*BESIDE})


class Parsed(NamedTuple):
    """A row's prompt and answers: (chosen, rejected), (the only answer,), or (); label: of an unpaired answer."""

    prompt: Content
    answers: tuple[Content, ...] = ()
    label: bool = True


def parse(cells: Cells, form: Form, kind: DataKind) -> Parsed:
    """Read one row of `form`. Faults go to `cells.faults` (the result is then a placeholder); raises DroppedRow."""
    cells.check_text()
    if form.rewrite is None:
        cells.cells = {**cells.cells, **published.taken(cells, {column: column for column in form.columns})}
        return _parsed(cells, form, kind)
    own = form.rewrite(cells, kind)
    if cells.faults:
        return Parsed("")
    rewritten = Cells(cells.number, own.cells, cells.textual)
    try:
        return _parsed(rewritten, Form(own.form, tuple(own.cells), form.kinds), kind)
    finally:  # faults name the row's own columns
        cells.faults += [replace(fault, column=own.names.get(fault.column, fault.column)) for fault in rewritten.faults]


def _parsed(cells: Cells, form: Form, kind: DataKind) -> Parsed:
    if kind == "prompts" and "prompt" in form.columns:
        return Parsed(cells.content("prompt"))  # faults and ties in answers do not matter: they are not read
    parsers: dict[str, Callable[[Cells], Parsed]] = {
        "pairs": lambda c: _answered(c, "chosen", "rejected"),
        "conversations": _parse_conversations,
        "winner": lambda c: _parse_winner(c, max(TWO_ANSWERS, key=lambda two: len({*two} & {*form.columns}))),
        "ranked": lambda c: _parse_ranked(c, kind),
        "unpaired": lambda c: _answered(c, "completion")._replace(label=c.label("label")),
        "completion": lambda c: _answered(c, "completion"),
        "messages": lambda c: _parse_messages(c, kind),
        "text": lambda c: Parsed(_plain(c)) if kind == "prompts" else Parsed("", (_plain(c),)),
    }
    return parsers[form.name](cells)


def _plain(cells: Cells) -> str:
    value = cells.content("text")
    if not isinstance(value, str):
        cells.bad("text", f"found {shown(value)}", "rename the column to 'messages', or give text")
        return ""
    return value


def _answered(cells: Cells, *columns: str) -> Parsed:
    prompt = cells.content("prompt")
    return _aligned(cells, prompt, [(column, cells.content(column)) for column in columns])


def _aligned(cells: Cells, prompt: Content, answers: list[tuple[str, Content]]) -> Parsed:
    """Convert prompt and answers to one type: all text, or all messages without the prompt's at the answers' start."""
    if cells.faults:
        return Parsed("")  # the placeholders of faulty cells would only cause more faults
    if isinstance(prompt, str) and all(isinstance(answer, str) for _, answer in answers):
        return Parsed(prompt, tuple(answer for _, answer in answers))
    turns = [
        (column, [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)
        for column, answer in answers
    ]
    if isinstance(prompt, str):
        prompt = _prompt_within(prompt, turns[0][1]) or [{"role": "user", "content": prompt}]
    rest = []
    for column, messages in turns:
        own = messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages
        if not own or own[0]["role"] != "assistant":
            found = f"an answer that begins with {shown(own[0])}" if own else "no answer after the prompt"
            cells.bad(column, found, "begin with an assistant message, or with the whole prompt and then that message")
        rest.append(_to_last_answer(own))
    return Parsed(prompt, tuple(rest))


def _prompt_within(prompt: str, messages: list[Message]) -> list[Message] | None:
    """Return the leading messages up to the user message whose content is `prompt`."""
    for i, message in enumerate(messages):
        if message["role"] == "user" and message["content"].strip() == prompt.strip():
            return messages[: i + 1]
    return None


def _to_last_answer(messages: list[Message]) -> list[Message]:
    """Drop the messages after the assistant's last turn: they are never trained on."""
    roles = [message["role"] for message in messages]
    return messages[: _last(roles, "assistant") + 1] if "assistant" in roles else messages


def _parse_conversations(cells: Cells) -> Parsed:
    """Split two whole conversations into their common beginning and two answers."""
    chosen, rejected = cells.content("chosen"), cells.content("rejected")
    if cells.faults:
        return Parsed("")
    if isinstance(chosen, str) and isinstance(rejected, str):
        at = chosen.rfind(ASSISTANT)
        cut = at + len(ASSISTANT)
        if at < 0 or rejected.rfind(ASSISTANT) != at or rejected[:cut] != chosen[:cut]:
            raise DroppedRow("without a common last turn")
        return Parsed(chosen[:cut], (chosen[cut:], rejected[cut:]))
    if isinstance(chosen, str) or isinstance(rejected, str):
        cells.bad("rejected", "one answer is text, the other is messages", "use the same type for both")
        return Parsed("")
    lead = _common(chosen, rejected)
    if chosen == rejected:
        lead -= 1
    if lead < 1 or any(c[lead : lead + 1] == [] or c[lead]["role"] != "assistant" for c in (chosen, rejected)):
        raise DroppedRow("without a common last turn")
    while lead > 1 and chosen[lead - 1]["role"] == "assistant":  # a turn of its own, not the beginning of the answer
        lead -= 1
    return Parsed(chosen[:lead], (_to_last_answer(chosen[lead:]), _to_last_answer(rejected[lead:])))


def _parse_winner(cells: Cells, columns: tuple[str, ...]) -> Parsed:
    first, second = columns
    winner = cells.cells.get("winner")
    verdict = winner.strip().lower() if isinstance(winner, str) else ""
    if verdict not in ("a", "b", "tie"):
        cells.bad("winner", f"found {shown(winner)}", "give a, b or tie")
    parsed = _answered(cells, *((second, first) if verdict == "b" else (first, second)))
    if verdict == "tie":
        raise DroppedRow("ties")
    return parsed


def _parse_ranked(cells: Cells, kind: DataKind) -> Parsed:
    """Pair the best answer with the worst one; where scores are equal, the first answer counts."""
    prompt = cells.content("prompt")
    answers = [cells.checked("completions", answer) for answer in cells.list_of("completions")]
    scores = [cells.number_of("scores", score) for score in cells.list_of("scores")]
    if not cells.faults and len(answers) != len(scores):
        cells.bad(
            "scores", f"{len(scores)} scores for {len(answers)} completions", "give one score for each completion"
        )
    if cells.faults:
        return Parsed("")
    best = max(range(len(scores)), key=lambda i: scores[i])
    worst = min(range(len(scores)), key=lambda i: scores[i])
    parsed = _aligned(cells, prompt, [("completions", answers[best]), ("completions", answers[worst])])
    if kind != "text" and len(answers) == 1:
        raise DroppedRow("with a single answer")
    if kind != "text" and scores[best] == scores[worst]:
        raise DroppedRow("ties")
    return parsed


def _parse_messages(cells: Cells, kind: DataKind) -> Parsed:
    """Cut before the first assistant message, so all turns are learned; for prompts, after the last user message."""
    messages = cells.turns("messages")
    roles = [message["role"] for message in messages]
    if kind != "prompts":
        if "assistant" not in roles:
            raise DroppedRow("without an assistant's turn")
        roles = roles[: _last(roles, "assistant") + 1]
    lead = _last(roles, "user") + 1 if kind == "prompts" and "user" in roles else _first_answer(roles)
    if cells.faults:
        return Parsed("")
    if lead == 0:
        cells.bad("messages", "found an assistant message at the start", "begin with a user or system message")
    return Parsed(messages[:lead], (messages[lead : len(roles)],))


def _first_answer(roles: list[str]) -> int:
    return roles.index("assistant") if "assistant" in roles else len(roles)


def _last(roles: list[str], role: str) -> int:
    return len(roles) - 1 - roles[::-1].index(role)


def _common(a: list[Message], b: list[Message]) -> int:
    """Return the number of leading messages that are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
