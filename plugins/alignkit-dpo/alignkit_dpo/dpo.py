"""Direct Preference Optimization and its variants by configuration.

h = log policy(y) - log reference(y), D = h_chosen - h_rejected, s the logistic function, b beta, e label smoothing:

    loss_type sigmoid   -(1 - e) log s(b D) - e log s(-b D)              2305.18290; e > 0 is conservative DPO
    loss_type robust    (-(1 - e) log s(b D) + e log s(-b D)) / (1 - 2e)  2403.00409: unbiased under flipped labels
    loss_type hinge     max(0, 1 - b D)                                   2305.10425 (SLiC)
    loss_type ...       EXO, NCA, SPPO, APO, Cal-DPO: see losses.py
    loss_weights        a weighted sum of these, instead of one           2411.10442 (MPO)
    length_normalised   h averaged over the completion's tokens           use a b that is 10 to 100 times larger
    ld_alpha            weight of the tokens past the shorter answer's length, 2409.06411 (LD-DPO)
    divergence          f'(policy / reference) instead of h, 2309.16240 (f-DPO)
    rpo_alpha           weight of the chosen answer's negative log-likelihood per token, 2404.19733
    sync_every          steps between updates reference <- sync_alpha policy + (1 - sync_alpha) reference, 2404.09656

For forward KL and alpha-divergences f' grows without bound as the ratio falls, so the log-ratio is clamped at -20.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

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
    pair_metrics,
)
from alignkit_dpo.losses import OF_MARGIN, SMOOTHED, LossType, pair_losses
from alignkit_dpo.ratios import derivative, token_weights
from alignkit_kernels import sequence_sum


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
        loss_type: LossType = Field("sigmoid", description="loss of a pair")
        loss_weights: dict[LossType, Annotated[float, Field(gt=0)]] = Field(
            {}, description="loss types and their weights, instead of loss_type"
        )
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
            if self.loss_weights and self.loss_type != "sigmoid":
                raise ValueError("loss_weights takes the place of loss_type; remove loss_type")
            if self.label_smoothing and not self.weights.keys() & SMOOTHED:
                raise ValueError(f"label_smoothing has no effect on loss_type: {self.loss_type}; use sigmoid or robust")
            if not self.label_smoothing and "exo_pair" in self.weights:
                raise ValueError("exo_pair needs label_smoothing above 0, such as 0.001")
            if self.sync_every is None and self.sync_alpha != 0.6:
                raise ValueError("sync_alpha has an effect with sync_every only; set sync_every, or remove it")
            if self.divergence != "reverse_kl" and (of_both := sorted(self.weights.keys() - OF_MARGIN)):
                raise ValueError(f"loss_type: {of_both[0]} is not of a margin alone; remove divergence")
            if self.divergence != "alpha" and self.divergence_alpha != 0.5:
                raise ValueError("divergence_alpha has an effect with divergence: alpha only; remove it")
            return self

        @property
        def weights(self) -> dict[LossType, float]:
            """The weight of each loss type."""
            return self.loss_weights or {self.loss_type: 1.0}

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
        weights_C = token_weights(batch, c.ld_alpha, c.length_normalised)
        ratios_C, cu_seqlens = weights_C * (logps_C - batch.reference_logps), batch.cu_seqlens
        if c.divergence != "reverse_kl":
            # one value per completion: the kernel then sums segments of length one
            ratios_C = derivative(sequence_sum(ratios_C, cu_seqlens), c.divergence, c.divergence_alpha)
            cu_seqlens = torch.arange(len(ratios_C) + 1, device=ratios_C.device)
        terms: dict[str, Term] = {
            kind: Term(pair_losses(ratios_C, cu_seqlens, kind, c.beta, c.label_smoothing), coef=weight)
            for kind, weight in c.weights.items()
        }
        rewards = c.beta * sequence_sum(ratios_C.detach(), cu_seqlens)
        per_nat = c.beta / (batch.lengths.clamp(min=1) if c.length_normalised else 1.0)
        terms |= pair_metrics(batch, logps_C, rewards, per_nat)
        if c.rpo_alpha:
            nll_E, _ = batch.pairs(-sequence_sum(logps_C, batch.cu_seqlens, mean=True))
            terms["nll/chosen"] = Term(nll_E, coef=c.rpo_alpha)
        return terms

    def after_update(self, ctx: Context, metrics: Mapping[str, float]) -> None:
        """Move the reference every `sync_every` steps (TR-DPO)."""
        if self.config.sync_every and (ctx.step + 1) % self.config.sync_every == 0:
            ctx.update_reference(self.config.sync_alpha)
