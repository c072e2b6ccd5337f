"""Simple Preference Optimization (2405.14734): no reference, a length-normalised reward, a target margin.

    loss = -log s(b (logp_c / |c| - logp_r / |r|) - gamma),   gamma = gamma_ratio * b

The paper tunes gamma as a ratio to beta (0.3 to 1.6), and so does this. With `alpha`, the reward of an answer with the
average log-probability m is b (1 - exp(-alpha m)) / alpha instead of b m (AlphaPO, 2501.03884).
"""

from __future__ import annotations

import torch
from pydantic import Field

from alignkit import Advice, Batch, DataFacts, Method, MethodConfig, Models, Term, hookimpl, pair_metrics
from alignkit_kernels import preference_loss, sequence_sum

_LARGEST = 20.0  # exponent of AlphaPO's reward, which grows without bound as an answer gets unlikely


class SimPO(Method["SimPO.Config"]):
    """Rank answers by their average log-probability, with a target margin."""

    name = "simpo"
    data = "pairs"
    learning_rate = 1e-6
    lora_learning_rate = 5e-6

    class Config(MethodConfig):
        """Settings of SimPO."""

        beta: float = Field(2.0, gt=0, description="scale of the average log-probabilities")
        gamma_ratio: float = Field(0.5, ge=0, description="target margin divided by beta")
        alpha: float = Field(0.0, description="shape of the reward (AlphaPO); 0: the average log-probability itself")
        sft_weight: float = Field(0.0, ge=0, description="weight of the chosen answer's NLL per token")

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it against a length bias."""
        reason = "needs no reference, and ranks answers by their average log-probability, not by the sum (2405.14734)"
        if facts.length_bias:
            return Advice(80, f"{reason}; here {facts.length_bias}")
        return Advice(50, f"{reason}; nothing but the learning rate holds it near its start")

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return the margin loss, one value per pair, and the SFT term where it has a weight."""
        c = self.config
        logps_C = models.policy(batch).logps
        values, cu_seqlens, per_nat = logps_C, batch.cu_seqlens, c.beta / batch.lengths.clamp(min=1)
        if c.alpha:
            # one value per answer: the kernel then averages segments of length one
            power_S = (-c.alpha * sequence_sum(logps_C, cu_seqlens, mean=True)).clamp(max=_LARGEST)
            values, per_nat = -torch.expm1(power_S) / c.alpha, per_nat * power_S.detach().exp()
            cu_seqlens = torch.arange(len(power_S) + 1, device=power_S.device)
        out = preference_loss(values, None, cu_seqlens, "simpo", beta=c.beta, gamma=c.gamma_ratio * c.beta)
        terms = {"simpo": Term(out.losses), **pair_metrics(batch, logps_C, out.rewards, per_nat)}
        if c.sft_weight:
            nll_E, _ = batch.pairs(-sequence_sum(logps_C, batch.cu_seqlens, mean=True))
            terms["nll/chosen"] = Term(nll_E, coef=c.sft_weight)
        return terms


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "simpo"."""
    return [SimPO]
