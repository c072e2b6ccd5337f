"""Rows of ShareGPT and Alpaca, and with a question in the place of a prompt, rewritten to our own forms.

A function takes the row's cells and the kind of data that the method reads, and returns the cells of one of the forms
"pairs", "winner", "ranked", "unpaired", "completion" and "messages", or of "prompt" where only a prompt is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignkit.data.cells import Cells
from alignkit.data.rows import Message, shown
from alignkit.method import DataKind

# names of ShareGPT's and LLaMA-Factory's rows -> our roles; other names stay, and are refused like any unknown role
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
_PAIR = {"chosen": "chosen", "rejected": "rejected"}


class Rewritten(NamedTuple):
    """A row of another form: its name, its cells, and {column of that form: the row's own column} for faults."""

    form: str
    cells: dict[str, Any]
    names: Mapping[str, str]


Rewrite = Callable[[Cells, DataKind], Rewritten]


def sharegpt(cells: Cells, kind: DataKind) -> Rewritten:
    """Read `conversations` as messages."""
    return _conversation(cells, "conversations")


def messages(cells: Cells, kind: DataKind) -> Rewritten:
    """Read `messages`, which may be written as ShareGPT's, with their system prompt in a column."""
    return _conversation(cells, "messages")


def sharegpt_pair(cells: Cells, kind: DataKind) -> Rewritten:
    """Read `conversations` as the prompt of `chosen` and `rejected`, a message each."""
    turns = _turns(cells, "conversations")
    if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping) and turns[-1].get("role") == "assistant":
        found = "found an assistant's message at the end, next to `chosen`"
        cells.bad("conversations", found, "end it before the turn that `chosen` and `rejected` answer")
    return Rewritten("pairs", {"prompt": turns, **taken(cells, _PAIR)}, {"prompt": "conversations"})


def sharegpt_label(cells: Cells, kind: DataKind) -> Rewritten:
    """Read the last turn of the conversation as the answer that `kto_tag` or `label` judges."""
    column = _first(cells, "conversations", "messages")
    turns = _turns(cells, column)
    if kind == "prompts" or not isinstance(turns, list):
        return _conversation(cells, column)
    names = {"label": _first(cells, "kto_tag", "label")}
    own = {"prompt": turns[:-1], "completion": turns[-1:], **taken(cells, names)}
    return Rewritten("unpaired", own, {"prompt": column, "completion": column, **names})


def alpaca(cells: Cells, kind: DataKind) -> Rewritten:
    """Read instruction, input and output as one conversation; the answers of its history are learned too."""
    asked = _alpaca_prompt(cells)
    if kind == "prompts":
        return Rewritten("prompt", {"prompt": asked}, {"prompt": "instruction"})
    answer = {"role": "assistant", "content": text_of(cells, "output")}
    return Rewritten("messages", {"messages": [*asked, answer]}, {"messages": "instruction"})


def alpaca_pair(cells: Cells, kind: DataKind) -> Rewritten:
    """Read instruction and input as the prompt of `chosen` and `rejected`, or these as whole conversations."""
    if whole := _whole(cells):
        return whole
    return Rewritten("pairs", {"prompt": _alpaca_prompt(cells), **taken(cells, _PAIR)}, {"prompt": "instruction"})


def alpaca_label(cells: Cells, kind: DataKind) -> Rewritten:
    """Read instruction, input and output as an answer that `kto_tag` or `label` judges."""
    names = {"completion": "output", "label": _first(cells, "kto_tag", "label")}
    own = {"prompt": _alpaca_prompt(cells), **taken(cells, names)}
    return Rewritten("unpaired", own, {"prompt": "instruction", **names})


def question(cells: Cells, kind: DataKind) -> Rewritten:
    """Read `question` and `answer` as text, or as messages where a column `system` is filled."""
    names = {"completion": "answer"}
    return Rewritten("completion", {**_question(cells), **taken(cells, names)}, {"prompt": "question", **names})


def question_pair(cells: Cells, kind: DataKind) -> Rewritten:
    """Read `question` as the prompt of `chosen` and `rejected`, or these as whole conversations."""
    if whole := _whole(cells):
        return whole
    return Rewritten("pairs", {**_question(cells), **taken(cells, _PAIR)}, {"prompt": "question"})


