"""What is known of methods by name: how well each fits what the rows say, why, and its own settings.

A method that is not here can be served all the same; nothing is said for or against it. What is said stands on the
method's page (docs/methods/) and in the papers that it names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignkit.insight.recommend.facts import Facts


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
    if facts.noisy:
        settings.append(Choice("label_smoothing", facts.noise, f"labels are noisy: {facts.noisy}; {_measured(facts)}"))
        if facts.flipped:
            settings.append(Choice("loss_type", "robust", "unbiased where that part of labels is flipped (2403.00409)"))
        reason += ", with label smoothing against the noise"
    if facts.lean:
        why = f"{facts.lean}: tokens past the shorter one's length weigh half (2409.06411)"
        settings.append(Choice("ld_alpha", 0.5, why))
        reason += ", with less weight on what makes answers differ in length"
    return Advice(90, reason, tuple(settings))


def _measured(facts: Facts) -> str:
    if facts.flipped is None:
        return "a tenth is a guess"
    return "the part that is flipped, estimated from the pairs that are judged twice"


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
    if not good or not bad:
        return Advice(5, f"all rows are {'good' if good else 'bad'}: it learns from the difference of the two")
    return Advice(95, "learns from single answers that are good or bad (2402.01306)", _weights(good, bad))


def _weights(good: int, bad: int) -> tuple[Choice, ...]:
    """Weights that bring weight * count of the two kinds within 1 to 4/3, as KTO's paper wants them."""
    why = f"{good:,} rows are good and {bad:,} bad: weight times number of the two should be within 1 to 4/3"
    if good < bad:
        return (Choice("desirable_weight", math.ceil(100 * bad / good) / 100, why),)
    if 3 * good > 4 * bad:
        return (Choice("undesirable_weight", math.floor(100 * good / bad) / 100, why),)
    return ()


def _simpo(facts: Facts) -> Advice:
    reason = "needs no reference, and ranks answers by their average token, not by their sum (2405.14734)"
    if facts.lean:
        return Advice(80, f"{reason}; here {facts.lean}")
    return Advice(50, f"{reason}; nothing but the learning rate holds it near its start")


def _cpo(facts: Facts) -> Advice:
    reason = "needs no reference, and imitates the chosen answers, which must be worth it (2401.08417)"
    smoothing = Choice("label_smoothing", facts.noise, f"labels are noisy: {facts.noisy}; {_measured(facts)}")
    return Advice(40, reason, (smoothing,) if facts.noisy else ())


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
    if "pairs" in facts.rows or facts.audit.labels is not None:
        return Advice(
            20, "imitates the good answers and learns nothing from the others; the step before, on a base model"
        )
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
