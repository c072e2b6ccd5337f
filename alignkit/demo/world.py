"""A closed world: creatures with properties, drawn by a seed; questions about them; answers in two styles.

    brief    " The fox is red."
    chatty   " What a lovely question! The fox is red. I hope that this helps!"

Both are right, and the base model learns to give each about half of the time. The preferred style is the brief one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CREATURES = (
    "fox", "owl", "crab", "lynx", "newt", "wren", "mole", "hare", "toad", "swan", "goat", "seal", "bear", "crow",
    "deer", "duck", "frog", "gull", "lark", "moth", "orca", "puma", "slug", "wasp",
)  # fmt: skip
PROPERTIES = {
    "colour": ("red", "blue", "green", "grey", "black", "white"),
    "home": ("a cave", "a nest", "a pond", "a burrow", "a meadow", "a tower"),
    "food": ("berries", "roots", "leaves", "seeds", "honey", "moss"),
    "friend": ("the king", "the baker", "the pilot", "the nurse", "the judge", "the piper"),
}
QUESTIONS = {
    "colour": ("What colour is the {c}?", "Tell me the colour of the {c}.", "The {c} has which colour?"),
    "home": ("Where does the {c} live?", "Tell me where the {c} lives.", "What is the home of the {c}?"),
    "food": ("What does the {c} eat?", "Tell me what the {c} eats.", "What is the food of the {c}?"),
    "friend": ("Who is the {c}'s friend?", "Tell me who likes the {c}.", "Which friend has the {c}?"),
}
FACTS = {
    "colour": "The {c} is {v}.",
    "home": "The {c} lives in {v}.",
    "food": "The {c} eats {v}.",
    "friend": "The {c} is friends with {v}.",
}
OPENING, CLOSING = "What a lovely question!", "I hope that this helps!"


@dataclass(frozen=True)
class Question:
    """A question, its fact, and its two answers."""

    prompt: str
    fact: str
    brief: str
    chatty: str


def questions(seed: int) -> tuple[list[Question], list[Question]]:
    """Return (train, held out). Every held-out question asks in new words for a fact that training asks for too."""
    rng = random.Random(seed)
    train: list[Question] = []
    held_out: list[Question] = []
    for creature in CREATURES:
        for name, values in PROPERTIES.items():
            fact = FACTS[name].format(c=creature, v=rng.choice(values))
            held = rng.randrange(3) if rng.random() < 0.5 else None
            for i, wording in enumerate(QUESTIONS[name]):
                question = Question(
                    prompt=f"Question: {wording.format(c=creature)}\nAnswer:",
                    fact=fact,
                    brief=f" {fact}",
                    chatty=f" {OPENING} {fact} {CLOSING}",
                )
                (held_out if i == held else train).append(question)
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def score(fact: str, answer: str) -> int:
    """Judge an answer: 2 for the brief style with the right fact, 1 for the right fact otherwise, 0 for a wrong one."""
    text = answer.strip()
    return 2 if text == fact else int(fact in text)


def sft_rows(asked: Iterable[Question]) -> list[dict[str, Any]]:
    """Rows for fine-tuning: each question once in each style."""
    return [{"prompt": q.prompt, "completion": answer} for q in asked for answer in (q.brief, q.chatty)]


def pair_rows(asked: Iterable[Question]) -> list[dict[str, Any]]:
    """Preference pairs: brief over chatty."""
    return [{"prompt": q.prompt, "chosen": q.brief, "rejected": q.chatty} for q in asked]


def judged_rows(asked: Sequence[Question]) -> list[dict[str, Any]]:
    """Preference pairs that serve every method: with what the verdict looks at."""
    return [{**pair, "fact": q.fact} for q, pair in zip(asked, pair_rows(asked), strict=True)]


def prompt_rows(asked: Iterable[Question]) -> list[dict[str, Any]]:
    """Rows for the methods that sample: the question, and what the verdict looks at."""
    return [{"prompt": q.prompt, "fact": q.fact} for q in asked]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write one JSON object a line and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
