"""A toy task: creatures with properties, drawn from a seed; questions about them; answers in two styles.

    brief    " The fox is red."
    chatty   " What a lovely question! The fox is red. I hope that this helps!"

Both are right, and the base model learns to use each about half of the time. The brief style is preferred.
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
    "deer", "duck",
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
    """Return (train, held out). Every held-out question asks in new words for a fact that occurs in training."""
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
    """Score an answer: 2 for the right fact in the brief style, 1 for the right fact otherwise, 0 for a wrong one."""
    text = answer.strip()
    return 2 if text == fact else int(fact in text)


def sft_rows(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Return rows for fine-tuning: each question once in each style."""
    return [{"prompt": q.prompt, "completion": answer} for q in questions for answer in (q.brief, q.chatty)]


def pair_rows(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Return preference pairs: brief over chatty."""
    return [{"prompt": q.prompt, "chosen": q.brief, "rejected": q.chatty} for q in questions]


def judged_rows(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Return preference pairs for every method: with the column that reward and judge read."""
    return [{**pair, "fact": q.fact} for q, pair in zip(questions, pair_rows(questions), strict=True)]


def prompt_rows(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Return rows for methods that sample: the question, and the column that reward and judge read."""
    return [{"prompt": q.prompt, "fact": q.fact} for q in questions]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write one JSON object per line and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
