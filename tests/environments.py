"""Environments, tools and a ChatML model for tests."""

from __future__ import annotations

import time
from typing import Any


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def double(n: int) -> int:
    """Double a number.

    Args:
        n: the number
    """
    if n > 99:
        raise ValueError("too large")
    return 2 * n


def hangs(n: int) -> int:
    """Take long.

    Args:
        n: anything
    """
    time.sleep(5)
    return n