def from_sharegpt(value: Any) -> Any:
    """Return messages, or one message, with `from` and `value` renamed to role and content; anything else as it is."""
    if isinstance(value, list):
        return [from_sharegpt(one) for one in value]
    if not isinstance(value, Mapping) or "from" not in value or "value" not in value:
        return value
    if isinstance(value["from"], list) and isinstance(value["value"], list):  # so `datasets` may hold lists of objects
        return [from_sharegpt(dict(zip(value, cells, strict=True))) for cells in zip(*value.values(), strict=False)]
    rest = {key: cell for key, cell in value.items() if key not in ("from", "value")}
    name = value["from"]
    role = ROLES.get(name.lower(), name) if isinstance(name, str) else name
    calls = _calls(value["value"]) if name == "function_call" else []
    said = {"tool_calls": [{"type": "function", "function": call} for call in calls]}
    return {"role": role, **(said if calls else {"content": value["value"]}), **rest}


def _calls(text: Any) -> list[dict[str, Any]]:
    """Return the tool calls in a turn's text, {"name": ..., "arguments": ...} as JSON, or a list of these; else none.

    LLaMA-Factory's rows have such turns; the chat template then writes the calls as its model does.
    """
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return []
    calls = found if isinstance(found, list) else [found]
    named = all(isinstance(c, dict) and isinstance(c.get("name"), str) and "arguments" in c for c in calls)
    return [{"name": call["name"], "arguments": call["arguments"]} for call in calls] if named else []


def taken(cells: Cells, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the row's columns under our names, {ours: the row's}; a column that is missing stays missing."""
    return {ours: from_sharegpt(cells.cells[theirs]) for ours, theirs in names.items() if theirs in cells.cells}


def _whole(cells: Cells) -> Rewritten | None:
    """Return `chosen` and `rejected` where both are conversations that begin before the answer."""
    own = taken(cells, _PAIR)
    firsts = [turns[0] if isinstance(turns, list) and len(turns) > 1 else None for turns in own.values()]
    begin = [isinstance(first, Mapping) and first.get("role") in ("system", "user") for first in firsts]
    return Rewritten("conversations", own, {}) if len(begin) == 2 and all(begin) else None


def _conversation(cells: Cells, column: str) -> Rewritten:
    own = {"messages": _turns(cells, column)} if column in cells.cells else {}
    return Rewritten("messages", own, {"messages": column})


def _turns(cells: Cells, column: str) -> Any:
    """Return a column of messages, after the message of the column `system` where they do not begin with one."""
    value = cells.cells.get(column)
    if cells.textual and isinstance(value, str):
        value = _listed(value)
    turns = from_sharegpt(value)
    system = _optional(cells, "system")
    begins = isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and turns[0].get("role") == "system"
    if system and isinstance(turns, list) and turns and not begins:
        return [{"role": "system", "content": system}, *turns]
    return turns


def _alpaca_prompt(cells: Cells) -> list[Message]:
    """Return the messages before the answer: system, history, and the instruction with its input on a new line."""
    system, extra = _optional(cells, "system"), _optional(cells, "input")
    turns = [{"role": "system", "content": system}] if system else []
    for turn in _history(cells):
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    asked = [part for part in (text_of(cells, "instruction"), extra) if part]
    return [*turns, {"role": "user", "content": "\n".join(asked)}]


def _history(cells: Cells) -> list[Any]:
    """Return the earlier turns [question, answer] of an Alpaca row."""
    value = cells.cells.get("history")
    if cells.textual and isinstance(value, str):
        value = _listed(value)
    if not value:
        return []
    pairs = isinstance(value, list) and all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in value)
    if not pairs or not all(isinstance(part, str) for turn in value for part in turn):
        cells.bad("history", f"found {shown(value)}", "give a list of [question, answer], or leave it empty")
        return []
    return list(value)


def _question(cells: Cells) -> dict[str, Any]:
    """Return the question as `prompt`; as messages after the system prompt, where the row has one."""
    system, asked = _optional(cells, "system"), cells.cells.get("question")
    if not system or not isinstance(asked, str):
        return taken(cells, {"prompt": "question"})
    return {"prompt": [{"role": "system", "content": system}, {"role": "user", "content": asked}]}


def _first(cells: Cells, *columns: str) -> str:
    return next((column for column in columns if column in cells.cells), columns[0])


def text_of(cells: Cells, column: str) -> str:
    """Return a column of text; anything else is a fault."""
    value = cells.cells.get(column)
    if not isinstance(value, str):
        found = f"found {shown(value)}" if column in cells.cells else "the column is missing"
        cells.bad(column, found, "provide it as text, or remove the row")
        return ""
    return cells.text(column, value)


def _optional(cells: Cells, column: str) -> str:
    """Return a column of text that may be empty or missing."""
    return "" if cells.cells.get(column) is None else text_of(cells, column)


def _listed(cell: str) -> Any:
    """Return the list that a cell of a CSV file holds as JSON, else the text itself."""
    try:
        value = json.loads(cell)
    except (json.JSONDecodeError, RecursionError):
        return cell
    return value if isinstance(value, list) else cell
