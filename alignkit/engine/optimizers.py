"""The optimiser of a run: its groups of parameters, and the bytes of its state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.config import RunConfig
from alignkit.data.stream import learning_rate
from alignkit.errors import ConfigError, PluginError
from alignkit.method import Method
from alignkit.models.quantised import bitsandbytes
from alignkit.models.values import ActorCritic

SMALL = 4096  # bitsandbytes keeps 32-bit states for tensors with fewer elements
BLOCK = 256  # elements that share a scale in 8-bit states
Groups = list[dict[str, Any]]


class Several(torch.optim.Optimizer):
    """Several optimisers as one; they share its groups and its state, so that it is saved and resumed like one."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self._parts = tuple(parts)
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take new groups and states, of which the parts keep their own."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do a step of each."""
        for part in self._parts:
            part.step()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self._parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]


def rate_factor(config: RunConfig, method: Method[Any], step: int, total: int) -> float:
    """Return the fraction of the peak rate at a step: the method's own, or that of the run's `schedule`.

    Raises PluginError where the method's is no finite number from 0 on.
    """
    own: Any = method.schedule(step, total)
    if own is None:
        return learning_rate(config.schedule, config.warmup_fraction, step, total, config.decay_fraction)
    if isinstance(own, bool) or not isinstance(own, int | float) or not 0 <= own < math.inf:
        raise PluginError(
            f"schedule({step}, {total}) of '{method.name}' returned {own!r:.80}; it must be a finite number from 0 on, "
            "by which the peak rate is multiplied, or None"
        )
    return float(own)


def build_optimizer(module: nn.Module, config: RunConfig, rate: float) -> torch.optim.Optimizer:
    """Return the optimiser of the parameters that are trained; rate: the peak learning rate.

    Raises ConfigError where it needs a GPU or bitsandbytes.
    """
    groups = _groups(module, config, rate)
    adam: dict[str, Any] = {"lr": rate, "betas": config.adam_betas, "eps": config.adam_epsilon}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=True)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=rate)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=config.momentum or 0.0)
    if config.optimizer == "muon":
        return _muon(module, groups, config, adam)
    paged = config.optimizer.startswith("paged")
    if paged and not all(p.is_cuda for group in groups for p in group["params"]):
        raise ConfigError(
            "optimizer: paged-adamw-8bit moves states between the memories of GPU and CPU, and this run uses no GPU; "
            "use adamw-8bit"
        )
    optim = bitsandbytes(f"optimizer: {config.optimizer}").optim
    made: torch.optim.Optimizer = (optim.PagedAdamW8bit if paged else optim.AdamW8bit)(groups, **adam)
    return made


def _muon(module: nn.Module, groups: Groups, config: RunConfig, adam: dict[str, Any]) -> torch.optim.Optimizer:
    """Return Muon for the matrices inside the model, AdamW for all others: embeddings, heads, norms and biases."""
    inside = matrices(module)
    ours = _cut(groups, lambda p: id(p) in inside)
    others = _cut(groups, lambda p: id(p) not in inside)
    parts: list[torch.optim.Optimizer] = []
    if ours:
        momentum = 0.95 if config.momentum is None else config.momentum
        # scaled so that its updates are as large as AdamW's: the same rates fit both
        parts.append(torch.optim.Muon(ours, lr=adam["lr"], momentum=momentum, adjust_lr_fn="match_rms_adamw"))
    if others:
        parts.append(torch.optim.AdamW(others, **adam, fused=True))
    return Several(parts)


def _cut(groups: Groups, chosen: Any) -> Groups:
    parts = [{**group, "params": [p for p in group["params"] if chosen(p)]} for group in groups]
    return [part for part in parts if part["params"]]


def matrices(module: nn.Module) -> set[int]:
    """Return the ids of the trained matrices that are neither embeddings nor of a head."""
    ends: set[int] = set()
    for part in module.modules():
        heads = [part] if isinstance(part, nn.Embedding) else [getattr(part, "score", None)]
        if callable(find := getattr(part, "get_output_embeddings", None)):
            heads.append(find())
        ends |= {id(p) for head in heads if isinstance(head, nn.Module) for p in head.parameters()}
    found = (p for p in module.parameters() if p.requires_grad and id(p) not in ends)
    return {id(p) for p in found if p.dim() == 2 and min(p.shape) > 1}


def state_bytes(module: nn.Module, config: RunConfig) -> int:
    """Return the bytes of the optimiser's state, without the numbers that each tensor or group has once."""
    inside = matrices(module) if config.optimizer == "muon" else set()
    return sum(_state_bytes(p, config, id(p) in inside) for p in module.parameters() if p.requires_grad)


def _state_bytes(p: Tensor, config: RunConfig, of_muon: bool) -> int:
    if config.optimizer == "sgd":
        return p.nbytes if config.momentum else 0
    if config.optimizer == "adafactor":  # a mean of each row and of each column
        return (sum(p.shape[-2:]) * p.shape[:-2].numel() if p.dim() > 1 else p.numel()) * p.element_size()
    if config.optimizer.endswith("8bit"):
        return 2 * p.numel() + 2 * 4 * -(-p.numel() // BLOCK) if p.numel() >= SMALL else 2 * 4 * p.numel()
    return p.nbytes if of_muon else 2 * p.nbytes


def _groups(module: nn.Module, config: RunConfig, rate: float) -> Groups:
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
