"""The optimiser of a run, and its groups of parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from alignkit.config import RunConfig
from alignkit.models.values import ActorCritic


def build_optimizer(module: nn.Module, config: RunConfig, rate: float) -> torch.optim.Optimizer:
    """Return the optimiser of the parameters that are trained; rate: the peak learning rate."""
    return torch.optim.AdamW(_groups(module, config, rate), lr=rate, betas=config.adam_betas, fused=True)


def _groups(module: nn.Module, config: RunConfig, rate: float) -> list[dict[str, Any]]:
    """Return parameter groups: no weight decay of norms and biases; the critic's rate as a multiple of the policy's."""
    critic = {id(p) for p in module.critic.parameters()} if isinstance(module, ActorCritic) else set()
    groups = []
    for of_critic in (False, True):
        trained = [p for p in module.parameters() if p.requires_grad and (id(p) in critic) == of_critic]
        scale = (config.critic_learning_rate or rate) / rate if of_critic else 1.0
        for decay, params in (
            (config.weight_decay, [p for p in trained if p.dim() >= 2]),
            (0.0, [p for p in trained if p.dim() < 2]),
        ):
            groups.append({"params": params, "weight_decay": decay, "rate_scale": scale})
    return [g for g in groups if g["params"]]
