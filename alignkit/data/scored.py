"""Rows with scores or signed preferences (UltraFeedback, HelpSteer, ...), rewritten to our own forms."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from alignkit.data.cells import Cells
from alignkit.data.published import Rewritten, taken, text_of
from alignkit.data.rows import DroppedRow, shown
from alignkit.method import DataKind

_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")  # HelpSteer2's prompts of several turns
_MIDDLE = 2  # of HelpSteer's ratings from 0 to 4


def preference(cells: Cells, kind: DataKind) -> Rewritten:
    """Read the column `preference` as `winner`."""
    own = {**cells.cells, **taken(cells, {"winner": "preference"})}
    return Rewritten("winner", own, {"winner": "preference"})


def ultrafeedback(cells: Cells, kind: DataKind) -> Rewritten:
    """Read UltraFeedback's instruction with its scored completions."""
    prompt = [{"role": "user", "content": text_of(cells, "instruction")}]
    if kind == "prompts":
        return Rewritten("prompt", {"prompt": prompt}, {"prompt": "instruction"})
    if cells.cells.get("completions") == []:
        raise DroppedRow("without an answer")
    answers, scores = [], []
    for answer in cells.list_of("completions"):
        if isinstance(answer, Mapping):
            answers.append(answer.get("response"))
            scores.append(_score(cells, answer))
        else:
            cells.bad("completions", f"found {shown(answer)}", 'give objects {"response", "overall_score", ...}')
    own = {"prompt": prompt, "completions": answers, "scores": scores}
    return Rewritten("ranked", own, {"prompt": "instruction", "scores": "completions"})


def helpsteer2(cells: Cells, kind: DataKind) -> Rewritten:
    """Read HelpSteer2's preferences: negative where the first response is better."""
    columns = ("response_1", "response_2", "preference_strength")
    return _signed(cells, "prompt", _helpsteer_prompt(cells), columns, kind)


def helpsteer3(cells: Cells, kind: DataKind) -> Rewritten:
    """Read HelpSteer3's preferences: negative where the first response is better."""
    columns = ("response1", "response2", "overall_preference")
    return _signed(cells, "context", cells.cells.get("context"), columns, kind)


def rated(cells: Cells, kind: DataKind) -> Rewritten:
    """Read HelpSteer's ratings: above the middle of 0 to 4 is desirable, below it undesirable.

    For pairs the rows of one prompt were joined by `grouped`.
    """
    prompt = _helpsteer_prompt(cells)
    if kind == "prompts":
        return Rewritten("prompt", {"prompt": prompt}, {})
    if kind == "pairs":
        names = {"completions": "response", "scores": "helpfulness"}
        return Rewritten("ranked", {"prompt": prompt, **taken(cells, names)}, names)
    rating = cells.number_of("helpfulness", cells.cells.get("helpfulness"))
    if rating == _MIDDLE and not cells.faults:
        raise DroppedRow("with a rating in the middle")
    own = {"prompt": prompt, "label": rating > _MIDDLE, **taken(cells, {"completion": "response"})}
    return Rewritten("unpaired", own, {"completion": "response"})


def grouped(rows: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """Join the rated rows of one prompt to one row with lists of responses and ratings, numbered as the first."""
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for number, cells in rows:
        key = json.dumps(cells.get("prompt"), sort_keys=True, default=str)
        _, whole = found.setdefault(key, (number, {**cells, "response": [], "helpfulness": []}))
        whole["response"].append(cells.get("response"))
        whole["helpfulness"].append(cells.get("helpfulness"))
    return list(found.values())


def _signed(cells: Cells, column: str, prompt: Any, columns: tuple[str, str, str], kind: DataKind) -> Rewritten:
    """Read two responses with a signed preference as `winner`."""
    first, second, strength = columns
    number = 0.0 if kind == "prompts" else cells.number_of(strength, cells.cells.get(strength))
    winner = "tie" if number == 0 else "a" if number < 0 else "b"
    names = {"response_a": first, "response_b": second}
    own = {"prompt": prompt, "winner": winner, **taken(cells, names)}
    return Rewritten("winner", own, {"prompt": column, **names})


def _helpsteer_prompt(cells: Cells) -> Any:
    """Return HelpSteer's prompt as messages; "<extra_id_1>" marks its turns where there are several."""
    text = cells.cells.get("prompt")
    if not isinstance(text, str):
        return text
    first, *marked = _TURN.split(text)
    turns = zip(marked[::2], marked[1::2], strict=True)
    return [{"role": "user", "content": first}, *({"role": who.lower(), "content": said} for who, said in turns)]


def _score(cells: Cells, answer: Mapping[str, Any]) -> float:
    """Return the overall score of a completion of UltraFeedback, else the mean of its aspects' ratings."""
    for name in ("overall_score", "fine-grained_score"):
        if answer.get(name) is not None:
            return cells.number_of("completions", answer[name])
    aspects = answer.get("annotations")
    ratings = [_rating(one) for one in aspects.values()] if isinstance(aspects, Mapping) else []
    known = [rating for rating in ratings if math.isfinite(rating)]
    if not known:
        cells.bad("completions", "a completion without a score", "give it overall_score or fine-grained_score")
        return 0.0
    return sum(known) / len(known)


def _rating(aspect: Any) -> float:
    """Return an aspect's rating; nan where it has none, such as "N/A"."""
    value = aspect.get("Rating") if isinstance(aspect, Mapping) else None
    try:
        return float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        return math.nan
