"""REINFORCE++ (2501.03262): REINFORCE with advantages that are normalised over the step, and PPO's clip; no critic.

g_t = r - b sum over i >= t of (log policy_i - log reference_i)         a token's return: the KL still to come
A_t = (g_t - mean) / (std + 1e-4)                                       over all tokens of the step

baseline group   r minus the mean of its prompt's completions instead of r, and the KL in the loss instead (k2):
                 REINFORCE++-baseline, for rewards that depend on the prompt most of all
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from alignkit import Advice, Batch, Context, DataFacts, Method, MethodConfig, Models, Term, rollout_metrics, wins
from alignkit_grpo.shaping import EPSILON, of_step
from alignkit_kernels import gae, policy_loss


class Reinforce(Method["Reinforce.Config"]):
    """REINFORCE++: one completion per prompt is enough, because the whole step is the baseline."""

    name = "reinforce"
    data = "prompts"
    uses = frozenset({"policy", "reference", "reward"})
    learning_rate = 1e-6
    lora_learning_rate = 1e-5
    demo_settings = {"learning_rate": 2e-4, "batch_size": 32, "group_size": 4, "beta": 0.01, "epochs": 4}

    class Config(MethodConfig):
        """Settings of REINFORCE++."""

        group_size: int = Field(1, ge=1, description="completions sampled per prompt")
        baseline: Literal["step", "group"] = Field("step", description="what rewards are compared with; see the docs")
        beta: float = Field(0.01, ge=0, description="weight of the KL to the reference; at 0 no reference is loaded")
        clip: float = Field(0.2, gt=0, le=1, description="clip range of the ratio")

        @model_validator(mode="after")
        def _has_a_group(self) -> Any:
            if self.baseline == "group" and self.group_size == 1:
                raise ValueError("baseline: group compares the completions of a prompt; set group_size to 2 or more")
            return self

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it after the methods that compare the completions of a prompt."""
        return Advice(84, "one completion per prompt is enough; advantages are normalised over the step (2501.03262)")

    def roles(self) -> frozenset[str]:
        """Leave out the reference where the KL has no weight."""
        return self.uses if self.config.beta else self.uses - {"reference"}

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Sample and score; attach each token's advantage, normalised over the step on all ranks."""
        c = self.config
        batch = ctx.rollouts(batch, c.group_size)
        rewards, counted = batch["rewards"], batch["scored"]
        if c.baseline == "group":
            rewards, counted = above_others(rewards, counted, c.group_size)
        learned = counted.repeat_interleave(batch.lengths)
        per_token = torch.zeros(len(learned), device=batch.device)
        if c.beta and c.baseline == "step":
            old = batch["old_logps"] if "old_logps" in batch else ctx.models.policy(batch).logps
            per_token = -c.beta * (old - batch.reference_logps)
        per_token[batch.cu_seqlens[1:] - 1] += rewards
        returns, _ = gae(per_token, torch.zeros_like(per_token), batch.cu_seqlens, 1.0, 1.0)
        mean, deviation = of_step(returns, learned, ctx)
        normal = ((returns - mean) / (deviation + EPSILON) * learned).to(returns.dtype)
        return batch.attach(per_token={"advantages": normal, "learned_tokens": learned})

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return the clipped surrogate, a mean over the step's tokens."""
        c = self.config
        outputs = models.policy(batch, entropy=True)
        old = batch["old_logps"] if "old_logps" in batch else outputs.logps.detach()
        in_loss = c.beta if c.baseline == "group" else 0.0
        out = policy_loss(
            outputs.logps, old, batch["advantages"], batch.cu_seqlens, clip=(c.clip, c.clip),
            reference_logps=batch.reference_logps if in_loss else None, kl="k2", kl_coef=in_loss,
        )  # fmt: skip
        return {"policy": Term(out.losses, over="learned_tokens"), **rollout_metrics(batch, outputs, out)}


def above_others(rewards: Tensor, scored: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return rewards minus their group's mean, [S], and which have a group of at least two; n: a group's size."""
    groups, known = rewards.view(-1, n).double(), scored.view(-1, n)
    n_known = known.sum(1, keepdim=True)
    mean = (groups * known).sum(1, keepdim=True) / n_known.clamp(min=1)
    counted = known & (n_known > 1)
    apart = wins(groups, mean.expand_as(groups)) != 0.5  # else noise of rounding, which the deviation would enlarge
    return ((groups - mean) * (counted & apart)).to(rewards.dtype).flatten(), counted.flatten()
