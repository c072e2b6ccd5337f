"""Identity Preference Optimization (2310.12036): regress the log-ratio gap on a finite target.

    loss = (D - 1 / (2 tau))^2,  D = m_chosen - m_rejected,  m = log-ratio policy / reference averaged over tokens

The paper sums over tokens; its authors later stated that they average, so the average is the default.
"""

from __future__ import annotations

import torch
from pydantic import Field

from alignkit import Advice, Batch, DataFacts, Method, MethodConfig, Models, Term, hookimpl, pair_metrics
from alignkit_kernels import preference_loss, sequence_sum


class IPO(Method["IPO.Config"]):
    """DPO with a finite target: the squared loss has its minimum at a finite gap."""

    name = "ipo"
    data = "pairs"
    uses = frozenset({"policy", "reference"})
    learning_rate = 1e-6
    lora_learning_rate = 5e-6

    class Config(MethodConfig):
        """Settings of IPO."""

        tau: float = Field(0.1, gt=0, description="strength of the regulariser: the target gap is 1 / (2 tau)")
        sum: bool = Field(False, description="sum log-ratios over tokens, as in the paper's formula")

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it where labels are noisy, or rows are few."""
        reason = "its margin has a finite target, so that no pair pulls without end (2310.12036)"
        if facts.noisy:
            return Advice(75, f"{reason}, not even a wrongly labelled one")
        return Advice(70 if facts.few else 60, f"{reason}: where DPO overfits")

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return the squared distance to the target gap, one value per pair."""
        logps_C = models.policy(batch).logps
        ratios, cu_seqlens = logps_C - batch.reference_logps, batch.cu_seqlens
        if self.config.sum:
            # the kernel averages segments; a segment of one value is its own average
            ratios = sequence_sum(ratios, cu_seqlens)
            cu_seqlens = torch.arange(len(ratios) + 1, device=ratios.device)
        out = preference_loss(ratios, None, cu_seqlens, "ipo", beta=self.config.tau)
        per_nat = self.config.tau / (1.0 if self.config.sum else batch.lengths.clamp(min=1))
        return {"ipo": Term(out.losses), **pair_metrics(batch, logps_C, out.rewards, per_nat)}


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "ipo"."""
    return [IPO]
