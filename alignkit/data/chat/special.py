"""Control tokens: finding them in text, and hiding those that a message spells out while a template runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_HIDDEN = 0xF0000  # the first private-use character of plane 15


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

    def masked(self, text: str) -> str:
        """Return `text` with its special tokens made unreadable, so that no word is found inside of them."""
        return self.pattern.sub(lambda match: "\0" * len(match.group()), text)

    def inside(self, text: str) -> bool:
        """Return whether `text` spells out one of them."""
        return self.pattern.search(text) is not None

    def closed(self, text: str) -> bool:
        """Return whether `text` ends with one of them, trailing white space ignored."""
        return text.rstrip().endswith(tuple(self.names))

    def core(self, text: str, begin: int) -> int:
        """Return where the special tokens and the white space at the end of `text` begin, at least `begin`."""
        end = len(text.rstrip())
        while name := next((n for n in self.names if text[begin:end].endswith(n)), None):
            end = begin + len(text[begin : end - len(name)].rstrip())
        return max(end, begin)

    def closing(self, alone: str, within: str) -> int:
        """Return how many characters of `within` close a turn.

        alone, within: what follows the turn where it is the last one, and in the conversation. The special tokens that
        both share close it. Where they share none, the first one of `within` does if another one follows it, which then
        opens the next message: gpt-oss ends the last turn with another token.
        """
        end = 0
        while match := self._next(within, end):
            if alone[: match.end()] != within[: match.end()]:
                break
            end = match.end()
        if end == 0 and self._next(alone, 0) and (match := self._next(within, 0)) and self._next(within, match.end()):
            end = match.end()
        return end

    def _next(self, text: str, at: int) -> re.Match[str] | None:
        """Return the special token at `at`, after white space."""
        return self.pattern.match(text, at + len(text[at:]) - len(text[at:].lstrip()))

    def hidden(self, *values: Any) -> tuple[list[Any], dict[str, str]]:
        """Return the values with private-use characters in place of special tokens in their texts, and their tokens."""
        if not any(self.inside(text) for value in values for text in texts_in(value)):
            return list(values), {}
        free = free_characters(values)
        names = dict(zip(free, self.names, strict=False))

        def hide(text: str) -> str:
            for character, name in names.items():
                text = text.replace(name, character)
            return text

        return [mapped(value, hide) for value in values], names


def free_characters(value: Any) -> Iterator[str]:
    """Return private-use characters that occur in no text of `value`."""
    written = {character for text in texts_in(value) for character in text if ord(character) >= _HIDDEN}
    return (chr(code) for code in range(_HIDDEN, 0x10FFFE) if chr(code) not in written)


def texts_in(value: Any) -> Iterator[str]:
    """Return every text in a nested value, keys of mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from texts_in(pair)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of a nested value with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {mapped(k, change): mapped(v, change) for k, v in value.items()}
    return [mapped(inner, change) for inner in value] if isinstance(value, list | tuple) else value
