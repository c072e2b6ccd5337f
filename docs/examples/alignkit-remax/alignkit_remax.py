"""ReMax (2310.10505): REINFORCE whose baseline is the reward of the policy's greedy completion.

loss = -A log policy(y),   A = r(y) - beta (log policy(y) - log reference(y)) - r(greedy)
"""

from __future__ import annotations

from pydantic import Field

from alignkit import Advice, Batch, Context, DataFacts, Method, MethodConfig, Models, Term, hookimpl, rollout_metrics
from alignkit_kernels import policy_loss, sequence_sum


class ReMax(Method["ReMax.Config"]):
    """REINFORCE with the reward of the greedy completion as baseline: one sample per prompt, and no critic."""

    name = "remax"
    data = "prompts"
    uses = frozenset({"policy", "reference", "reward"})
    lora_learning_rate = 1e-5
    demo_settings = {"learning_rate": 2e-4, "batch_size": 32, "beta": 0.05, "epochs": 6}

    class Config(MethodConfig):
        """Settings of ReMax."""

        beta: float = Field(0.05, ge=0, description="weight of the KL in the reward; at 0 no reference is loaded")
        clip: float = Field(0.2, gt=0, le=1, description="clip range of the ratio in further updates on a batch")

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it after the methods that compare several samples of a prompt."""
        return Advice(60, "samples one completion per prompt and one greedy one, without a critic (2310.10505)")

    def roles(self) -> frozenset[str]:
        """Leave out the reference where the KL has no weight."""
        return self.uses if self.config.beta else self.uses - {"reference"}

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Sample and score a completion of each prompt, and the greedy one, of which only the reward is used."""
        greedy = ctx.rollouts(batch, greedy=True, name="greedy", logps=False)
        batch = ctx.rollouts(batch)
        compared = batch["scored"] & greedy["scored"]  # a reward may not apply to a completion
        gains = (batch["rewards"] - greedy["rewards"]) * compared
        ctx.log(**{"advantage/over_greedy": float(ctx.mean(gains, compared))})
        return batch.attach(per_completion={"gains": gains, "compared": compared})

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return -A log policy(y) per completion, as a clipped ratio in further updates on a batch."""
        outputs = models.policy(batch, entropy=True)
        old = batch["old_logps"] if "old_logps" in batch else outputs.logps.detach()
        advantages = batch["gains"]
        if self.config.beta:
            kl = sequence_sum(old - batch.reference_logps, batch.cu_seqlens)
            advantages = advantages - self.config.beta * kl
        clip = (self.config.clip, self.config.clip)
        out = policy_loss(outputs.logps, old, advantages, batch.cu_seqlens, clip=clip)
        losses = sequence_sum(out.losses, batch.cu_seqlens)
        return {"policy": Term(losses, over="compared"), **rollout_metrics(batch, outputs, out)}


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "remax"."""
    return [ReMax]
