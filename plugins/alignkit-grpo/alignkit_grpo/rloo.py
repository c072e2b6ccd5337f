"""REINFORCE leave-one-out (2402.14740).

    loss = -A_i log policy(y_i),   A_i = R_i - mean of the others' R,   R = r - beta (log policy(y) - log reference(y))

A group is a prompt with G completions: one tree.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from alignkit import Advice, Batch, Context, DataFacts, Method, MethodConfig, Models, Term, rollout_metrics
from alignkit_grpo.shaping import EPSILON, of_step
from alignkit_kernels import policy_loss, sequence_sum


class RLOO(Method["RLOO.Config"]):
    """REINFORCE with the mean reward of a prompt's other completions as baseline."""

    name = "rloo"
    data = "prompts"
    uses = frozenset({"policy", "reference", "reward"})
    learning_rate = 1e-6
    lora_learning_rate = 1e-5
    demo_settings = {"learning_rate": 2e-4, "batch_size": 32, "group_size": 4, "beta": 0.05, "epochs": 4}

    class Config(MethodConfig):
        """Settings of RLOO."""

        group_size: int = Field(4, ge=2, description="completions sampled per prompt")
        beta: float = Field(0.05, ge=0, description="weight of the KL in the reward; at 0 no reference is loaded")
        normalise_advantages: bool = Field(False, description="to mean 0 and standard deviation 1 over the step")
        clip: float = Field(0.2, gt=0, le=1, description="clip range of the ratio in further updates on a batch")

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it first where the reward is a model."""
        reason = "the simplest method that samples: no critic, no division by a standard deviation (2402.14740)"
        if not facts.reward:
            return Advice(86, reason)
        return Advice(98, reason) if facts.checkable else Advice(100, f"{reason}; a good start with a reward model")

    def roles(self) -> frozenset[str]:
        """Leave out the reference where the KL has no weight."""
        return self.uses if self.config.beta else self.uses - {"reference"}

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Sample and score the groups; normalise their advantages over the step where that is set."""
        batch = ctx.rollouts(batch, self.config.group_size)
        if not self.config.normalise_advantages:
            return batch
        old = batch["old_logps"] if "old_logps" in batch else ctx.models.policy(batch).logps
        advantages, counted = self._advantages(batch, old)
        mean, deviation = of_step(advantages, counted, ctx)
        normal = ((advantages - mean) / (deviation + EPSILON) * counted).to(advantages.dtype)
        return batch.attach(per_completion={"advantages": normal})

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return -A log policy(y) per completion; groups are never split, so their baselines can be computed here."""
        outputs = models.policy(batch, entropy=True)
        old = batch["old_logps"] if "old_logps" in batch else outputs.logps.detach()
        advantages = batch["advantages"] if "advantages" in batch else self._advantages(batch, old)[0]
        clip = (self.config.clip, self.config.clip)
        out = policy_loss(outputs.logps, old, advantages, batch.cu_seqlens, clip=clip)
        losses = sequence_sum(out.losses, batch.cu_seqlens)
        return {"policy": Term(losses, over="scored"), **rollout_metrics(batch, outputs, out)}

    def _advantages(self, batch: Batch, old: Tensor) -> tuple[Tensor, Tensor]:
        """Return each completion's advantage, 0 where it has nobody to compare with, and whether it has, [S] each."""
        rewards = batch["rewards"]
        if self.config.beta:
            rewards = rewards - self.config.beta * sequence_sum(old - batch.reference_logps, batch.cu_seqlens)
        scored = batch["scored"].view(len(batch), -1)  # completions that no reward applies to are nobody's baseline
        groups = rewards.view(len(batch), -1) * scored
        n_others = scored.sum(1, keepdim=True) - 1
        others = (groups.sum(1, keepdim=True) - groups) / n_others.clamp(min=1)
        counted = scored & (n_others > 0)
        return ((groups - others) * counted).flatten(), counted.flatten()
