"""Reward model by Bradley-Terry (2203.02155), with margins (2307.09288) and centring (2312.09244).

    loss = -log σ(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2

r is the scalar head's value at an answer's last token. `pairwise` reads both answers at once instead, in both orders:
s(A, B) scores how much better A is, and a judge uses it as P(A wins) = σ(s(A, B) - s(B, A)).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch.nn.functional import logsigmoid

from alignkit import (
    Advice,
    Batch,
    Completion,
    Context,
    DataFacts,
    Example,
    Method,
    MethodConfig,
    Models,
    Term,
    hookimpl,
    metric,
    pairwise_ids,
    wins,
)


class Reward(Method["Reward.Config"]):
    """Learn a score that is higher for the chosen answer; the result is a sequence classifier with one label."""

    name = "reward"
    data = "pairs"
    uses = frozenset({"reward"})
    trains = ("reward",)
    learning_rate = 1e-5
    lora_learning_rate = 1e-4

    class Config(MethodConfig):
        """Settings of the reward model."""

        centring: float = Field(0.0, ge=0, description="weight of (r_chosen + r_rejected)^2, 0.01 in 2312.09244")
        pairwise: bool = Field(False, description="read both answers at once: a judge for Nash-MD, not a reward")
        dropout_rate: float = Field(0.0, ge=0, lt=1, description="dropout probability of the layers that have dropout")

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it as a step before methods that sample."""
        reason = "trains a reward model, not a policy: for methods that sample (2203.02155)"
        if facts.length_bias:
            reason += f"; here {facts.length_bias}: check with `alignkit audit --reward` that it learns more than that"
        return Advice(35, reason)

    def longest(self, example: Example) -> Example:
        """Return an example with both answers in one sequence where `pairwise` reads them so."""
        both = _both_orders(example.completions, 0) if self.config.pairwise else example.completions
        return replace(example, completions=tuple(both))

    def dropout(self) -> float:
        """Allow dropout: no ratio to another model is computed."""
        return self.config.dropout_rate

    def model_settings(self) -> Mapping[str, Any]:
        """Record in the model's configuration whether it reads pairs."""
        return {"alignkit_pairwise": True} if self.config.pairwise else {}

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Attach the margins; for `pairwise` join both answers into one sequence, in both orders."""
        margins = torch.tensor([e.numbers.get("margin", 0.0) for e in batch.examples], device=batch.device)
        if self.config.pairwise:
            examples = tuple(
                replace(e, completions=tuple(_both_orders(e.completions, ctx.eos))) for e in batch.examples
            )
            batch = replace(batch, examples=examples)
        return batch.attach(per_example={"margin": margins})

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return one loss per pair, and how often the chosen answer scores higher; a tie counts half."""
        chosen, rejected = batch.pairs(models.reward(batch))
        terms = {"bradley_terry": Term(-logsigmoid(chosen - rejected - batch["margin"]))}
        if self.config.centring:
            terms["centring"] = Term((chosen + rejected).square(), coef=self.config.centring)
        return {
            **terms,
            "rewards/chosen": metric(chosen),
            "rewards/rejected": metric(rejected),
            "rewards/margin": metric(chosen - rejected),
            "rewards/accuracy": metric(wins(chosen, rejected)),
        }


def _both_orders(answers: Sequence[Completion], eos: int) -> Iterator[Completion]:
    first, second = (c.tokens.tolist() for c in answers)
    for ids in (pairwise_ids([], first, second, eos), pairwise_ids([], second, first, eos)):
        yield Completion(torch.tensor(ids, dtype=torch.int32))


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "reward"."""
    return [Reward]
