"""Nash-MD (2312.00886): find the policy that no other one is preferred to, by a judge of pairs instead of a reward.

    y  ~ policy,   y' ~ policy^(1-m) reference^m, token by token
    loss = -(P(y beats y') - 1/2 - tau log(policy(y) / reference(y))) log policy(y)       the bracket has no gradient

A preference may go in circles, where no reward can express it; the mixture keeps the play from running in them too. The
bracket's last part is the gradient of tau KL(policy || reference) of whole completions.
"""

from __future__ import annotations

from pydantic import Field

from alignkit import Batch, Context, Method, MethodConfig, Models, Term, hookimpl, metric, rollout_metrics
from alignkit_kernels import policy_loss, sequence_sum


class NashMD(Method["NashMD.Config"]):
    """Play against a policy held back towards the reference."""

    name = "nash"
    data = "prompts"
    uses = frozenset({"policy", "reference", "judge"})
    learning_rate = 1e-6
    lora_learning_rate = 1e-5

    class Config(MethodConfig):
        """Settings of Nash-MD."""

        mixture: float = Field(0.125, ge=0, le=1, description="m, the reference's part of the opponent")
        tau: float = Field(0.1, ge=0, description="weight of the KL to the reference")
        clip: float = Field(0.2, gt=0, le=1, description="of the ratio, where a batch serves several updates")

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Sample both sides and ask the judge."""
        return ctx.rollouts(batch, mixture=self.config.mixture)

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return one loss a completion of the policy's."""
        said = models.policy(batch, entropy=True)
        old = batch["old_logps"] if "old_logps" in batch else said.logps.detach()
        log_ratio = sequence_sum(old - batch.reference_logps, batch.cu_seqlens)
        advantages = batch["wins"] - 0.5 - self.config.tau * log_ratio
        out = policy_loss(said.logps, old, advantages, batch.cu_seqlens, clip=(self.config.clip, self.config.clip))
        losses = sequence_sum(out.losses, batch.cu_seqlens)
        terms = {"policy": Term(losses, over="completions"), "advantage": metric(advantages, over="completions")}
        return {**terms, **rollout_metrics(batch, said, out)}


@hookimpl
def register_methods() -> list[type[Method]]:
    """Bring "nash"."""
    return [NashMD]
