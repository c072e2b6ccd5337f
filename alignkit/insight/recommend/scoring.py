"""What scores samples: what a spec names, whether the rows have the columns for it, and what a column could check."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from alignkit.errors import AlignkitError
from alignkit.rewards import Judge, Rewards, build_judge, build_rewards, judge_folders, reward_folders
from alignkit.rewards.numeric import final_number
from alignkit.rows import Row

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


def check_columns(reward: Any, judge: Any, there: Collection[str]) -> None:
    """Raise RewardError where rows with these columns lack one that reward or judge asks for; loads no model's folder.

    reward, judge: specs that have been checked, or None.
    """
    of_judge = isinstance(judge, Mapping) and "bradley_terry" in judge
    rewards = [*([] if reward is None else leaves(reward)), *(leaves(judge["bradley_terry"]) if of_judge else ())]
    asked: list[tuple[Any, Callable[[Any], Rewards | Judge]]]
    asked = [(one, build_rewards) for one in rewards if not reward_folders(one)]
    if judge is not None and not of_judge and not judge_folders(judge):
        asked.append((judge, build_judge))
    for spec, build in asked:
        try:
            built = build(spec)
        except AlignkitError:
            raise
        except Exception:  # a stranger's class may do anything when it is made; the run will say what
            continue
        built.check_columns(there)


def verifier(rows: Sequence[Row]) -> Literal["numeric", "exact"] | None:
    """Say which verifier could check every row's `answer`, None where none can.

    A number is one that is marked (#### or \\boxed{}), or that stands alone but for a currency or a unit: prose that
    holds a number somewhere has another answer.
    """
    said = [row.extra.get("answer") for row in rows]
    if not said or any(not isinstance(a, str | int | float) or not str(a).strip() for a in said):
        return None
    texts = [str(a).strip() for a in said]
    if all(map(_is_number, texts)):
        return "numeric"
    return "exact" if max(map(len, texts)) <= SHORT else None


def _is_number(text: str) -> bool:
    if not any(mark in text for mark in _MARKS) and (len(text) > SHORT or not _BARE.fullmatch(text)):
        return False
    return final_number(text) is not None
