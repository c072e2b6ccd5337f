"""Numbers in answers to mathematical questions: finding the answer, and its exact value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# repetitions are possessive, and none starts where another can end: linear time in the text's length
_DIGITS = r"(?:(?<!\d)(?<!\d,)\d{1,3}+(?:,\d{3})++(?![\d,])|\d++)"
DECIMAL = rf"(?:{_DIGITS}(?:\.\d++)?|\.\d++)(?:[eE][+-]?\d{{1,3}}+(?!\d))?"
_OPERAND = r"\w.)\]}"  # after a word, a number or a bracket, a minus is a dash or a difference
_NUMBER = re.compile(
    rf"(?:(?<![{_OPERAND}])(?P<sign>[+\-−])(?P<gap>\s*+))?(?:[$€£]\s*+)?(?:\\[dt]?frac\s*+"
    r"(?:\{\s*+(?P<a>-?\d++)\s*+\}|(?P<a1>\d))\s*+(?:\{\s*+(?P<b>-?\d++)\s*+\}|(?P<b1>\d))"
    rf"|(?P<top>{DECIMAL})(?:\s*+/\s*+(?P<bottom>{DECIMAL}))?)"
)
_SIGN_BEFORE = re.compile(rf"(?<![{_OPERAND}])[-−](?P<gap>\s?)\s*+$")
_BEHIND_OPERAND = re.compile(rf"[{_OPERAND}]")
_LATEX = (("\\!", ""), ("{,}", ","), ("\\,", ","), ("\\$", "$"))  # thousands and dollars in LaTeX
_TOO_LONG = 400  # characters; Python refuses to read integers of thousands of digits


@dataclass(frozen=True)
class Marked:
    """The part of a text that is marked as its answer, and whether a minus stands before the mark."""

    text: str
    negative: bool = False


def marked(text: str) -> Marked | None:
    """Return what follows the last "####" in its line, or is in the last "\\boxed{}", whichever is later.

    A minus before a box is the answer's sign, unless it is a difference or a dash, as before a number.
    """
    hashes, boxed = text.rfind("####"), text.rfind("\\boxed{")
    if hashes > boxed:
        return Marked(text[hashes + 4 :].strip().split("\n")[0])
    if boxed < 0:
        return None
    before = text[:boxed].rstrip("$")
    sign = _SIGN_BEFORE.search(before)
    negative = sign is not None and not (sign["gap"] and _BEHIND_OPERAND.match(before[: sign.start()].rstrip()[-1:]))
    return Marked(_inside(text, boxed + len("\\boxed{")), negative)


def final_number(text: str) -> Fraction | None:
    """Return the number that is the answer in `text`, exact; None without a number.

    The answer is the last number of what `marked` finds, else of the text. Commas between thousands, currency and per
    cent signs are ignored; 3/4 and \\frac{3}{4} are fractions. A minus with white space on both sides is a difference
    after a word, a number or a bracket, else a sign.
    """
    answer = marked(text)
    if answer is None:
        return number_in(text)
    value = number_in(answer.text)
    return -value if value is not None and answer.negative else value


def number_in(text: str) -> Fraction | None:
    """Return the last number in `text`, exact; None without a number."""
    for written, meant in _LATEX:
        text = text.replace(written, meant)
    last = None
    for match in _NUMBER.finditer(text):
        last = match
    if last is None or len(last.group()) > _TOO_LONG:
        return None
    top = last["a"] or last["a1"] or last["top"]
    bottom = last["b"] or last["b1"] or last["bottom"]
    try:
        value = Fraction(top.replace(",", "")) / Fraction((bottom or "1").replace(",", ""))
    except ZeroDivisionError:
        return None
    difference = last["gap"] and _BEHIND_OPERAND.match(text[: last.start()].rstrip()[-1:])
    return -value if last["sign"] in ("-", "−") and not difference else value


def _inside(text: str, begin: int) -> str:
    """Return the text between the brace before `begin` and its closing brace."""
    depth = 1
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i]
    return text[begin:]
