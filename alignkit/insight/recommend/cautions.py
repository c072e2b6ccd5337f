"""Problems of the rows that no setting solves: reported before anything else."""

from __future__ import annotations

from alignkit.insight.recommend.data_facts import Facts
from alignkit.insight.recommend.run_settings import LEAST


def cautions(facts: Facts) -> tuple[str, ...]:
    """Return what to check before any training, a sentence or two each."""
    found = []
    if facts.data.uninformative:
        found.append(
            f"where a pair is judged twice, {facts.disagreement:.0%} of the judgements differ; for random labels it "
            "would be 50%. The labels carry almost no information, and no setting solves that. Look at the data first"
        )
    if facts.audit.kept < LEAST:
        n = facts.audit.kept
        found.append(
            f"{n} {'row is' if n == 1 else 'rows are'} enough to try the commands, but too few to teach a model much; "
            "none is held out. Start with a few hundred"
        )
    return tuple(found)
