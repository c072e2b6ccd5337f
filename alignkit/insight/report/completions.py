"""The same held-out prompts before and after training: the first few, and those whose reward changed most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.insight.report.numbers import finite
from alignkit.insight.report.run_files import Run

FIRST, CHANGED = 6, 3


@dataclass(frozen=True)
class Answer:
    """A completion with its measurements. facts: as text, such as "reward 0.5"."""

    text: str
    facts: list[str]


@dataclass(frozen=True)
class Sample:
    """One prompt with its first completion in the first and in the last evaluation. why: the reason for showing it."""

    prompt: str
    before: Answer
    after: Answer
    why: str


@dataclass(frozen=True)
class Samples:
    """The completions of a run to show. steps: of the two evaluations. n: prompts that both have."""

    steps: tuple[int, int]
    n: int
    shown: list[Sample]


def samples(run: Run) -> Samples | None:
    """Return the prompts to show; None where no held-out prompt was sampled in two evaluations."""
    before, after = (_by_prompt(some) for some in run.answers)
    both = [key for key in before if key in after]
    if not both:
        return None
    gains = {k: g for k in both if (g := _gain(before[k], after[k])) is not None}
    order = sorted(gains, key=lambda k: gains[k])
    fell = [k for k in order[:CHANGED] if gains[k] < 0]
    rose = [k for k in reversed(order[-CHANGED:]) if gains[k] > 0]
    why = dict.fromkeys(rose, "reward rose most") | dict.fromkeys(fell, "reward fell most")
    chosen = dict.fromkeys([*both[:FIRST], *rose, *fell])
    shown = [Sample(_text(before[k]["prompt"]), _answer(before[k]), _answer(after[k]), why.get(k, "")) for k in chosen]
    steps = int(run.answers[0][0]["step"]), int(run.answers[1][0]["step"])
    return Samples(steps, len(both), shown)


def _by_prompt(lines: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the first completion of each prompt, by the prompt's row and text."""
    found: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        found.setdefault(f"{line.get('row')} {_text(line.get('prompt'))}", line)
    return found


def _gain(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    for name in ("reward", "wins"):
        a, b = before.get(name), after.get(name)
        if finite(a) and finite(b):
            return b - a
    return None


def _answer(line: Mapping[str, Any]) -> Answer:
    facts = [f"{name} {line[name]:.4g}" for name in ("reward", "wins") if finite(line.get(name))]
    if isinstance(line.get("tokens"), int):
        facts.append(f"{line['tokens']} tokens{'' if line.get('ended', True) else ', cut'}")
    return Answer(str(line.get("completion", "")), facts)


def _text(prompt: Any) -> str:
    """Return a prompt as text; messages each with their role."""
    if isinstance(prompt, list):
        return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt if isinstance(m, dict))
    return str(prompt)
