"""DPO-Positive (2402.13228): DPO that cannot win a pair by making both answers less likely.

loss = -log s(b (h_c - h_r - lambda max(0, -h_c))),   h = log policy(y) - log reference(y)
"""

from __future__ import annotations

from pydantic import Field
from torch.nn.functional import logsigmoid, relu

from alignkit import Advice, Batch, DataFacts, Method, MethodConfig, Models, Term, hookimpl, pair_metrics
from alignkit_kernels import sequence_sum


class DPOP(Method["DPOP.Config"]):
    """DPO with a penalty while the chosen answer is less likely than under the reference."""

    name = "dpop"
    data = "pairs"
    uses = frozenset({"policy", "reference"})

    class Config(MethodConfig):
        """Settings of DPO-Positive."""

        beta: float = Field(0.3, gt=0, description="how strongly the policy is held to the reference")
        lambda_: float = Field(50.0, ge=0, description="weight of the penalty; 0 is DPO")

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it after DPO; its penalty is for answers that differ in little, which the facts do not show."""
        return Advice(55, "keeps chosen answers likely, also where a pair differs in a few tokens (2402.13228)")

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return one loss per pair, and the usual metrics."""
        beta, lambda_ = self.config.beta, self.config.lambda_
        logps_C = models.policy(batch).logps
        h_S = sequence_sum(logps_C - batch.reference_logps, batch.cu_seqlens)
        chosen_E, rejected_E = batch.pairs(h_S)
        margin_E = chosen_E - rejected_E - lambda_ * relu(-chosen_E)
        return {"dpop": Term(-logsigmoid(beta * margin_E)), **pair_metrics(batch, logps_C, beta * h_S.detach(), beta)}


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "dpop"."""
    return [DPOP]
