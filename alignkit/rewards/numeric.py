"""Numbers in answers to mathematical questions: finding the answer, and its exact value."""

from __future__ import annotations

import re
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
_BEHIND_OPERAND = re.compile(rf"[{_OPERAND}]")
_LATEX = (("\\!", ""), ("{,}", ","), ("\\,", ","), ("\\$", "$"))  # thousands and dollars in LaTeX
_TOO_LONG = 400  # characters; Python refuses to read integers of thousands of digits


def final_number(text: str) -> Fraction | None:
    """Return the number that is the answer in `text`, exact; None without a number.

    The answer is the number after the last "####" or in the last "\\boxed{}", whichever is later, else the last number.
    Commas between thousands, currency and per cent signs are ignored; 3/4 and \\frac{3}{4} are fractions.
    A minus with white space on both sides is a difference after a word, a number or a bracket, else a sign.
    """
    hashes, boxed = text.rfind("####"), text.rfind("\\boxed{")
    if hashes > boxed:
        line = text[hashes + 4 :].strip().split("\n")[0]
        return number_in(line)
    if boxed >= 0:
        return number_in(_inside(text, boxed + len("\\boxed{")))
    return number_in(text)


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
