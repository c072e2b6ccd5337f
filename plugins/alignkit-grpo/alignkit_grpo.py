"""Group Relative Policy Optimization (2402.03300), its variants, and REINFORCE leave-one-out (2402.14740).

    GRPO   A_i = (r_i - mean of the group) / (std of the group + 1e-4)      clipped surrogate + beta KL in the loss
    RLOO   A_i = R_i - mean of the others' R,  R = r - beta (log policy(y) - log reference(y))

A group is a prompt with G completions: one tree. Other than in the paper the KL is k2, whose gradient is the KL's.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from alignkit import Batch, Context, Method, MethodConfig, Models, Term, hookimpl, rollout_metrics
from alignkit_kernels import PolicyLoss, policy_loss, sequence_sum

EPSILON = 1e-4
CLIP_HIGH = {"dapo": 0.28, "cispo": 4.0}  # 2503.14476; 2506.13585 leaves only the upper side, far out


class GRPO(Method["GRPO.Config"]):
    """Learn from how each completion does against the others of its prompt; no critic."""

    name = "grpo"
    data = "prompts"
    uses = frozenset({"policy", "reference", "reward"})
    learning_rate = 1e-6
    lora_learning_rate = 1e-5

    class Config(MethodConfig):
        """Settings of GRPO."""

        group_size: int = Field(8, ge=2, description="completions sampled of each prompt")
        beta: float = Field(0.04, ge=0, description="weight of the KL to the reference; at 0 none is loaded")
        kl: Literal["k1", "k2", "k3"] = Field("k2", description="its estimator; the paper's is k3")
        clip: float = Field(0.2, gt=0, le=1, description="how far a ratio may fall below 1")
        clip_high: float | None = Field(None, gt=0, description="how far above; default: clip, dapo 0.28, cispo 4")
        variant: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo"] = Field(
            "grpo", description="how tokens are averaged, and what is clipped; see the docs"
        )
        ratio: Literal["token", "sequence"] = Field("token", description="sequence: GSPO, with a clip of about 3e-4")
        scale: Literal["group", "batch", "none"] | None = Field(
            None, description="standard deviation that rewards are divided by; default: group, dr_grpo none"
        )
        mask_truncated: bool = Field(False, description="learn nothing from completions that were cut")

    def roles(self) -> frozenset[str]:
        """Without a KL there is no reference."""
        return self.uses if self.config.beta else self.uses - {"reference"}

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Sample and score the groups; attach the advantages, and each completion's share of the step's tokens."""
        batch = ctx.rollouts(batch, self.config.group_size)
        rewards = batch["rewards"].view(len(batch), -1)
        spread = rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)
        scale = self.config.scale or ("none" if self.config.variant == "dr_grpo" else "group")
        centred = rewards - rewards.mean(1, keepdim=True)
        if scale == "group":
            centred = centred / (rewards.std(1, keepdim=True) + EPSILON)
        elif scale == "batch":
            mean = ctx.mean(rewards)
            centred = centred / (ctx.mean((rewards - mean).square()).sqrt() + EPSILON)
        # equal rewards may differ from their mean by a rounding
        advantages = torch.where(spread, centred, 0.0).flatten()
        learned = batch["ended"] if self.config.mask_truncated else torch.ones_like(batch["ended"])
        counts = torch.stack([(~spread).sum(), learned.sum(), (batch.lengths * learned).sum()]).double()
        n_equal, n_learned, n_tokens = ctx.sum(counts).tolist()
        ctx.log(**{"advantage/zero_variance_groups": n_equal})
        # what turns a completion's sum over tokens into its part of a mean over completions
        of_step = n_learned / max(n_tokens, 1.0)  # a mean over all tokens of the step, however it is cut
        constant = {"dr_grpo": 1 / ctx.max_new_tokens, "dapo": of_step, "cispo": of_step}.get(self.config.variant)
        share = 1 / batch.lengths if constant is None else torch.full_like(advantages, constant)
        return batch.attach(
            per_completion={"advantages": advantages, "learned": learned, "share": share},
            per_token={"learned_tokens": learned.repeat_interleave(batch.lengths)},
        )

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return the surrogate with its KL, averaged as the variant has it."""
        said = models.policy(batch, entropy=True)
        out = self._surrogate(batch, said.logps)
        terms = rollout_metrics(batch, said, out)
        if self.config.variant == "bnpo":
            return {"policy": Term(out.losses, over="learned_tokens"), **terms}
        sums = sequence_sum(out.losses, batch.cu_seqlens)
        return {"policy": Term(sums * batch["share"], over="learned"), **terms}

    def _surrogate(self, batch: Batch, logps: Tensor) -> PolicyLoss:
        c = self.config
        high = c.clip_high or CLIP_HIGH.get(c.variant, c.clip)
        old = batch["old_logps"] if "old_logps" in batch else logps.detach()
        cispo = c.variant == "cispo"
        out = policy_loss(
            logps, old, batch["advantages"] * (not cispo), batch.cu_seqlens, ratio=c.ratio, clip=(c.clip, high),
            reference_logps=batch.reference_logps if c.beta else None, kl=c.kl, kl_coef=c.beta,
        )  # fmt: skip
        if not cispo:
            return out
        # the clipped ratio is a weight without a gradient, so no token is ever left out (2506.13585 eq. 4)
        weight = out.ratios.clamp(max=1 + high) * batch["advantages"].repeat_interleave(batch.lengths)
        return out._replace(losses=out.losses - weight * logps, clipped=out.ratios > 1 + high)


class RLOO(Method["RLOO.Config"]):
    """REINFORCE with the mean of a prompt's other completions as baseline."""

    name = "rloo"
    data = "prompts"
    uses = frozenset({"policy", "reference", "reward"})
    learning_rate = 1e-6
    lora_learning_rate = 1e-5

    class Config(MethodConfig):
        """Settings of RLOO."""

        group_size: int = Field(4, ge=2, description="completions sampled of each prompt")
        beta: float = Field(0.05, ge=0, description="weight of the KL in the reward; at 0 no reference is loaded")
        clip: float = Field(0.2, gt=0, le=1, description="of the ratio, where a batch serves several updates")

    def roles(self) -> frozenset[str]:
        """Without a KL there is no reference."""
        return self.uses if self.config.beta else self.uses - {"reference"}

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Sample and score the groups."""
        return ctx.rollouts(batch, self.config.group_size)

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return -A log policy(y) a completion; the groups are whole here, so their baselines can be made here."""
        said = models.policy(batch, entropy=True)
        old = batch["old_logps"] if "old_logps" in batch else said.logps.detach()
        rewards = batch["rewards"]
        if self.config.beta:
            rewards = rewards - self.config.beta * sequence_sum(old - batch.reference_logps, batch.cu_seqlens)
        groups = rewards.view(len(batch), -1)
        others = (groups.sum(1, keepdim=True) - groups) / (groups.shape[1] - 1)
        advantages = (groups - others).flatten()
        clip = (self.config.clip, self.config.clip)
        out = policy_loss(said.logps, old, advantages, batch.cu_seqlens, clip=clip)
        losses = sequence_sum(out.losses, batch.cu_seqlens)
        return {"policy": Term(losses, over="completions"), **rollout_metrics(batch, said, out)}


@hookimpl
def register_methods() -> list[type[Method]]:
    """Bring "grpo" and "rloo"."""
    return [GRPO, RLOO]
