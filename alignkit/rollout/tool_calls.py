"""Tool calls in sampled text, in the formats that chat models write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
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
    for match in _TAGGED.finditer(text):
        yield from _from_json(match[1])
    for match in _FUNCTION.finditer(text):
        yield {"name": match[1], "arguments": {p[1]: _value(p[2]) for p in _PARAMETER.finditer(match[2])}}
    for match in _GLM.finditer(text):
        yield {"name": match[1], "arguments": {p[1]: _value(p[2]) for p in _GLM_ARGUMENT.finditer(match[2])}}
    for match in _RECIPIENT.finditer(text):
        if isinstance(arguments := _value(match[2]), dict):
            yield {"name": match[1], "arguments": arguments}
    bare = re.sub(r"<\|[^|<>]*\|>", "", text).strip()
    if bare.startswith("{"):
        yield from _from_json(bare)


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
