"""Tokens as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_texts(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text after the prompt; special tokens by name.

    Where several tokens encode one character, the last has it and the others are empty.
    """

    def text(upto: int) -> str:
        return str(tokenizer.decode([*prompt, *ids[:upto]], clean_up_tokenization_spaces=False))

    found, before = [], text(0)
    for i, token in enumerate(ids, 1):
        now = text(i)
        if not now.startswith(before):  # the decoder changed its earlier output
            found.append(str(tokenizer.convert_ids_to_tokens(token)))
            before = now
        elif now.endswith("\ufffd") and i < len(ids):
            found.append("")
        else:
            found.append(now[len(before) :])
            before = now
    return found
