"""Duplicate and contradictory rows, and prompts on both sides of a split."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from alignkit.data.rows import Content, Row


@dataclass(frozen=True)
class Repeats:
    """Repeated content; rows are numbered from 1 in the source.

    prompts: the number of different prompts. duplicates: rows equal to an earlier row. contradictions: (earlier row,
    row) where one prefers the answer that the other rejects, or the labels differ.
    """

    prompts: int
    duplicates: tuple[int, ...]
    contradictions: tuple[tuple[int, int], ...]


def repeats(rows: Sequence[Row]) -> Repeats:
    """Find repeated and contradictory rows; white space around texts is ignored."""
    seen: dict[tuple[object, ...], int] = {}
    duplicates, contradictions = [], []
    for row in rows:
        prompt, answers, label = key(row.prompt), tuple(map(key, row.completions)), row.numbers.get("desirable")
        opposite = (prompt, answers, 1.0 - label) if label is not None else (prompt, answers[::-1], None)
        if (prompt, answers, label) in seen:
            duplicates.append(row.row)
        elif opposite in seen:  # a single answer is its own reverse, and so a duplicate
            contradictions.append((seen[opposite], row.row))
        seen.setdefault((prompt, answers, label), row.row)
    return Repeats(len({key(row.prompt) for row in rows}), tuple(duplicates), tuple(contradictions))


def votes(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Return how often either answer is chosen, for each pair of answers with more than one judgement."""
    chosen = Counter((key(row.prompt), *map(key, row.completions)) for row in rows)
    both = {(prompt, *sorted((a, b))) for prompt, a, b in chosen}
    counts = ((chosen[prompt, a, b], chosen[prompt, b, a]) for prompt, a, b in sorted(both))
    return [(one, other) for one, other in counts if one + other > 1]


def shared_prompts(rows: Sequence[Row], held_out: Sequence[Row]) -> tuple[int, ...]:
    """Return the held-out rows whose prompt is trained on."""
    trained = {key(row.prompt) for row in rows}
    return tuple(row.row for row in held_out if key(row.prompt) in trained)


def key(content: Content) -> str:
    """Return a key that equal contents share."""
    if isinstance(content, str):
        return content.strip()
    return json.dumps([[message["role"], message["content"].strip()] for message in content])
