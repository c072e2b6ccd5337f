"""The parts of a message that a template must show (reasoning, content, tool calls), found in rendered text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, NamedTuple

from alignkit.data.cells import REASONING
from alignkit.data.rows import Message

_TRUTH = {"true": ("True",), "false": ("False",)}  # as Python writes them
# templates cut contents at tags such as </think>, so what stands between tags is looked for one by one
_TAGS = re.compile(r"</?[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]")


class Part(NamedTuple):
    """A field of a message and the texts that it must show, in their order or in any."""

    field: str
    texts: tuple[str, ...]
    ordered: bool = True


@dataclass(frozen=True)
class Found:
    """Where a message's parts are in a text.

    begin, end: of the text that was found last; equal where nothing was found. missing: the fields of which a part was
    not found, with the text.
    """

    begin: int
    end: int
    missing: tuple[tuple[str, str], ...] = ()


def parts_of(message: Message) -> list[Part]:
    """Return the parts of a message: its reasoning, its content, and each of its tool calls."""
    parts = []
    reasoning = {name: text for name in REASONING if isinstance(text := message.get(name), str) and text.strip()}
    for name, text in {text: (name, text) for name, text in reversed(reasoning.items())}.values():  # each text once
        parts.append(Part(name, _between_tags(text)))
    if isinstance(content := message.get("content"), str) and content.strip():
        parts.append(Part("content", _between_tags(content)))
    for call in message.get("tool_calls") or ():
        inner = call.get("function", call)
        parts.append(Part("tool_calls", (str(inner.get("name")), *_arguments(inner.get("arguments"))), ordered=False))
    return parts


def find(text: str, begin: int, message: Message) -> Found:
    """Find the parts of a message in `text` from `begin` on, none inside another.

    Templates show reasoning, content and tool calls in different orders: the first order with all parts is taken.
    """
    parts = parts_of(message)
    fields = dict.fromkeys(part.field for part in parts)
    first: Found | None = None
    for order in permutations(fields):
        found = _find_all(text, begin, sorted(parts, key=lambda part: order.index(part.field)))
        if not found.missing:
            return found
        first = first or found
    return first or Found(begin, begin)


def shows(text: str, message: Message) -> list[tuple[str, str]]:
    """Return the parts of a message that occur nowhere in `text`: fields, and the texts that are missing."""
    return [
        (part.field, missing)
        for part in parts_of(message)
        if (missing := next((t for t in part.texts if locate(text, 0, t) is None), None)) is not None
    ]


def described(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a template shows of tools: names, descriptions and the names of parameters."""
    inner = [tool.get("function", tool) for tool in tools]
    texts = [one.get(name) for one in inner for name in ("name", "description")]
    schemas = [one.get("parameters") for one in inner]
    properties = [schema.get("properties") for schema in schemas if isinstance(schema, Mapping)]
    names = [name for those in properties if isinstance(those, Mapping) for name in those]
    return [text.strip() for text in (*texts, *names) if isinstance(text, str)]


def contents(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the longest text of each document: templates may leave out its title."""
    texts = [[text.strip() for text in document.values() if isinstance(text, str)] for document in documents]
    return [max(some, key=len) for some in texts if some]


def _find_all(text: str, begin: int, parts: list[Part]) -> Found:
    last, missing = (begin, begin), []
    at = begin
    for part in parts:
        ends = [at]
        for wanted in part.texts:
            place = locate(text, at if not part.ordered else ends[-1], wanted)
            if place is None:
                missing.append((part.field, wanted))
                continue
            ends.append(place[1])
            last = max(last, place, key=lambda span: span[1])
        at = max(ends)
    return Found(*last, tuple(missing))


def locate(text: str, at: int, wanted: str) -> tuple[int, int] | None:
    """Return where `wanted` is in `text`: as it is, inside JSON, as Python writes it, or with other white space."""
    inner = json.dumps(wanted, ensure_ascii=False)[1:-1]
    twice, slashes = json.dumps(inner, ensure_ascii=False)[1:-1], inner.replace("/", "\\/")
    forms = (wanted, inner, json.dumps(wanted)[1:-1], twice, slashes, repr(wanted)[1:-1], *_TRUTH.get(wanted, ()))
    for form in dict.fromkeys(forms):
        if (begin := text.find(form, at)) >= 0:
            return begin, begin + len(form)
    words = wanted.split()
    if len(words) < 2:
        return None
    match = re.compile(r"\s+".join(map(re.escape, words))).search(text, at)
    return match.span() if match else None


def _between_tags(text: str) -> tuple[str, ...]:
    pieces = tuple(stripped for piece in _TAGS.split(text) if (stripped := piece.strip()))
    return pieces or (text.strip(),)


def _arguments(value: Any) -> tuple[str, ...]:
    """Return the texts of a tool call's arguments; of arguments as JSON text, the values in it."""
    if isinstance(value, str):
        try:
            # numbers as they are written: 1e3 is not 1000.0
            value = json.loads(value, parse_float=_Written, parse_int=_Written)
        except ValueError:
            return (value.strip(),) if value.strip() else ()
    return tuple(_leaves(value))


class _Written(str):
    """A number as it is written."""


def _leaves(value: Any) -> Iterator[str]:
    """Return the texts, numbers and truth values in a tool call's arguments, and their names."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, bool | int | float):
        yield json.dumps(value)
