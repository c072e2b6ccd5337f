"""Contrastive Preference Optimization (2401.08417): DPO with a uniform reference, and an SFT term that stabilises it.

loss = -log s(b (logp_c - logp_r)) + alpha * nll(chosen, averaged over its tokens)
"""

from __future__ import annotations

from pydantic import Field

from alignkit import Advice, Batch, DataFacts, Method, MethodConfig, Models, Term, hookimpl, pair_metrics
from alignkit_kernels import preference_loss, sequence_sum


class CPO(Method["CPO.Config"]):
    """Prefer the chosen answer and imitate it; no reference model."""

    name = "cpo"
    data = "pairs"
    learning_rate = 1e-6
    lora_learning_rate = 5e-6
    demo_settings = {"learning_rate": 1.5e-4}

    class Config(MethodConfig):
        """Settings of CPO."""

        beta: float = Field(0.1, gt=0, description="scale of the log-probability gap")
        alpha: float = Field(1.0, ge=0, description="weight of the chosen answer's negative log-likelihood")
        label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed fraction of flipped labels")

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise label smoothing against noise."""
        reason = "needs no reference, and imitates the chosen answers, which must be good enough for that (2401.08417)"
        smoothing = facts.label_smoothing()
        return Advice(40, reason, (smoothing,) if smoothing else ())

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return the contrastive term and the SFT term, one value of each per pair."""
        c = self.config
        logps_C = models.policy(batch).logps
        out = preference_loss(logps_C, None, batch.cu_seqlens, "cpo", beta=c.beta, label_smoothing=c.label_smoothing)
        nll_E, _ = batch.pairs(-sequence_sum(logps_C, batch.cu_seqlens, mean=True))
        return {
            "cpo": Term(out.losses),
            "nll/chosen": Term(nll_E, coef=c.alpha),
            **pair_metrics(batch, logps_C, out.rewards, c.beta),
        }


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "cpo"."""
    return [CPO]
