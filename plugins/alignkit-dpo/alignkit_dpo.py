"""Direct Preference Optimization and its variants by configuration.

h = log policy(y) - log reference(y), D = h_chosen - h_rejected, s the logistic function, b beta, e label smoothing:

    loss_type sigmoid   -(1 - e) log s(b D) - e log s(-b D)              2305.18290; e > 0 is conservative DPO
    loss_type robust    (-(1 - e) log s(b D) + e log s(-b D)) / (1 - 2e)  2403.00409: unbiased under flipped labels
    loss_type hinge     max(0, 1 - b D)                                   2305.10425 (SLiC)
    length_normalised   h averaged over the completion's tokens           use a b that is 10 to 100 times larger
    ld_alpha            weight of the tokens past the shorter answer's length, 2409.06411 (LD-DPO)
    divergence          f'(policy / reference) instead of h, 2309.16240 (f-DPO)
    rpo_alpha           weight of the chosen answer's negative log-likelihood per token, 2404.19733
    sync_every          steps between updates reference <- sync_alpha policy + (1 - sync_alpha) reference, 2404.09656

For forward KL and alpha-divergences f' grows without bound as the ratio falls, so the log-ratio is clamped at -20.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit import (
    Advice,
    Batch,
    Choice,
    Context,
    DataFacts,
    Method,
    MethodConfig,
    Models,
    Term,
    hookimpl,
    pair_metrics,
)
from alignkit_kernels import preference_loss, sequence_sum


class DPO(Method["DPO.Config"]):
    """Fit the implicit reward b h to preferences by logistic regression on pairs."""

    name = "dpo"
    data = "pairs"
    uses = frozenset({"policy", "reference"})
    learning_rate = 1e-6
    lora_learning_rate = 5e-6

    class Config(MethodConfig):
        """Settings of DPO; the defaults are the paper's."""

        beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference")
        loss_type: Literal["sigmoid", "robust", "hinge"] = Field("sigmoid", description="loss of a pair's margin")
        label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed fraction of flipped labels")
        length_normalised: bool = Field(False, description="average log-ratios over tokens instead of summing them")
        ld_alpha: float = Field(1.0, ge=0, le=1, description="weight of tokens past the shorter answer's length")
        divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
            "reverse_kl", description="divergence that holds the policy to the reference"
        )
        divergence_alpha: float = Field(0.5, gt=0, lt=1, description="the alpha of divergence: alpha")
        rpo_alpha: float = Field(0.0, ge=0, description="weight of an SFT term on the chosen answers")
        sync_every: int | None = Field(None, ge=1, description="steps between updates of the reference (TR-DPO)")
        sync_alpha: float = Field(0.6, gt=0, le=1, description="the policy's weight in an update of the reference")

        @model_validator(mode="after")
        def _smoothing_fits(self) -> Any:
            if self.label_smoothing and self.loss_type == "hinge":
                raise ValueError("label_smoothing has no effect on loss_type: hinge; use sigmoid or robust")
            return self

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it first for pairs, with smoothing against noisy labels and LD-DPO against a length bias."""
        reason = "learns from pairs directly; the best studied of its kind (2305.18290)"
        settings = []
        if smoothing := facts.label_smoothing():
            settings.append(smoothing)
            if facts.flipped:
                why = "unbiased where this fraction of the labels is flipped (2403.00409)"
                settings.append(Choice("loss_type", "robust", why))
            reason += ", with label smoothing against the noise"
        if facts.length_bias:
            why = f"{facts.length_bias}: tokens past the shorter one's length have half the weight (2409.06411)"
            settings.append(Choice("ld_alpha", 0.5, why))
            reason += ", with less weight on the extra length of answers"
        return Advice(90, reason, tuple(settings))

    def reference_need(self) -> Literal["rows", "live", "moving"]:
        """Return "moving" for TR-DPO."""
        return "moving" if self.config.sync_every else "rows"

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return the preference term, the SFT term where it has a weight, and the pair metrics."""
        c = self.config
        logps_C = models.policy(batch).logps
        ratios_C, cu_seqlens = self._weights(batch) * (logps_C - batch.reference_logps), batch.cu_seqlens
        if c.divergence != "reverse_kl":
            # one value per completion: the kernel then sums segments of length one
            ratios_C = self._derivative(sequence_sum(ratios_C, cu_seqlens))
            cu_seqlens = torch.arange(len(ratios_C) + 1, device=ratios_C.device)
        out = preference_loss(ratios_C, None, cu_seqlens, c.loss_type, beta=c.beta, label_smoothing=c.label_smoothing)
        per_nat = c.beta / (batch.lengths.clamp(min=1) if c.length_normalised else 1.0)
        terms = {c.loss_type: Term(out.losses), **pair_metrics(batch, logps_C, out.rewards, per_nat)}
        if c.rpo_alpha:
            nll_E, _ = batch.pairs(-sequence_sum(logps_C, batch.cu_seqlens, mean=True))
            terms["nll/chosen"] = Term(nll_E, coef=c.rpo_alpha)
        return terms

    def after_update(self, ctx: Context, metrics: Mapping[str, float]) -> None:
        """Move the reference every `sync_every` steps (TR-DPO)."""
        if self.config.sync_every and (ctx.step + 1) % self.config.sync_every == 0:
            ctx.update_reference(self.config.sync_alpha)

    def _weights(self, batch: Batch) -> Tensor:
        """Return the weight of each token's log-ratio, [C]."""
        lengths_S = batch.lengths
        per_token = torch.ones(len(batch.targets), device=lengths_S.device)
        if self.config.ld_alpha != 1.0:
            shorter_S = lengths_S.view(-1, 2).amin(1).repeat_interleave(2)
            offset_C = torch.arange(len(per_token), device=lengths_S.device)
            offset_C = offset_C - batch.cu_seqlens[:-1].repeat_interleave(lengths_S)
            per_token[offset_C >= shorter_S.repeat_interleave(lengths_S)] = self.config.ld_alpha
        if self.config.length_normalised:
            per_token = per_token / lengths_S.clamp(min=1).repeat_interleave(lengths_S)
        return per_token

    def _derivative(self, h_S: Tensor) -> Tensor:
        """Return f'(ratio) up to a constant, from the log-ratio h [S]."""
        if self.config.divergence == "js":
            return logsigmoid(h_S)
        h_S = h_S.clamp(min=-20.0)
        if self.config.divergence == "forward_kl":
            return -torch.exp(-h_S)
        alpha = self.config.divergence_alpha
        return -torch.expm1(-alpha * h_S) / alpha


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "dpo"."""
    return [DPO]
