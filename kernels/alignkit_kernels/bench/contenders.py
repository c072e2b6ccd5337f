"""The operations of this package and their eager counterparts, as functions of a case's inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax, logsigmoid

import alignkit_kernels
from alignkit_kernels.backend import uses_triton
from alignkit_kernels.bench.cases import Case, Contender, Inputs

GAMMA, LAM, BETA, CLIP = 0.99, 0.95, 0.1, (0.2, 0.2)
BUDGETS = {1: None, 2: 1 << 40, 3: 0, 4: None}  # bytes of kept logits that force a path
# path 4 has two implementations, and the operation chooses one: the LARGEST_HIDDEN that forces each
WAYS = {"fused": 1 << 40, "folded": 0}
OWN = frozenset({"alignkit", *WAYS})  # under the same error limit, and not compared as rivals
ops: Any = alignkit_kernels


def own(case: Case) -> Contender:
    """Return this package's operation for the case."""
    if case.path:
        return partial(_own_linear, BUDGETS[case.path])
    return _OWN[case.name]


def ways(case: Case) -> dict[str, Contender]:
    """Return path 4 with the fused product and with the folded one, when the operation has a choice."""
    probe = torch.empty(0, dtype=case.dtype, device=case.device)
    if case.path != 4 or case.dtype not in (torch.bfloat16, torch.float16) or not uses_triton(probe):
        return {}
    return {name: partial(_own_way, largest) for name, largest in WAYS.items()}


def eager(case: Case) -> Contender:
    """Return plain PyTorch on the full logits (on padded rows for GAE)."""
    return eager_linear if case.path else _EAGER[case.name]


def planned_path(case: Case) -> int | None:
    """Return the path that linear_logps plans to take; None for other operations."""
    if not case.path:
        return None
    n, h, v = (case.sizes[k] for k in "NHV")
    grads = {"hidden_grad": "hidden" in case.wanted, "weight_grad": "weight" in case.wanted}
    budget = BUDGETS[case.path]
    plan = ops.linear_logps.plan(n, h, v, case.dtype, **grads, device=case.device.type, memory_budget=budget)
    return int(plan.path)


# ------------------------------------------------------------------------------------------------- this package


def _own_linear(budget: int | None, x: Inputs) -> Tensor:
    logps: Tensor = ops.linear_logps(x["hidden"], x["weight"], x["targets"], memory_budget=budget)
    return logps


def _own_way(largest_hidden: int, x: Inputs) -> Tensor:
    chooser: Any = importlib.import_module("alignkit_kernels.linear_lse")
    usual = chooser.LARGEST_HIDDEN
    chooser.LARGEST_HIDDEN = largest_hidden
    try:
        return _own_linear(BUDGETS[4], x)
    finally:
        chooser.LARGEST_HIDDEN = usual


def _own_dpo(x: Inputs) -> Tensor:
    logps = ops.linear_logps(x["hidden"], x["weight"], x["targets"])
    with torch.no_grad():
        reference = ops.linear_logps(x["reference"], x["weight"], x["targets"])
    s = len(x["cu_seqlens"]) - 1
    logps, reference = (t.view(2, s // 2, -1).transpose(0, 1).reshape(-1) for t in (logps, reference))
    losses: Tensor = ops.preference_loss(logps, reference, x["cu_seqlens"], "sigmoid", beta=BETA).losses
    return losses.mean()


def _own_policy(x: Inputs) -> Tensor:
    out = ops.policy_loss(x["logps"], x["old"], x["advantages"], x["cu_seqlens"], ratio="token", clip=CLIP)
    losses: Tensor = out.losses
    return losses


_OWN: dict[str, Contender] = {
    "linear_dpo": _own_dpo,
    "selective_logps": lambda x: ops.selective_logps(x["logits"], x["targets"]),
    "sequence_sum": lambda x: ops.sequence_sum(x["values"], x["cu_seqlens"]),
    "preference_loss": lambda x: (
        ops.preference_loss(x["logps"], x["old"], x["cu_seqlens"], "sigmoid", beta=BETA).losses
    ),
    "policy_loss": _own_policy,
    "gae": lambda x: ops.gae(x["rewards"], x["values"], x["cu_seqlens"], GAMMA, LAM),
}


# -------------------------------------------------------------------------------------------------------- eager


def eager_linear(x: Inputs) -> Tensor:
    """Compute full logits, log_softmax in float32, gather."""
    return _chosen(linear(x["hidden"], x["weight"]), x["targets"])


def _chosen(logits: Tensor, targets: Tensor) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return log_softmax(logits, -1, dtype=dtype).gather(1, targets[:, None])[:, 0]


def dpo_from_logps(logps: Tensor, reference: Tensor, n_sequences: int) -> Tensor:
    """Return the mean DPO loss of equally long sequences, the chosen ones first."""
    h = (logps - reference).view(n_sequences, -1).sum(1)
    chosen, rejected = h.chunk(2)
    return -logsigmoid(BETA * (chosen - rejected)).mean()


def _eager_dpo(x: Inputs) -> Tensor:
    with torch.no_grad():
        reference = eager_linear({**x, "hidden": x["reference"]})
    return dpo_from_logps(eager_linear(x), reference, len(x["cu_seqlens"]) - 1)


def _eager_sums(values: Tensor, x: Inputs) -> Tensor:
    return values.new_zeros(len(x["cu_seqlens"]) - 1).index_add(0, x["segments"], values)


def _eager_preference(x: Inputs) -> Tensor:
    h = _eager_sums(x["logps"] - x["old"], x)
    return -logsigmoid(BETA * (h[0::2] - h[1::2]))


def _eager_policy(x: Inputs) -> Tensor:
    ratio = torch.exp(x["logps"] - x["old"])
    clipped = ratio.clamp(1 - CLIP[0], 1 + CLIP[1])
    return -torch.minimum(ratio * x["advantages"], clipped * x["advantages"])


def _eager_gae(x: Inputs) -> tuple[Tensor, Tensor]:
    inside = x["inside"].to(x["values"].dtype)
    rewards, values = x["rewards"][x["grid"]] * inside, x["values"][x["grid"]] * inside
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    deltas = rewards + GAMMA * following - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in range(deltas.shape[1] - 1, -1, -1):
        running = deltas[:, t] + GAMMA * LAM * running * inside[:, t]
        advantages[:, t] = running
    flat = advantages[x["inside"]]
    return flat, flat + x["values"]


_EAGER: dict[str, Callable[[Inputs], Any]] = {
    "linear_dpo": _eager_dpo,
    "selective_logps": lambda x: _chosen(x["logits"], x["targets"]),
    "sequence_sum": lambda x: _eager_sums(x["values"], x),
    "preference_loss": _eager_preference,
    "policy_loss": _eager_policy,
    "gae": _eager_gae,
}
