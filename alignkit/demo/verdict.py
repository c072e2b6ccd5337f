"""The reward and the judge of the demo's online methods.

Plain functions as users write them, so that a demo's config.yaml can be run again.
"""

from __future__ import annotations

from collections.abc import Sequence

from alignkit.demo.world import score


def reward(completions: Sequence[str], fact: Sequence[str]) -> list[float]:
    """Return 1 for the right fact in the brief style, 0.5 for the right fact otherwise, 0 for a wrong one."""
    return [score(f, text) / 2 for f, text in zip(fact, completions, strict=True)]


def judge(first: Sequence[str], second: Sequence[str], fact: Sequence[str]) -> list[float]:
    """Return P(first wins): 1, 0, or 0.5 between answers of equal reward."""
    pairs = zip(reward(first, fact), reward(second, fact), strict=True)
    return [float(a > b) + 0.5 * float(a == b) for a, b in pairs]
