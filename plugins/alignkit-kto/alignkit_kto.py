"""Kahneman-Tversky Optimization (2402.01306): learn from thumbs up and thumbs down, no pairs needed.

    desirable     w_d (1 - s(b (h - z)))        h = log policy(y) - log reference(y)
    undesirable   w_u (1 - s(b (z - h)))        z = max(0, mean of h over mismatched completions)

The baseline z estimates KL(policy || reference). It is made once a step over the batch of all ranks: every prompt gets
the completion of another prompt, in an order drawn anew each step, and no gradient flows through it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from alignkit import (
    Batch,
    Context,
    Example,
    Method,
    MethodConfig,
    Models,
    Term,
    hookimpl,
    kl_metric,
    log_ratios,
    metric,
    wins,
)
from alignkit_kernels import preference_loss, sequence_sum


class KTO(Method["KTO.Config"]):
    """Raise what is desirable above a moving baseline, sink what is not; pairs are split into two examples."""

    name = "kto"
    data = "unpaired"
    uses = frozenset({"policy", "reference"})
    learning_rate = 1e-6
    lora_learning_rate = 5e-6
    min_batch = 2  # with one example nobody has a completion to lend

    class Config(MethodConfig):
        """Settings of KTO."""

        beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference")
        desirable_weight: float = Field(
            1.0, gt=0, description="choose the weights so that weight * count of the two kinds are within 1 to 4/3"
        )
        undesirable_weight: float = Field(1.0, gt=0, description="the same for undesirable examples")

    def reference_need(self) -> Literal["rows", "live", "moving"]:
        """Mismatched completions are rows that the data does not have."""
        return "live"

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Attach the baseline z, the same for every example of the step."""
        lent = ctx.shard(mismatched(ctx.step_examples, ctx.generator))
        ratios_C = ctx.models.policy(lent).logps - lent.reference_logps
        z = ctx.mean(sequence_sum(ratios_C, lent.cu_seqlens)).clamp(min=0)
        desirable = torch.tensor([bool(e.numbers["desirable"]) for e in batch.examples], device=batch.device)
        return batch.attach(
            per_completion={"baseline": z.expand(len(batch)), "desirable": desirable, "undesirable": ~desirable}
        )

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return one loss an example, and metrics of the desirable and the undesirable ones apart."""
        c = self.config
        logps_C = models.policy(batch).logps
        out = preference_loss(
            logps_C,
            batch.reference_logps,
            batch.cu_seqlens,
            "kto",
            beta=c.beta,
            desirable=batch["desirable"],
            baseline=batch["baseline"],
            weights=(c.desirable_weight, c.undesirable_weight),
        )
        # how far an answer is on its right side of the baseline
        margin = torch.where(batch["desirable"], 1.0, -1.0) * (out.rewards - c.beta * batch["baseline"])
        ratios = log_ratios(batch, logps_C)
        return {
            "kto": Term(out.losses),
            "rewards/margin": metric(margin, over="completions"),
            "rewards/accuracy": metric(wins(margin, torch.zeros_like(margin)), over="completions"),
            "rewards/chosen": metric(out.rewards, over="desirable"),
            "rewards/rejected": metric(out.rewards, over="undesirable"),
            "logps/chosen": metric(out.logps, over="desirable"),
            "logps/rejected": metric(out.logps, over="undesirable"),
            "logratios/chosen": metric(ratios, over="desirable"),
            "logratios/rejected": metric(ratios, over="undesirable"),
            "length/chosen": metric(batch.lengths.float(), over="desirable"),
            "length/rejected": metric(batch.lengths.float(), over="undesirable"),
            "baseline": metric(batch["baseline"], over="completions"),
            **kl_metric(batch, logps_C),
        }


def mismatched(examples: Sequence[Example], generator: torch.Generator) -> list[Example]:
    """Return the examples in their order, each with the completion of another, of another prompt where possible."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i in torch.randperm(len(examples), generator=generator).tolist():
        groups[examples[i].prompt.numpy().tobytes()].append(i)
    order = [i for group in groups.values() for i in group]
    # moving along by the largest group's size leaves every group, unless one holds more than half of the batch
    shift = min(max(len(g) for g in groups.values()), len(order) - 1)
    lender = dict(zip(order, order[shift:] + order[:shift], strict=True))
    return [replace(e, completions=examples[lender[i]].completions) for i, e in enumerate(examples)]


@hookimpl
def register_methods() -> list[type[Method]]:
    """Bring "kto"."""
    return [KTO]
