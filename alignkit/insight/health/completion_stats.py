"""Statistics of a step's completions beyond its metrics: repetition, openings, groups without a learning signal."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]  # a line of completions.jsonl
NGRAM, OPENING = 4, 3  # words, or characters


def repetition(text: str) -> float:
    """Return the fraction of a text's 4-grams that repeat earlier ones; 0 for a text without 4-grams."""
    units = words(text)
    grams = [tuple(units[i : i + NGRAM]) for i in range(len(units) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def same_opening(rows: Sequence[Row]) -> float | None:
    """Return the fraction of the prompts answered with the most common first words; None with fewer than four prompts.

    Each prompt counts once, by the fraction of its completions that begin with these words.
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
    """Return the fraction of the prompts whose completions all have the same score; None where no prompt has several.

    best, worst: rewards of the run so far. A prompt whose completions all have the best reward is solved and does not
    count, unless the run has had no other reward.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if (reward := number(row.get("reward"))) is not None:
            groups[str(row.get("row"))].append(reward)
    multiple = [g for g in groups.values() if len(g) > 1]
    dead = [g for g in multiple if min(g) == max(g) and (g[0] < best or best == worst)]
    return len(dead) / len(multiple) if multiple else None


def spreads(rows: Sequence[Row]) -> dict[str, float]:
    """Return the standard deviation of every reward over the completions, as "spread/reward/NAME"."""
    names = {name for row in rows for name in row if name.startswith("reward/")}
    values = {name: [v for row in rows if (v := number(row.get(name))) is not None] for name in names}
    return {f"spread/{name}": statistics.pstdev(found) for name, found in values.items() if found}


def words(text: str) -> list[str]:
    """Split into words, or into characters for languages that hardly use spaces."""
    split = text.split()
    return split if len(text) < 20 * max(len(split), 1) else list("".join(split))


def number(value: Any) -> float | None:
    """Return a value as a finite float, None where it is not a number."""
    finite = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    return float(value) if finite else None


def _text(row: Row) -> str:
    return str(row.get("completion", ""))


def completion_stats(rows: Sequence[Row], best: float, worst: float) -> dict[str, float]:
    """Return all statistics by name; empty without completions."""
    if not rows:
        return {}
    stats = {
        "text/repetition": statistics.fmean(repetition(_text(row)) for row in rows),
        "text/opening": same_opening(rows),
        "text/dead_groups": dead_groups(rows, best, worst),
    }
    return {name: value for name, value in stats.items() if value is not None} | spreads(rows)
