"""Kahneman-Tversky Optimization (2402.01306): learn from thumbs up and thumbs down, no pairs needed.

    desirable     w_d (1 - s(b (h - z)))        h = log policy(y) - log reference(y)
    undesirable   w_u (1 - s(b (z - h)))        z = max(0, mean of h over mismatched completions)

The baseline z estimates KL(policy || reference). It is computed once per step over the batch of all ranks: every prompt
gets the completion of another prompt, in an order that is drawn anew each step, and no gradient flows through it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from alignkit import Advice, Batch, Choice, Context, DataFacts, Example, Method, MethodConfig, Models, Term

# isort: split
from alignkit import metric, rounding, wins
from alignkit_kernels import preference_loss, sequence_sum
from alignkit_kto.labels import label_metrics, labels

MAX_WEIGHT = 10.0  # largest weight that is advised; a rule of thumb


class KTO(Method["KTO.Config"]):
    """Raise desirable completions above a moving baseline, lower the others; pairs are split into two examples."""

    name = "kto"
    data = "unpaired"
    uses = frozenset({"policy", "reference"})
    learning_rate = 1e-6
    lora_learning_rate = 5e-6
    min_batch = 2  # a mismatched completion comes from another example
    demo_settings = {"learning_rate": 1.2e-4, "batch_size": 32}  # a pair is two examples

    class Config(MethodConfig):
        """Settings of KTO."""

        beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference")
        desirable_weight: float = Field(
            1.0, gt=0, description="weight * count should be 1 to 4/3 times that of undesirable examples"
        )
        undesirable_weight: float = Field(1.0, gt=0, description="the weight of undesirable examples")

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it for single answers of both kinds, with weights where one is rare, and for noisy pairs."""
        if facts.labels is None:
            reason = "splits pairs into good and bad answers; the reference stays in memory (2402.01306)"
            if facts.noisy:
                return Advice(65, f"{reason}. Its paper prefers it to DPO where labels are noisy")
            return Advice(30, f"{reason}. With clean pairs DPO comes first")
        if not all(facts.labels):
            kind = "good" if facts.labels[0] else "bad"
            return Advice(None, f"all rows are {kind}: it learns from the difference between good and bad ones")
        return Advice(95, "learns from single answers that are good or bad (2402.01306)", weights(*facts.labels))

    def reference_need(self) -> Literal["rows", "live", "moving"]:
        """Return "live": mismatched completions are rows that the data does not have."""
        return "live"

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Attach the baseline z, the same for every example of the step."""
        other = ctx.shard(mismatched(ctx.step_examples, ctx.generator))
        logps_C = ctx.models.policy(other).logps
        z = ctx.mean(sequence_sum(logps_C - other.reference_logps, other.cu_seqlens)).clamp(min=0)
        inexact = ctx.mean(rounding(other.cu_seqlens, logps_C, other.reference_logps))  # at most that of the mean
        numbers = {"baseline": z.expand(len(batch)), "inexact": inexact.expand(len(batch)), **labels(batch)}
        return batch.attach(per_completion=numbers)

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return one loss per example, and separate metrics of the desirable and the undesirable ones."""
        c = self.config
        logps_C = models.policy(batch).logps
        out = preference_loss(
            logps_C, batch.reference_logps, batch.cu_seqlens, "kto", beta=c.beta, desirable=batch["desirable"],
            baseline=batch["baseline"], weights=(c.desirable_weight, c.undesirable_weight),
        )  # fmt: skip
        # distance to the baseline, positive on the right side
        margin = torch.where(batch["desirable"], 1.0, -1.0) * (out.rewards - c.beta * batch["baseline"])
        inexact = batch["inexact"] + rounding(batch.cu_seqlens, logps_C, batch.reference_logps)
        right = wins(margin, torch.zeros_like(margin), c.beta * inexact)
        return {
            "kto": Term(out.losses),
            "baseline": metric(batch["baseline"], over="completions"),
            **label_metrics(batch, logps_C, out.rewards, margin, right),
        }


def mismatched(examples: Sequence[Example], generator: torch.Generator) -> list[Example]:
    """Return the examples in their order, each with another one's completion, to another prompt where possible."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i in torch.randperm(len(examples), generator=generator).tolist():
        groups[examples[i].prompt.numpy().tobytes()].append(i)
    order = [i for group in groups.values() for i in group]
    # a shift by the largest group's size leaves every group, unless one group holds more than half of the batch
    shift = min(max(len(g) for g in groups.values()), len(order) - 1)
    source = dict(zip(order, order[shift:] + order[:shift], strict=True))
    return [replace(e, completions=examples[source[i]].completions) for i, e in enumerate(examples)]


def weights(good: int, bad: int) -> tuple[Choice, ...]:
    """Return weights with weight * count of the two kinds within 1 to 4/3, as in the paper; at most MAX_WEIGHT."""
    why = f"{good:,} good and {bad:,} bad rows: the ratio of weight times number should be 1 to 4/3"
    if good < bad:
        name, value = "desirable_weight", math.ceil(100 * bad / good) / 100
    elif 3 * good > 4 * bad:
        name, value = "undesirable_weight", math.floor(100 * good / bad) / 100
    else:
        return ()
    if value > MAX_WEIGHT:
        rare = "good" if good < bad else "bad"
        why = f"{why}. At {value:,.0f} each {rare} row would weigh as much as {value:,.0f} others, "
        why += f"so it is limited to {MAX_WEIGHT:g}; find more {rare} rows"
    return (Choice(name, min(value, MAX_WEIGHT), why),)
