"""Rewards that call a language model, and rewards that can check the rows' column `answer`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from alignkit.data.rows import Row
from alignkit.rewards.numeric import final_number

SHORT = 40  # characters of an answer that can be compared letter by letter
_MARKS = ("####", "\\boxed{")
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3})?"
_BARE = re.compile(
    rf"[+\-−]?\s?[$€£]?\s?(?:\\[dt]?frac\{{-?\d+\}}\{{-?\d+\}}|{_DIGITS}(?:\s?/\s?{_DIGITS})?)"
    r"(?:\s?[%°$€£]|\s[^\W\d_]+)?\.?"  # a unit is one word, separated from its number: 4th and 3D are not numbers
)


def single_rewards(spec: Any) -> Iterator[Any]:
    """Yield the single rewards of a spec of rewards."""
    if isinstance(spec, Mapping) and "ensemble" in spec:
        spec = spec["ensemble"]
    if isinstance(spec, list | tuple):
        for inner in spec:
            yield from single_rewards(inner)
    else:
        yield spec


def uses_llm(spec: Any) -> bool:
    """Return whether a spec of rewards names a language model."""
    return any((r.get("use") if isinstance(r, Mapping) else r) == "llm" for r in single_rewards(spec))


def verifier(rows: Sequence[Row]) -> Literal["numeric", "exact"] | None:
    """Return the verifier that could check every row's `answer`, None where none can.

    An answer counts as a number where it is marked (#### or \\boxed{}), or stands alone except for a currency or a
    unit: the answer of prose with a number somewhere is not that number.
    """
    answers = [row.extra.get("answer") for row in rows]
    if not answers or not all(map(_is_checkable, answers)):
        return None
    texts = [str(a).strip() for a in answers]
    if all(map(_is_number, texts)):
        return "numeric"
    return "exact" if max(map(len, texts)) <= SHORT else None


def _is_checkable(answer: Any) -> bool:
    """False for an empty cell, which a table may hold as nan, and for a boolean, which has several spellings."""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return math.isfinite(answer)
    return isinstance(answer, str) and bool(answer.strip())


def _is_number(text: str) -> bool:
    if not any(mark in text for mark in _MARKS) and (len(text) > SHORT or not _BARE.fullmatch(text)):
        return False
    return final_number(text) is not None
