"""Group Relative Policy Optimization (2402.03300) and its variants.

    A_i = (r_i - mean of the group) / (std of the group + 1e-4)      clipped surrogate + beta KL in the loss

A group is a prompt with G completions: one tree. Unlike in the paper, the KL is k2, whose gradient is the KL's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from alignkit import Advice, Batch, Context, DataFacts, Method, MethodConfig, Models, Term, rollout_metrics
from alignkit_grpo.shaping import beyond, group_advantages, highest, unbiased_kl
from alignkit_kernels import PolicyLoss, policy_loss, sequence_sum

BOUNDLESS = 1e30  # a ratio that no log-ratio of float32 log-probabilities reaches
CLIP_HIGH = {"dapo": 0.28, "cispo": 4.0}  # 2503.14476; 2506.13585 clips only the upper side, far from 1


class GRPO(Method["GRPO.Config"]):
    """Learn from each completion's reward relative to the others of its prompt; no critic."""

    name = "grpo"
    data = "prompts"
    uses = frozenset({"policy", "reference", "reward"})
    learning_rate = 1e-6
    lora_learning_rate = 1e-5
    demo_settings = {"learning_rate": 3e-4, "group_size": 8, "beta": 0.01}

    class Config(MethodConfig):
        """Settings of GRPO."""

        group_size: int = Field(8, ge=2, description="completions sampled per prompt")
        beta: float = Field(0.04, ge=0, description="weight of the KL to the reference; at 0 no reference is loaded")
        kl: Literal["k1", "k2", "k3", "unbiased"] = Field(
            "k2", description="estimator of the KL; the paper's is k3; unbiased: for several updates on a batch"
        )
        clip: float = Field(0.2, gt=0, le=1, description="how far a ratio may fall below 1")
        clip_high: float | None = Field(
            None, gt=0, description="how far a ratio may rise above 1; default: clip, dapo 0.28, cispo 4"
        )
        delta: float | None = Field(
            None, gt=1, description="ratio that is clipped where the advantage is negative, too"
        )
        variant: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo"] = Field(
            "grpo", description="how tokens are averaged and clipped; see the docs"
        )
        ratio: Literal["token", "sequence"] = Field("token", description="sequence: GSPO, with a clip of about 3e-4")
        scale: Literal["group", "batch", "none"] | None = Field(
            None, description="standard deviation that rewards are divided by; default: group, dr_grpo none"
        )
        mask_truncated: bool = Field(False, description="exclude truncated completions from the loss")
        entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus, a mean over tokens")
        top_entropy: float = Field(
            1.0, ge=0, le=1, description="fraction of tokens, those of the highest entropy, with a policy gradient"
        )

        @model_validator(mode="after")
        def _delta_is_beyond_the_clip(self) -> Any:
            if self.variant == "cispo" and (self.delta is not None or self.clip != 0.2):
                raise ValueError("variant: cispo has clip_high only, without clip and delta; remove them")
            if self.delta is not None and self.delta <= 1 + self.high:
                raise ValueError(f"delta is {self.delta:g}, not above 1 + clip_high = {1 + self.high:g}; raise it")
            return self

        @property
        def high(self) -> float:
            """How far a ratio may rise above 1."""
            return self.clip_high or CLIP_HIGH.get(self.variant, self.clip)

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it first where the reward can be checked."""
        reason = "compares several answers to a prompt with each other, without a critic (2402.03300)"
        if not facts.reward:
            return Advice(88, f"{reason}; the column `answer` can be checked")
        return Advice(100 if facts.checkable else 97, reason)

    def roles(self) -> frozenset[str]:
        """Leave out the reference where the KL has no weight."""
        return self.uses if self.config.beta else self.uses - {"reference"}

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Sample and score the groups; attach the advantages, and each completion's weight in the average."""
        batch = ctx.rollouts(batch, self.config.group_size)
        rewards, scored = (batch[name].view(len(batch), -1) for name in ("rewards", "scored"))
        n_scored = scored.sum(1, keepdim=True)
        default = "none" if self.config.variant == "dr_grpo" else "group"
        advantages, spread = group_advantages(rewards, scored, self.config.scale or default, ctx)
        learned = (n_scored > 0).expand_as(scored).flatten()  # a group that no reward applies to teaches nothing
        if self.config.mask_truncated:
            learned = learned & batch["ended"]
        spread = spread | (n_scored == 0)
        counts = torch.stack([(~spread).sum(), learned.sum(), (batch.lengths * learned).sum()]).double()
        n_equal, n_learned, n_tokens = ctx.sum(counts).tolist()
        ctx.log(**{"advantage/zero_variance_groups": n_equal})
        # the factor that turns a completion's sum over tokens into its term of a mean over completions
        of_step = n_learned / max(n_tokens, 1.0)  # a mean over all tokens of the step, however it is split
        constant = {"dr_grpo": 1 / ctx.max_new_tokens, "dapo": of_step, "cispo": of_step}.get(self.config.variant)
        share = 1 / batch.lengths if constant is None else torch.full_like(advantages, constant)
        tokens = {"learned_tokens": learned.repeat_interleave(batch.lengths)}
        if self.config.top_entropy < 1:
            entropy = ctx.models.policy(batch, entropy=True).entropy
            tokens["acted"] = highest(entropy, tokens["learned_tokens"], self.config.top_entropy, ctx.sum)
        numbers = {"advantages": advantages, "learned": learned, "share": share}
        return batch.attach(per_completion=numbers, per_token=tokens)

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return the surrogate with its KL, averaged as the variant defines."""
        outputs = models.policy(batch, entropy=True)
        out = self._surrogate(batch, outputs.logps)
        terms = rollout_metrics(batch, outputs, out)
        if self.config.entropy_coef:
            over = "acted" if "acted" in batch else "learned_tokens"
            terms["entropy_bonus"] = Term(-outputs.entropy, over=over, coef=self.config.entropy_coef)
        if self.config.variant == "bnpo":
            return {"policy": Term(out.losses, over="learned_tokens"), **terms}
        sums = sequence_sum(out.losses, batch.cu_seqlens)
        return {"policy": Term(sums * batch["share"], over="learned"), **terms}

    def _surrogate(self, batch: Batch, logps: Tensor) -> PolicyLoss:
        c = self.config
        old = batch["old_logps"] if "old_logps" in batch else logps.detach()
        advantages = batch["advantages"].repeat_interleave(batch.lengths)
        if "acted" in batch:
            advantages = advantages * batch["acted"]
        delta = c.delta or BOUNDLESS
        far = beyond(logps, old, advantages, batch.cu_seqlens, c.ratio, delta)
        cispo, in_kernel = c.variant == "cispo", c.beta > 0 and c.kl != "unbiased"
        # without an advantage the kernel returns the ratios and the KL only. CISPO has no clipped surrogate
        out = policy_loss(
            logps, old, advantages.masked_fill(far | cispo, 0.0), batch.cu_seqlens, ratio=c.ratio,
            clip=(c.clip, c.high), reference_logps=batch.reference_logps if in_kernel else None,
            kl=c.kl if in_kernel else "k2", kl_coef=c.beta if in_kernel else 0.0,
        )  # fmt: skip
        losses = out.losses - torch.where(far, delta * advantages, 0.0).to(out.losses.dtype)
        if c.beta and not in_kernel:
            losses = losses + c.beta * unbiased_kl(logps, old, batch.reference_logps)
        if not cispo:
            return out._replace(losses=losses, clipped=out.clipped | far)
        # the clipped ratio is a weight without a gradient, so every token contributes (2506.13585 eq. 4)
        weight = out.ratios.clamp(max=1 + c.high) * advantages
        return out._replace(losses=losses - weight * logps, clipped=out.ratios > 1 + c.high)
