"""The table of docs/chat.md: what chat templates do with a conversation, measured on the templates themselves.

The templates are the files that the package `trl` ships (a requirement of the tests only).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from alignkit.data import FaultyRowsError, load
from alignkit.data.chat import Chat
from alignkit.data.chat.template import Template
from alignkit.data.tokenise import tokenise

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from families import FAMILIES, tokenizer_of

_CALL = {"type": "function", "id": "call00001", "function": {"name": "look_up", "arguments": {"key": "owl"}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
    },
}
_USER = [{"role": "user", "content": "Name a bird."}, {"role": "user", "content": "And a fish?"}]
_RESULT = {"role": "tool", "name": "look_up", "tool_call_id": "call00001", "content": "a night bird"}


def table() -> str:
    """Return the Markdown table, templates of the same behaviour in one row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in FAMILIES:
        rows.setdefault(_cells(name), []).append(f"`{name}`")
    head = [
        "template",
        "answers lack",
        "two turns",
        "reasoning",
        "think tags in content",
        "tool calls",
        "tools",
        "developer",
        "date",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in rows.items()])


def _cells(name: str) -> tuple[str, ...]:
    tokenizer = tokenizer_of(name)
    plain = [{"role": "assistant", "content": c} for c in ("A gull.", "A cod.")]
    reasoned = [{**m, "reasoning_content": f"Step {i}."} for i, m in enumerate(plain)]
    tagged = {"role": "assistant", "content": "<think>Step one.</think>A gull."}
    call = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
    developer = {"role": "developer", "content": "One word."}
    return (
        _lacking(tokenizer, plain[0]),
        _turns(tokenizer, plain),
        _turns(tokenizer, reasoned),
        _way(tokenizer, {"messages": [_USER[0], tagged]}),
        _way(tokenizer, {"messages": [_USER[0], call, _RESULT, plain[0]], "tools": [_TOOL]}),
        _shown(tokenizer, {"messages": [_USER[0], plain[0]], "tools": [_TOOL]}, "Looks a word up"),
        _shown(tokenizer, {"messages": [developer, _USER[0], plain[0]]}, "One word."),
        "written" if Template(tokenizer).writes_date else "",
    )


def _lacking(tokenizer: Any, answer: dict[str, Any]) -> str:
    """Return the end of the opening that add_generation_prompt writes, and the template does not before an answer."""
    read = _read(tokenizer, {"messages": [_USER[0], answer]})
    notes = [] if isinstance(read, str) else [note for note in read[1].noted if note.startswith("rows without ")]
    return f"`{notes[0].split(', with which')[0].removeprefix('rows without ')}`" if notes else ""


def _turns(tokenizer: Any, answers: list[dict[str, Any]]) -> str:
    return _way(tokenizer, {"messages": [_USER[0], answers[0], _USER[1], answers[1]]})


def _read(tokenizer: Any, row: dict[str, Any]) -> tuple[Any, Any] | str:
    try:
        (example,), report = tokenise(load([row], "text"), tokenizer, chat=Chat())
    except FaultyRowsError as error:
        return "left out: refused" if "leaves out" in str(error) else "raises"
    return example, report


def _way(tokenizer: Any, row: dict[str, Any]) -> str:
    read = _read(tokenizer, row)
    if isinstance(read, str):
        return read
    return "learned, turn by turn" if any("turn by turn" in note for note in read[1].noted) else "learned"


def _shown(tokenizer: Any, row: dict[str, Any], text: str) -> str:
    read = _read(tokenizer, row)
    if isinstance(read, str):
        return read
    return "shown" if text in tokenizer.decode(read[0].prompt.tolist()) else "left out: reported"
