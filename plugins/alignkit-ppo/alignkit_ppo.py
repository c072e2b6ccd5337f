"""Proximal Policy Optimization from a reward (1707.06347, 1909.08593, 2203.02155): policy, reference, critic, reward.

    r_t       = -beta KL_t + [t is the last token] reward              KL_t by k1: log policy - log reference
    A, R      = GAE(gamma, lambda) over the completion's tokens        A whitened over all tokens of the batch
    loss      = clipped surrogate + c_v clipped value loss - c_e entropy, a mean over tokens
V_t is the critic's value at the position that predicts token t; a completion's end is terminal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from alignkit import Advice, Batch, Context, DataFacts, Method, MethodConfig, Models, RunningStats, Term

# isort: split
from alignkit import hookimpl, metric, rollout_metrics
from alignkit_kernels import gae, policy_loss, sequence_sum


class PPO(Method["PPO.Config"]):
    """Raise completions that score better than the critic expected; stay close to sampling policy and reference."""

    name = "ppo"
    data = "prompts"
    uses = frozenset({"policy", "reference", "critic", "reward"})
    trains = ("policy", "critic")
    lora_learning_rate = 1e-5
    epochs_per_batch = 4
    demo_settings = {"learning_rate": 1.2e-4, "batch_size": 32, "epochs": 4, "epochs_per_batch": 2, "beta": 0.1}

    class Config(MethodConfig):
        """Settings of PPO."""

        beta: float = Field(0.2, ge=0, description="weight of the KL in the reward; adaptive control starts here")
        kl: Literal["k1", "k2", "k3"] = Field("k1", description="estimator of the KL in the reward")
        kl_control: Literal["adaptive", "fixed"] = Field("adaptive", description="control of beta towards target_kl")
        target_kl: float = Field(6.0, gt=0, description="nats per sequence that adaptive control aims at")
        horizon: int = Field(10_000, ge=1, description="completions over which adaptive control changes beta")
        clip: float = Field(0.2, gt=0, le=1, description="clip range of the ratio around 1")
        value_clip: float = Field(0.2, gt=0, description="clip range of a value around its old one, in reward units")
        value_coef: float = Field(0.1, ge=0, description="weight of the value loss")
        entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus")
        gamma: float = Field(1.0, ge=0, le=1, description="discount per token")
        lam: float = Field(0.95, ge=0, le=1, description="GAE's lambda")
        whiten: bool = Field(True, description="scale advantages to mean 0 and standard deviation 1 over the batch")
        normalise_rewards: bool = Field(True, description="by the running mean and standard deviation of rewards")
        reward_clip: float = Field(10.0, gt=0, description="largest magnitude of a reward after normalisation")
        missing_eos_penalty: float = Field(0.0, ge=0, description="subtracted from the reward of a cut completion")
        critic_warmup_steps: int = Field(0, ge=0, description="number of first steps in which only the critic learns")
        max_update_kl: float | None = Field(None, gt=0, description="nats per token at which a batch's updates end")

    def __init__(self, config: PPO.Config) -> None:
        super().__init__(config)
        self.beta, self.kl, self.moments = config.beta, 0.0, RunningStats()

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it after the methods that need no critic."""
        reason = "a critic gives credit to single tokens (1707.06347); it takes the most memory and the most settings"
        return Advice(96 if facts.reward else 84, reason)

    def roles(self) -> frozenset[str]:
        """Leave out the reference where the KL has no weight."""
        return self.uses if self.config.beta else self.uses - {"reference"}

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Sample, score, and compute advantages and returns from the rewards."""
        c = self.config
        batch = ctx.rollouts(batch)
        log_ratios = batch["old_logps"] - batch.reference_logps if c.beta else torch.zeros_like(batch["old_logps"])
        safe = log_ratios.clamp(-20, 20)  # e^20 is large enough
        rewards = -self.beta * {"k1": log_ratios, "k2": log_ratios.square() / 2, "k3": torch.expm1(-safe) + safe}[c.kl]
        rewards[batch.cu_seqlens[1:] - 1] += self._scores(batch, ctx)
        advantages, returns = gae(rewards, batch["values"], batch.cu_seqlens, c.gamma, c.lam)
        mask = batch["scored"].repeat_interleave(batch.lengths)  # the others teach neither policy nor critic
        unexplained, variance = (_variance(v, mask, ctx) for v in (returns - batch["values"], returns))
        if c.whiten:
            advantages = (advantages - ctx.mean(advantages, mask)) / (_variance(advantages, mask, ctx).sqrt() + 1e-8)
        observed = float(ctx.mean(sequence_sum(log_ratios, batch.cu_seqlens)))
        self.kl = observed if ctx.training and math.isfinite(observed) else self.kl
        ctx.log(**{"beta": self.beta, "value/explained_variance": 1 - float(unexplained / variance.clamp(min=1e-8))})
        warming = torch.full((len(batch),), ctx.step < c.critic_warmup_steps, device=batch.device)
        tokens = {"advantages": advantages, "returns": returns, "scored_tokens": mask}
        return batch.attach(per_token=tokens, per_example={"warming": warming})

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return the surrogate, the value loss and metrics; during the critic's warm-up only the value loss counts."""
        c = self.config
        warming = bool(batch["warming"].any())
        outputs = models.policy(batch, entropy=True, values=True, frozen=warming)
        out = policy_loss(
            outputs.logps, batch["old_logps"], batch["advantages"], batch.cu_seqlens, clip=(c.clip, c.clip),
            entropies=outputs.entropy if c.entropy_coef else None, entropy_coef=c.entropy_coef,
        )  # fmt: skip
        return {
            "policy": Term(out.losses, over="scored_tokens", coef=0.0 if warming else 1.0),
            "value": Term(self._value_losses(batch, outputs.values), over="scored_tokens", coef=c.value_coef),
            "value/mean": metric(outputs.values, over="tokens"),
            "update_kl": metric(out.ratios - 1 - out.ratios.log(), over="tokens"),
            **rollout_metrics(batch, outputs, out),
        }

    def enough(self, metrics: Mapping[str, float]) -> bool:
        """Stop updating on a batch once the policy is too far from the one that sampled it."""
        return self.config.max_update_kl is not None and metrics["update_kl"] > self.config.max_update_kl

    def after_update(self, ctx: Context, metrics: Mapping[str, float]) -> None:
        """Move beta towards the target KL (1909.08593 section 2.2)."""
        if self.config.kl_control == "adaptive":
            error = min(max(self.kl / self.config.target_kl - 1, -0.2), 0.2)
            self.beta *= 1 + error * len(ctx.step_examples) / self.config.horizon

    def state_dict(self) -> dict[str, Any]:
        """Return the KL controller and the reward's statistics."""
        return {"beta": self.beta, "kl": self.kl, "moments": self.moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self.beta, self.kl = state["beta"], state["kl"]
        self.moments.load_state_dict(state["moments"])

    def _scores(self, batch: Batch, ctx: Context) -> Tensor:
        """Return rewards [S] with the penalty for a missing end, normalised by all rewards so far, including these."""
        rewards, scored = batch["rewards"] - self.config.missing_eos_penalty * ~batch["ended"], batch["scored"]
        if self.config.normalise_rewards:
            if ctx.training:
                count, mean = int(ctx.sum(scored.sum())), ctx.mean(rewards.double(), scored)
                self.moments.update(count, float(mean), count * float(_variance(rewards.double(), scored, ctx)))
            rewards = self.moments.normalise(rewards).clamp(-self.config.reward_clip, self.config.reward_clip)
        return rewards * scored

    def _value_losses(self, batch: Batch, values: Tensor) -> Tensor:
        clipped = batch["values"] + (values - batch["values"]).clamp(-self.config.value_clip, self.config.value_clip)
        return torch.maximum((values - batch["returns"]).square(), (clipped - batch["returns"]).square()) / 2


def _variance(value: Tensor, counted: Tensor, ctx: Context) -> Tensor:
    return ctx.mean((value - ctx.mean(value, counted)).square(), counted)


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "ppo"."""
    return [PPO]
