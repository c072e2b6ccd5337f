"""Online DPO (2402.04792): pairs of the policy's own completions, in the order of their rewards.

    y_1 ... y_G ~ policy,   loss of a pair as in DPO, with each of its loss types

    pairs best_worst   one pair a prompt: the highest reward against the lowest
    pairs all          all pairs with different rewards, averaged over the prompt's
    sync_every         the reference follows the policy, a round at a time: iterative DPO, 2312.11456

Rewards give the order of two completions only, not their distance. The gradient is that of the log-probabilities; none
flows through the sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from alignkit import Advice, Batch, Context, DataFacts, Method, MethodConfig, Models, Term

# isort: split
from alignkit import metric, rollout_metrics, rounding, wins
from alignkit_dpo.losses import SMOOTHED, LossType, pair_losses
from alignkit_kernels import sequence_sum


class OnlineDPO(Method["OnlineDPO.Config"]):
    """Sample several completions of each prompt, and learn from the better against the worse by DPO."""

    name = "online_dpo"
    data = "prompts"
    uses = frozenset({"policy", "reference", "reward"})
    learning_rate = 1e-6
    lora_learning_rate = 5e-6
    demo_settings = {"learning_rate": 3e-4, "group_size": 4, "batch_size": 32, "epochs": 4}

    class Config(MethodConfig):
        """Settings of online DPO."""

        group_size: int = Field(2, ge=2, description="completions sampled per prompt")
        pairs: Literal["best_worst", "all"] = Field("best_worst", description="pairs of a prompt's completions")
        beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference")
        loss_type: LossType = Field("sigmoid", description="loss of a pair")
        label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed fraction of flipped labels")
        sync_every: int | None = Field(None, ge=1, description="steps between updates of the reference")
        sync_alpha: float = Field(1.0, gt=0, le=1, description="the policy's weight in an update of the reference")

        @model_validator(mode="after")
        def _fits(self) -> Any:
            if self.label_smoothing and self.loss_type not in SMOOTHED:
                raise ValueError(f"label_smoothing has no effect on loss_type: {self.loss_type}; use sigmoid or robust")
            if not self.label_smoothing and self.loss_type == "exo_pair":
                raise ValueError("exo_pair needs label_smoothing above 0, such as 0.001")
            if self.sync_every is None and self.sync_alpha != 1.0:
                raise ValueError("sync_alpha has an effect with sync_every only; set sync_every, or remove it")
            if self.pairs == "all" and self.group_size == 2:
                raise ValueError("pairs: all is the same as best_worst for two completions; raise group_size")
            return self

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it after the methods that use how far apart rewards are."""
        return Advice(85, "pairs of the policy's own answers: of a reward only the order matters (2402.04792)")

    def reference_need(self) -> Literal["rows", "live", "moving"]:
        """Return "moving" where the reference follows the policy."""
        return "moving" if self.config.sync_every else "live"

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Sample and score the groups; attach which completions are compared."""
        batch = ctx.rollouts(batch, self.config.group_size)
        rewards, scored = (batch[name].view(len(batch), -1) for name in ("rewards", "scored"))
        beats = preferred(rewards, scored, self.config.pairs == "all")
        paired = beats.flatten(1).any(1)
        ctx.log(**{"pairs/prompts_without": float(ctx.sum((~paired).sum()))})
        return batch.attach(per_example={"beats": beats, "paired": paired})

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return one loss per prompt, the mean of its pairs', and the metrics of its pairs."""
        c, beats = self.config, batch["beats"]
        outputs = models.policy(batch, entropy=True)
        h_EG = sequence_sum(outputs.logps - batch.reference_logps, batch.cu_seqlens).view(len(batch), -1)
        better, worse = (h.expand(beats.shape) for h in (h_EG[:, :, None], h_EG[:, None, :]))
        both = torch.stack([better, worse], -1).flatten()
        borders = torch.arange(len(both) + 1, device=both.device)  # each completion is a sum already
        losses = pair_losses(both, borders, c.loss_type, c.beta, c.label_smoothing).view(beats.shape)
        exact = rounding(batch.cu_seqlens, outputs.logps, batch.reference_logps).view(len(batch), -1)
        right = wins(better.detach(), worse.detach(), exact[:, :, None] + exact[:, None, :])
        values = {"rewards/margin": c.beta * (better - worse).detach(), "rewards/accuracy": right}
        return {
            c.loss_type: Term(of_pairs(losses, beats), over="paired"),
            **{name: metric(of_pairs(value, beats), over="paired") for name, value in values.items()},
            **rollout_metrics(batch, outputs),
        }

    def after_update(self, ctx: Context, metrics: Mapping[str, float]) -> None:
        """Move the reference every `sync_every` steps."""
        if self.config.sync_every and (ctx.step + 1) % self.config.sync_every == 0:
            ctx.update_reference(self.config.sync_alpha)


def preferred(rewards: Tensor, scored: Tensor, every: bool) -> Tensor:
    """Return which completion is compared with which worse one, bool [E, G, G]; rewards, scored: [E, G].

    every: all pairs, else the highest reward against the lowest, the first ones of each.
    """
    beats = (wins(rewards[:, :, None], rewards[:, None, :]) == 1) & scored[:, :, None] & scored[:, None, :]
    if every:
        return beats
    infinite, at = float("inf"), torch.arange(rewards.shape[1], device=rewards.device)
    best, worst = rewards.masked_fill(~scored, -infinite).argmax(1), rewards.masked_fill(~scored, infinite).argmin(1)
    return beats & (at == best[:, None])[:, :, None] & (at == worst[:, None])[:, None, :]


def of_pairs(values: Tensor, beats: Tensor) -> Tensor:
    """Return the mean over each prompt's pairs, [E], 0 where it has none; values: [E, G, G]."""
    return torch.where(beats, values, 0.0).sum((1, 2)) / beats.sum((1, 2)).clamp(min=1)
