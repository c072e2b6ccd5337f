"""Tokens as text, so that they can be read one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pieces(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text behind the prompt, special tokens by their names.

    Where several tokens make one character, the last of them has it, and the others have nothing.
    """

    def text(upto: int) -> str:
        return str(tokenizer.decode([*prompt, *ids[:upto]], clean_up_tokenization_spaces=False))

    found, before = [], text(0)
    for i, token in enumerate(ids, 1):
        now = text(i)
        if not now.startswith(before):  # a decoder that rewrites what it has said
            found.append(str(tokenizer.convert_ids_to_tokens(token)))
            before = now
        elif now.endswith("\ufffd") and i < len(ids):
            found.append("")
        else:
            found.append(now[len(before) :])
            before = now
    return found
