"""Odds Ratio Preference Optimization (2403.07691): SFT and preference in one pass, without a reference.

    loss = nll(chosen, averaged over its tokens) - lambda log s(o_c - o_r),   o = log(p / (1 - p))

where log p is a completion's average log-probability per token; log(1 - p) is computed so that p near 1 stays finite.
"""

from __future__ import annotations

from pydantic import Field

from alignkit import Advice, Batch, DataFacts, Method, MethodConfig, Models, Term, hookimpl, pair_metrics
from alignkit_kernels import preference_loss, sequence_sum


class ORPO(Method["ORPO.Config"]):
    """Imitate the chosen answer and widen the odds against the rejected one; starts from a base model."""

    name = "orpo"
    data = "pairs"
    learning_rate = 8e-6
    lora_learning_rate = 8e-5
    demo_settings = {"learning_rate": 5e-4, "lambda_": 0.5}

    class Config(MethodConfig):
        """Settings of ORPO."""

        lambda_: float = Field(0.1, ge=0, description="weight of the odds-ratio term")

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it for a model that may not be fine-tuned yet."""
        reason = "does SFT and preferences in one run, without a reference (2403.07691)"
        if facts.chat_template is False:
            return Advice(85, f"{reason}: the model has no chat template, so it may be a base model without SFT")
        return Advice(45, f"{reason}; for a base model: it would change a model that already answers well")

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return the SFT term and the odds-ratio term, one value of each per pair."""
        logps_C = models.policy(batch).logps
        out = preference_loss(logps_C, None, batch.cu_seqlens, "orpo", beta=self.config.lambda_)
        nll_E, _ = batch.pairs(-sequence_sum(logps_C, batch.cu_seqlens, mean=True))
        return {
            "nll/chosen": Term(nll_E),
            "odds_ratio": Term(out.losses, coef=self.config.lambda_),
            **pair_metrics(batch, logps_C, out.rewards, self.config.lambda_ / batch.lengths.clamp(min=1)),
        }


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "orpo"."""
    return [ORPO]
