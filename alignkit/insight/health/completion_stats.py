"""What the completions of a step say that its metrics do not: repetition, openings, groups that teach nothing."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]  # a line of completions.jsonl
NGRAM, OPENING = 4, 3  # units of text


def repetition(text: str) -> float:
    """Return the part of a text's 4-grams that occurred in it before; 0 where it has none."""
    units = words(text)
    grams = [tuple(units[i : i + NGRAM]) for i in range(len(units) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def same_opening(rows: Sequence[Row]) -> float | None:
    """Return the part of the prompts that is answered with the commonest first words, None of fewer than four prompts.

    Every prompt counts once, by the part of its completions that begin so.
    """
    by_prompt: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for row in rows:
        by_prompt[str(row.get("row"))].append(tuple(words(_text(row))[:OPENING]))
    if len(by_prompt) < 4:
        return None
    shares: Counter[tuple[str, ...]] = Counter()
    for openings in by_prompt.values():
        for opening, count in Counter(openings).items():
            shares[opening] += count / len(openings)  # type: ignore[assignment]
    return max(shares.values()) / len(by_prompt)


def dead_groups(rows: Sequence[Row], best: float, worst: float) -> float | None:
    """Return the part of the prompts whose completions all score alike; None where no prompt has several.

    best, worst: rewards of the run so far. A prompt whose completions are all at the best is solved and does not count,
    unless no other reward was ever seen.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if (reward := number(row.get("reward"))) is not None:
            groups[str(row.get("row"))].append(reward)
    several = [g for g in groups.values() if len(g) > 1]
    dead = [g for g in several if min(g) == max(g) and (g[0] < best or best == worst)]
    return len(dead) / len(several) if several else None


def spreads(rows: Sequence[Row]) -> dict[str, float]:
    """Return the standard deviation of every reward over the completions, as "spread/reward/NAME"."""
    names = {name for row in rows for name in row if name.startswith("reward/")}
    values = {name: [v for row in rows if (v := number(row.get(name))) is not None] for name in names}
    return {f"spread/{name}": statistics.pstdev(found) for name, found in values.items() if found}


def words(text: str) -> list[str]:
    """Split into words, or into characters where a language writes hardly any spaces."""
    split = text.split()
    return split if len(text) < 20 * max(len(split), 1) else list("".join(split))


def number(value: Any) -> float | None:
    """Return a value as a finite number, None where it is none."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    return float(value) if good else None


def _text(row: Row) -> str:
    return str(row.get("completion", ""))


def facts(rows: Sequence[Row], best: float, worst: float) -> dict[str, float]:
    """Return all of it as numbers by name; nothing of no completions."""
    if not rows:
        return {}
    said = {
        "text/repetition": statistics.fmean(repetition(_text(row)) for row in rows),
        "text/opening": same_opening(rows),
        "text/dead_groups": dead_groups(rows, best, worst),
    }
    return {name: value for name, value in said.items() if value is not None} | spreads(rows)
