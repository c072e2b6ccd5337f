"""What is known of methods by name: how well each fits what the rows say, why, and its own settings.

A method that is not here can be served all the same; nothing is said for or against it. What is said stands on the
method's page (docs/methods/) and in the papers that it names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignkit.insight.recommend.facts import Facts

MOST = 10.0  # times that a row may weigh of what another one does; a rule of thumb


class Choice(NamedTuple):
    """A setting, its value, and why it is that."""

    name: str
    value: Any
    why: str


class Advice(NamedTuple):
    """How well a method fits, 0 to 100, the best ones first; why; and its own settings where they should differ."""

    rank: int
    reason: str
    settings: tuple[Choice, ...] = ()


def _dpo(facts: Facts) -> Advice:
    reason = "learns from pairs directly; the best studied of its kind (2305.18290)"
    settings = []
    if smoothing := _smoothing(facts):
        settings.append(smoothing)
        if facts.flipped:
            settings.append(Choice("loss_type", "robust", "unbiased where that part of labels is flipped (2403.00409)"))
        reason += ", with label smoothing against the noise"
    if facts.lean:
        why = f"{facts.lean}: tokens past the shorter one's length weigh half (2409.06411)"
        settings.append(Choice("ld_alpha", 0.5, why))
        reason += ", with less weight on what makes answers differ in length"
    return Advice(90, reason, tuple(settings))


def _smoothing(facts: Facts) -> Choice | None:
    """The setting against labels that are flipped; none where so many are that nothing mends it, see `cautions`."""
    if not facts.noisy or facts.blind:
        return None
    known = "a tenth is a guess"
    if facts.flipped is not None:
        known = "the part that is flipped, estimated from the pairs that are judged more than once"
    return Choice("label_smoothing", facts.noise, f"labels are noisy: {facts.noisy}; {known}")


def _ipo(facts: Facts) -> Advice:
    reason = "its margin has a finite target, so that no pair pulls without end (2310.12036)"
    if facts.noisy:
        return Advice(75, f"{reason}, not a wrongly labelled one either")
    return Advice(70 if facts.few else 60, f"{reason}: where DPO overfits")


def _kto(facts: Facts) -> Advice:
    if facts.audit.labels is None:
        reason = "splits pairs into good and bad answers; the reference stays in memory (2402.01306)"
        return (
            Advice(65, f"{reason}. Its paper prefers it to DPO where labels are noisy")
            if facts.noisy
            else Advice(30, f"{reason}. With clean pairs DPO comes first")
        )
    good, bad = facts.audit.labels
    return Advice(95, "learns from single answers that are good or bad (2402.01306)", _weights(good, bad))


def _weights(good: int, bad: int) -> tuple[Choice, ...]:
    """Weights that bring weight * count of the two kinds within 1 to 4/3, as KTO's paper wants them; MOST at most."""
    why = f"{good:,} good and {bad:,} bad rows: weight times number of the two should be within 1 to 4/3"
    if good < bad:
        name, value = "desirable_weight", math.ceil(100 * bad / good) / 100
    elif 3 * good > 4 * bad:
        name, value = "undesirable_weight", math.floor(100 * good / bad) / 100
    else:
        return ()
    if value > MOST:
        rare = "good" if good < bad else "bad"
        why = f"{why}. That would be {value:,.0f}: each {rare} row would weigh as much as {value:,.0f} others, so it "
        why += f"ends at {MOST:g}; find more {rare} rows"
    return (Choice(name, min(value, MOST), why),)


def _simpo(facts: Facts) -> Advice:
    reason = "needs no reference, and ranks answers by their average token, not by their sum (2405.14734)"
    if facts.lean:
        return Advice(80, f"{reason}; here {facts.lean}")
    return Advice(50, f"{reason}; nothing but the learning rate holds it near its start")


def _cpo(facts: Facts) -> Advice:
    reason = "needs no reference, and imitates the chosen answers, which must be worth it (2401.08417)"
    smoothing = _smoothing(facts)
    return Advice(40, reason, (smoothing,) if smoothing else ())


def _orpo(facts: Facts) -> Advice:
    reason = "does SFT and preferences in one run, without a reference (2403.07691)"
    if facts.chat is False:
        return Advice(85, f"{reason}: the model has no chat template, so it may be a base model without SFT")
    return Advice(45, f"{reason}; for a base model: one that answers well already would be rewritten")


def _reward(facts: Facts) -> Advice:
    reason = "trains a reward model, no policy: for methods that sample (2203.02155)"
    if facts.lean:
        reason += f"; here {facts.lean}: see with `alignkit audit --reward` whether it has learned only that"
    return Advice(35, reason)


def _sft(facts: Facts) -> Advice:
    if "pairs" in facts.rows or (facts.audit.labels is not None and all(facts.audit.labels)):
        return Advice(
            20, "imitates the good answers and learns nothing from the others; the step before, on a base model"
        )
    if facts.audit.labels is not None:
        return Advice(95, "imitates the answers: all are good, and no row shows what is bad")
    return Advice(95, "imitates the answers; rows without a preference serve no other method that needs no reward")


def _grpo(facts: Facts) -> Advice:
    reason = "compares several answers to a prompt with each other, without a critic (2402.03300)"
    if facts.reward is None:
        return Advice(88, f"{reason}; the column `answer` can be checked")
    return Advice(100 if facts.checkable else 97, reason)


def _rloo(facts: Facts) -> Advice:
    reason = "the plainest that samples: no critic, no division by a deviation (2402.14740)"
    if facts.reward is None:
        return Advice(86, reason)
    return Advice(98, reason) if facts.checkable else Advice(100, f"{reason}; a good start with a reward model")


def _ppo(facts: Facts) -> Advice:
    reason = "a critic gives credit to single tokens (1707.06347); it takes the most memory and the most settings"
    return Advice(96 if facts.reward is not None else 84, reason)


def _nash(facts: Facts) -> Advice:
    return Advice(99, "learns from a judge of two answers, also where preferences go in circles (2312.00886)")


ADVICE: Mapping[str, Callable[[Facts], Advice]] = {
    "cpo": _cpo, "dpo": _dpo, "grpo": _grpo, "ipo": _ipo, "kto": _kto, "nash": _nash, "orpo": _orpo, "ppo": _ppo,
    "reward": _reward, "rloo": _rloo, "sft": _sft, "simpo": _simpo,
}  # fmt: skip


def unfit(facts: Facts, name: str) -> str | None:
    """Say why rows that a method can read would teach it nothing; None where they may."""
    labels = facts.audit.labels
    if name == "kto" and labels is not None and not all(labels):
        return f"all rows are {'good' if labels[0] else 'bad'}: it learns from the difference of the two"
    return None
