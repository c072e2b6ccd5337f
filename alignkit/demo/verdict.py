"""What the demo's online methods are told about an answer: a reward, and a judge of two answers.

Plain functions as users write them, so that a demo's config.yaml runs again.
"""

from __future__ import annotations

from collections.abc import Sequence

from alignkit.demo.world import score


def reward(completions: Sequence[str], fact: Sequence[str]) -> list[float]:
    """Return 1 for the brief style with the right fact, 0.5 for the right fact otherwise, 0 for a wrong one."""
    return [score(f, text) / 2 for f, text in zip(fact, completions, strict=True)]


def judge(first: Sequence[str], second: Sequence[str], fact: Sequence[str]) -> list[float]:
    """Return P(first wins): 1, 0, or 0.5 between answers of the same worth."""
    pairs = zip(reward(first, fact), reward(second, fact), strict=True)
    return [float(a > b) + 0.5 * float(a == b) for a, b in pairs]
