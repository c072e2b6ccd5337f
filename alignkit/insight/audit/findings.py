"""Findings: effects that are beyond chance, each with a remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from alignkit.insight.audit.bias import Bias
from alignkit.insight.audit.features import FEATURES, LENGTH
from alignkit.insight.audit.lengths import Budgets
from alignkit.insight.audit.repeats import Repeats
from alignkit.insight.audit.reward_audit import RewardAudit

LARGE_PART = 0.1  # of answers that are cut
LARGE_EFFECT = 0.1  # standard deviations
_CHANGES = {"added": "adding {} to", "taken": "taking {} from"}
_BY_NAME = {feature.name: feature for feature in FEATURES}


class Finding(NamedTuple):
    """A finding and what to do about it."""

    what: str
    remedy: str


def row_findings(repeats: Repeats, shared: Sequence[int] | None, budgets: Budgets | None) -> Iterator[Finding]:
    """Yield faults of the rows themselves."""
    if repeats.contradictions:
        rows = _listed([f"{a} and {b}" for a, b in repeats.contradictions])
        yield Finding(
            f"{_times(len(repeats.contradictions), 'row contradicts', 'rows contradict')} another row (rows {rows})",
            "keep one of the two; if the noise must stay, see the methods and settings of `alignkit recommend`",
        )
    if repeats.duplicates:
        n = len(repeats.duplicates)
        yield Finding(
            f"{_times(n, 'row repeats', 'rows repeat')} an earlier row (row{'s' * (n > 1)} "
            f"{_listed(repeats.duplicates)})",
            "remove them: a repeated row counts twice",
        )
    if shared:
        yield Finding(
            f"{_times(len(shared), 'held-out row has', 'held-out rows have')} a prompt that is trained on "
            f"(rows {_listed(shared)} of the held-out data)",
            "hold out by prompt, as `eval_fraction` does: results on these rows are too good",
        )
    if budgets and budgets.answers_cut > LARGE_PART * budgets.answers:
        yield Finding(
            f"{budgets.answers_cut} of {budgets.answers} answers are longer than max_completion_tokens "
            f"{budgets.max_completion_tokens}, and lose their end",
            "raise max_completion_tokens, or leave long rows out: without ends a model does not learn to stop",
        )


def preference_findings(biases: Sequence[Bias]) -> Iterator[Finding]:
    """Yield the features that predict the chosen answer beyond chance."""
    for bias in biases:
        if bias.beyond_chance:
            remedy = "a method can learn this instead of the content: balance the pairs, or watch for it in the samples"
            if bias.feature == LENGTH.name:
                how = f"a method can win by writing {bias.direction}"
                remedy = f"{how}: see the methods and settings of `alignkit recommend`"
            yield Finding(f"{_preferred(bias)} is chosen in {_share(bias)} of the pairs in which they differ", remedy)


def reward_findings(audit: RewardAudit, preferences: Sequence[Bias]) -> Iterator[Finding]:
    """Yield what a reward gets wrong, or rewards other than content; preferences: the biases of the data."""
    name = f"the reward '{audit.reward}'"
    if audit.deviation == 0:
        yield Finding(
            f"{name} gives every answer the same score", "nothing can be learned from it here: check what it scores"
        )
        return
    if audit.low is not None and audit.high is not None and audit.accuracy is not None and audit.low <= 0.5:
        better = "no better than chance" if audit.high >= 0.5 else "worse than chance"
        yield Finding(
            f"{name} agrees with {audit.accuracy:.0%} of the preferences, {better}",
            "do not optimise against it: train it on such data, or check that its answers have the form it knows",
        )
    for bias, own in zip(audit.biases, preferences, strict=False):  # a reward with only ties has no biases
        if bias.beyond_chance and bias.share is not None and own.share is not None:
            people = own.share if bias.share > 0.5 else 1 - own.share
            yield Finding(
                f"{_preferred(bias)} has the higher score in {_share(bias)} of the pairs in which they differ, and is "
                f"chosen in {people:.0%}",
                "the reward exceeds the preferences here: a policy will follow the reward",
            )
    for effect in audit.effects:
        if effect.beyond_chance and effect.mean is not None and abs(effect.mean) >= LARGE_EFFECT:
            yield Finding(
                f"{_CHANGES[effect.change].format(effect.feature)} the same answer changes the score by "
                f"{effect.mean:+z.2f} standard deviations ({effect.n} answers)",
                "a policy exploits this: add a reward against it, an ensemble, or pairs that differ in nothing else",
            )


def _preferred(bias: Bias) -> str:
    feature = _BY_NAME[bias.feature]
    return feature.more if (bias.share or 0) > 0.5 else feature.less


def _share(bias: Bias) -> str:
    share = bias.share or 0.0
    return f"{max(share, 1 - share):.0%}"


def _times(n: int, one: str, several: str) -> str:
    return f"{n} {one if n == 1 else several}"


def _listed(rows: Sequence[object], most: int = 8) -> str:
    return ", ".join(map(str, rows[:most])) + (", ..." if len(rows) > most else "")
