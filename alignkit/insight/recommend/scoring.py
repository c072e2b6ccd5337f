"""What scores samples: whether a spec names a language model, and what a column of the rows could check."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from alignkit.data.rows import Row
from alignkit.rewards.numeric import final_number

SHORT = 40  # characters of an answer that can be asked for letter by letter
_MARKS = ("####", "\\boxed{")
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3})?"
_BARE = re.compile(
    rf"[+\-−]?\s?[$€£]?\s?(?:\\[dt]?frac\{{-?\d+\}}\{{-?\d+\}}|{_DIGITS}(?:\s?/\s?{_DIGITS})?)"
    r"(?:\s?[%°$€£]|\s[^\W\d_]+)?\.?"  # a unit is one word, apart from its number: 4th and 3D are no numbers
)


def leaves(spec: Any) -> Iterator[Any]:
    """Yield the single rewards of a spec of rewards."""
    if isinstance(spec, Mapping) and "ensemble" in spec:
        spec = spec["ensemble"]
    if isinstance(spec, list | tuple):
        for one in spec:
            yield from leaves(one)
    else:
        yield spec


def says_llm(spec: Any) -> bool:
    """Whether a spec of rewards names a language model."""
    return any((one.get("use") if isinstance(one, Mapping) else one) == "llm" for one in leaves(spec))


def verifier(rows: Sequence[Row]) -> Literal["numeric", "exact"] | None:
    """Say which verifier could check every row's `answer`, None where none can.

    A number is one that is marked (#### or \\boxed{}), or that stands alone but for a currency or a unit: prose that
    holds a number somewhere has another answer.
    """
    said = [row.extra.get("answer") for row in rows]
    if not said or not all(map(_can_be_asked_for, said)):
        return None
    texts = [str(a).strip() for a in said]
    if all(map(_is_number, texts)):
        return "numeric"
    return "exact" if max(map(len, texts)) <= SHORT else None


def _can_be_asked_for(answer: Any) -> bool:
    """Not so of an empty cell, which a table may write as nan, and of a truth value, which has no one spelling."""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return math.isfinite(answer)
    return isinstance(answer, str) and bool(answer.strip())


def _is_number(text: str) -> bool:
    if not any(mark in text for mark in _MARKS) and (len(text) > SHORT or not _BARE.fullmatch(text)):
        return False
    return final_number(text) is not None
