"""Rows of each kind, made from a few words."""

from __future__ import annotations

import random
from typing import Any

WORDS = (
    "red", "blue", "green", "fox", "owl", "newt", "sees", "likes", "eats", "a", "the", "big", "small", "old", "moss",
    "tree", "king", "hill",
)  # fmt: skip


def sentence(rng: random.Random, low: int = 1, high: int = 9) -> str:
    """A few words; every call another."""
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def make_rows(kind: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """n rows of a data kind with different prompts."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(n):
        prompt = f"{i} {sentence(rng)}:"
        if kind == "pairs":
            rows.append({"prompt": prompt, "chosen": f" yes {sentence(rng)}", "rejected": f" no {sentence(rng)}"})
        elif kind == "unpaired":
            rows.append({"prompt": prompt, "completion": f" {sentence(rng)}", "label": i % 2 == 0})
        else:
            rows.append({"prompt": prompt, "completion": f" {sentence(rng)}"})
    return rows
