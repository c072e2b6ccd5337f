"""Answers to mathematical questions as expressions and words, compared by math-verify."""

from __future__ import annotations

import re
from typing import Any

from alignkit.data.rows import shown
from alignkit.rewards.functions import RowError
from alignkit.rewards.numeric import Marked, marked

_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})*,0\d\d(?:,\d{3})*(?![\d,])")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[ '’-][^\W\d_]+)*|[A-Z]", re.UNICODE)


def same_expression(completion: str, answer: str, index: int) -> bool:
    """Return whether a completion's answer is the row's: an expression equal to it, or the same words.

    Both are what `marked` finds, else the whole text. The row's is read as if in a box, so that it needs no delimiters:
    math-verify reads text without them down to its first number. Words are compared as text, ignoring case.
    Raises RowError: the row's answer is neither.
    """
    from math_verify import parse, verify

    wanted, given = marked(answer) or Marked(answer.strip()), marked(completion)
    if (words := _words(wanted.text)) is not None:
        return _words(given.text if given else completion) == words
    expression = _boxed(wanted)
    if not (expected := parse(expression)):
        raise RowError(index, f"math-verify finds no expression in the answer {shown(answer)}")
    return bool(verify(expected, _of_completion(parse, completion, given)))


def _of_completion(parse: Any, completion: str, given: Marked | None) -> Any:
    """Read a completion: what is marked, or all of it where it is one bare expression, else what math-verify finds."""
    if given is not None:
        return parse(_boxed(given))
    bare = completion.strip()
    return parse(completion if "\n" in bare or " " in bare or "$" in bare else _boxed(Marked(bare)))


def _words(text: str) -> str | None:
    """Return an answer that is words, such as "Tuesday" or "\\text{no}", in lower case; None for any other."""
    plain = " ".join(_TEXT.sub(r"\1", text).strip().strip("$.").split())
    return plain.casefold() if _WORDS.fullmatch(plain) else None


def _boxed(answer: Marked) -> str:
    """Return the answer in a box, in which math-verify reads all of it; (1,000) is a number in brackets, no pair."""
    inside = answer.text.strip().strip("$")
    inside = _THOUSANDS.sub(lambda number: number.group().replace(",", ""), inside)
    return f"\\boxed{{-({inside})}}" if answer.negative else f"\\boxed{{{inside}}}"
