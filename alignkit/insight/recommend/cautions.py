"""What the rows lack that no setting mends: to be said before anything else."""

from __future__ import annotations

from alignkit.insight.recommend.facts import Facts
from alignkit.insight.recommend.settings import LEAST


def cautions(facts: Facts) -> tuple[str, ...]:
    """Return what to look at before any training, a sentence or two each."""
    said = []
    if facts.blind:
        said.append(
            f"where a pair is judged again, {facts.disagreement:.0%} of the judgements differ, and 50% would of labels "
            "that are drawn by lot: they say (almost) nothing, and no setting mends that. Look at the data first"
        )
    if facts.audit.kept < LEAST:
        n = facts.audit.kept
        said.append(
            f"{n} {'row is' if n == 1 else 'rows are'} enough to try the commands out, and too few to teach a model "
            "much; none is held out. Some hundred are a beginning"
        )
    return tuple(said)
