"""Binary Classifier Optimization (2404.04656): tell good answers from bad ones by their implicit reward.

    desirable     -w_d log s(b h - d)       h = log policy(y) - log reference(y)
    undesirable   -w_u log s(d - b h)       d = (mean of desirable b h + mean of undesirable b h) / 2

The shift d brings the sum of both losses near DPO's. Its two means move: each step's have the weight 1 - `decay` from
the next step on. At the start they are 0, as all h are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch.nn.functional import logsigmoid

from alignkit import Advice, Batch, Context, DataFacts, Method, MethodConfig, Models, Term

# isort: split
from alignkit import metric, rounding, wins
from alignkit_kernels import sequence_sum
from alignkit_kto.labels import label_metrics, labels


class BCO(Method["BCO.Config"]):
    """Train the implicit reward as a classifier of single answers; pairs are split into two examples."""

    name = "bco"
    data = "unpaired"
    uses = frozenset({"policy", "reference"})
    learning_rate = 1e-6
    lora_learning_rate = 5e-6
    demo_settings = {"learning_rate": 1.2e-4, "batch_size": 32}  # a pair is two examples

    class Config(MethodConfig):
        """Settings of BCO."""

        beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference")
        decay: float = Field(0.9, ge=0, lt=1, description="weight of earlier steps in the means of the shift")
        desirable_weight: float = Field(1.0, gt=0, description="the weight of desirable examples")
        undesirable_weight: float = Field(1.0, gt=0, description="the weight of undesirable examples")

    def __init__(self, config: BCO.Config) -> None:
        super().__init__(config)
        self.means = {"chosen": 0.0, "rejected": 0.0}

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it after KTO, for single answers of both kinds."""
        reason = "a classifier of single answers; its reference can be cached, unlike KTO's (2404.04656)"
        if facts.labels is None:
            return Advice(28, f"splits pairs into good and bad answers; {reason}")
        if not all(facts.labels):
            kind = "good" if facts.labels[0] else "bad"
            return Advice(None, f"all rows are {kind}: it learns from the difference between good and bad ones")
        return Advice(85, reason)

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Attach the shift, the same for every example of the step."""
        shift = torch.full((len(batch),), sum(self.means.values()) / 2, device=batch.device)
        return batch.attach(per_completion={"shift": shift, **labels(batch)})

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return one loss per example, and separate metrics of the desirable and the undesirable ones."""
        c, desirable = self.config, batch["desirable"]
        logps_C = models.policy(batch).logps
        rewards = c.beta * sequence_sum(logps_C - batch.reference_logps, batch.cu_seqlens)
        margin = torch.where(desirable, 1.0, -1.0) * (rewards - batch["shift"])
        weights = torch.where(desirable, c.desirable_weight, c.undesirable_weight)
        inexact = c.beta * rounding(batch.cu_seqlens, logps_C, batch.reference_logps)
        right = wins(margin.detach(), torch.zeros_like(margin), inexact)
        return {
            "bco": Term(-weights * logsigmoid(margin)),
            "shift": metric(batch["shift"], over="completions"),
            **label_metrics(batch, logps_C, rewards.detach(), margin.detach(), right),
        }

    def after_update(self, ctx: Context, metrics: Mapping[str, float]) -> None:
        """Move the means by the step's; a kind that the step lacks keeps its own."""
        for kind, mean in self.means.items():
            of_step = metrics.get(f"rewards/{kind}", math.nan)
            if math.isfinite(of_step):
                self.means[kind] = self.config.decay * mean + (1 - self.config.decay) * of_step

    def state_dict(self) -> dict[str, Any]:
        """Return the means."""
        return dict(self.means)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the means."""
        self.means = {kind: float(state[kind]) for kind in self.means}
