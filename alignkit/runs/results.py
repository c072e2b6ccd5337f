"""The metrics that a run is judged by, before and after training, from its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEADLINE = ("reward/mean", "wins/mean", "rewards/accuracy", "rewards/margin", "loss", "kl")
"""The metrics that summarise a run on the terminal, in a pipeline's table and in its results, without "eval/"."""
RESULTS = (
    *HEADLINE, "entropy", "completion/length", "completion/eos_rate", "completion/distinct_2", "logps/chosen",
    "logps/rejected",
)  # fmt: skip
"""The metrics of a run's results, in their order, without "eval/"."""

UNMOVED = 0.01  # DPO's loss, which starts at log 2 = 0.693, is still above 0.686


@dataclass(frozen=True)
class Outcome:
    """A metric before and after training. held_out: on held-out rows, else at the first and the last training step.

    One of the two is None where it was measured once: `after` where that was at step 0, else `before`.
    """

    name: str
    before: float | None
    after: float | None
    held_out: bool

    @property
    def compared(self) -> bool:
        """True if it was measured more than once."""
        return self.before is not None and self.after is not None

    @property
    def last(self) -> float | None:
        """The last value that was measured."""
        return self.before if self.after is None else self.after


def outcomes(lines: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """Return the RESULTS in the lines of metrics.jsonl, those on held-out rows where they exist."""
    found = []
    for name in RESULTS:
        for key, held_out in ((f"eval/{name}", True), (name, False)):
            there = [line for line in lines if isinstance(line.get(key), int | float)]
            if there:
                first, last = float(there[0][key]), float(there[-1][key])
                once, early = len(there) == 1, there[0].get("step") == 0
                before, after = None if once and not early else first, None if once and early else last
                found.append(Outcome(name, before, after, held_out))
                break
    return found


def unlearned(lines: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return the loss at the start and at the end where it has moved by less than UNMOVED of its start, else None.

    On held-out rows where there are some, else the means of the first and of the last quarter of the logged steps, at
    most 8; None for less than four.
    """
    for key, n in (("eval/loss", 1), ("loss", 8)):
        losses = [float(line[key]) for line in lines if isinstance(line.get(key), int | float)]
        n = min(n, len(losses) // 4) or (n == 1 and len(losses) > 1)
        if n:
            start, end = sum(losses[:n]) / n, sum(losses[-n:]) / n
            return (start, end) if abs(end - start) < UNMOVED * abs(start) else None
    return None


def in_training(found: Sequence[Outcome]) -> str:
    """Return a note about the values that were not measured on held-out rows."""
    when = ", at its first and at its last logged step" if any(o.compared and not o.held_out for o in found) else ""
    return f"measured in training{when}, not on held-out rows"
