"""Tool calls in sampled text, in the formats that chat models write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

# Qwen2.5 and Qwen3, Hermes: JSON in a tag; the tag may be missing where it is a special token
_TAGGED = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
# Qwen3.5, Nemotron 3: tags for the function and for each parameter
_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
# GLM-4.5
_GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_GLM = re.compile(r"<tool_call>\s*([\w.-]+)\s*((?:<arg_key>.*?</arg_value>\s*)*)</tool_call>", re.DOTALL)
# gpt-oss: a recipient and JSON
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+).*?<\|message\|>(\{.*?\})\s*(?:<\||$)", re.DOTALL)


def tool_calls(text: str) -> list[dict[str, Any]]:
    """Return the calls in a completion's text with special tokens, each {"name": ..., "arguments": {...}}.

    Known formats: JSON in <tool_call> (Hermes, Qwen), <function=...> (Qwen3.5, Nemotron), <arg_key> (GLM), a recipient
    (gpt-oss), and a completion that is a JSON object with a name (Llama 3.1). What is not well formed is no call.
    """
    return list(_calls(text))


def _calls(text: str) -> Iterator[dict[str, Any]]:
    """Read from left to right: what is inside of a call, such as text that spells out another one, is none."""
    bare = re.sub(r"<\|[^|<>]*\|>", "", text).strip()
    if bare.startswith("{") and (alone := list(_from_json(bare))):
        yield from alone
        return
    at = 0
    while found := [(match.start(), i, match) for i, (p, _) in enumerate(_FORMATS) if (match := p.search(text, at))]:
        _, i, match = min(found, key=lambda one: one[:2])
        yield from _FORMATS[i][1](match)
        at = match.end()


def _function(match: re.Match[str]) -> Iterator[dict[str, Any]]:
    yield {"name": match[1], "arguments": {p[1]: _value(p[2]) for p in _PARAMETER.finditer(match[2])}}


def _glm(match: re.Match[str]) -> Iterator[dict[str, Any]]:
    yield {"name": match[1], "arguments": {p[1]: _value(p[2]) for p in _GLM_ARGUMENT.finditer(match[2])}}


def _addressed(match: re.Match[str]) -> Iterator[dict[str, Any]]:
    if isinstance(arguments := _value(match[2]), dict):
        yield {"name": match[1], "arguments": arguments}


def _from_json(text: str) -> Iterator[dict[str, Any]]:
    call = _value(text)
    if isinstance(call, dict) and isinstance(call.get("name"), str):
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, dict):
            yield {"name": call["name"], "arguments": arguments}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


_FORMATS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Iterator[dict[str, Any]]]], ...] = (
    (_TAGGED, lambda match: _from_json(match[1])),
    (_FUNCTION, _function),
    (_GLM, _glm),
    (_RECIPIENT, _addressed),
)
