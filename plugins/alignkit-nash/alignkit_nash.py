"""Nash-MD (2312.00886): find the policy that no other policy is preferred to, with a judge of pairs, not a reward.

    y  ~ policy,   y' ~ policy^(1-m) reference^m, token by token
    loss = -(P(y beats y') - 1/2 - tau log(policy(y) / reference(y))) log policy(y)       the bracket has no gradient

Preferences may be cyclic, which no reward can express; the mixture keeps self-play from cycling too. The last term in
the bracket gives the gradient of tau KL(policy || reference) over whole completions.
"""

from __future__ import annotations

from pydantic import Field

from alignkit import (
    Advice,
    Batch,
    Context,
    DataFacts,
    Method,
    MethodConfig,
    Models,
    Term,
    hookimpl,
    metric,
    rollout_metrics,
)
from alignkit_kernels import policy_loss, sequence_sum


class NashMD(Method["NashMD.Config"]):
    """Self-play against a mixture of the policy and the reference."""

    name = "nash"
    data = "prompts"
    uses = frozenset({"policy", "reference", "judge"})
    learning_rate = 1e-6
    lora_learning_rate = 1e-5
    demo_settings = {"learning_rate": 2e-4, "batch_size": 32, "tau": 0.05, "epochs": 4}

    class Config(MethodConfig):
        """Settings of Nash-MD."""

        mixture: float = Field(0.125, ge=0, le=1, description="m, the reference's weight in the opponent")
        tau: float = Field(0.1, ge=0, description="weight of the KL to the reference")
        clip: float = Field(0.2, gt=0, le=1, description="clip range of the ratio in further updates on a batch")

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it wherever there is a judge."""
        return Advice(99, "learns from a judge of two answers, also where preferences are cyclic (2312.00886)")

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Sample both sides and query the judge."""
        return ctx.rollouts(batch, mixture=self.config.mixture)

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return one loss per completion of the policy."""
        outputs = models.policy(batch, entropy=True)
        old = batch["old_logps"] if "old_logps" in batch else outputs.logps.detach()
        log_ratio = sequence_sum(old - batch.reference_logps, batch.cu_seqlens)
        advantages = batch["wins"] - 0.5 - self.config.tau * log_ratio
        out = policy_loss(outputs.logps, old, advantages, batch.cu_seqlens, clip=(self.config.clip, self.config.clip))
        losses = sequence_sum(out.losses, batch.cu_seqlens)
        terms = {"policy": Term(losses, over="completions"), "advantage": metric(advantages, over="completions")}
        return {**terms, **rollout_metrics(batch, outputs, out)}


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "nash"."""
    return [NashMD]
