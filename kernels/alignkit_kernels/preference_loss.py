"""Preference losses and implicit rewards from per-token log-probabilities.

h is a completion's summed log-ratio policy / reference (its summed log-probability where there is no reference), m the
same averaged over its tokens; c is the chosen completion of a pair, r the rejected one, and D = h_c - h_r.

    kind      loss                                                               reward of a completion
    sigmoid   -(1 - e) log s(b D) - e log s(-b D)       DPO, cDPO                b h     2305.18290, 2403.00409
    robust    (-(1 - e) log s(b D) + e log s(-b D)) / (1 - 2 e)                  b h     2403.00409
    hinge     max(0, 1 - b D)                           SLiC                     b h     2305.10425
    cpo       sigmoid without a reference                                        b h     2401.08417
    ipo       (m_c - m_r - 1 / (2 b))^2                                          b m     2310.12036
    simpo     -log s(b (m_c - m_r) - g)                 no reference             b m     2405.14734
    orpo      -log s(o_c - o_r), o = m - log(1 - e^m)   no reference             b m     2403.07691
    kto       w_d (1 - s(b (h - z)))  or  w_u (1 - s(b (z - h)))                 b h     2402.01306

s is the logistic function, b `beta`, e `label_smoothing`, g `gamma`, z `baseline`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from alignkit_kernels.sequence_sum import sequence_sum

Kind = Literal["sigmoid", "robust", "hinge", "cpo", "ipo", "simpo", "orpo", "kto"]
REFERENCE_FREE = frozenset({"cpo", "simpo", "orpo"})
AVERAGED = frozenset({"ipo", "simpo", "orpo"})


class PreferenceLoss(NamedTuple):
    """losses [E]; rewards [S], detached; logps [S], the policy's summed log-probabilities, detached."""

    losses: Tensor
    rewards: Tensor
    logps: Tensor


def preference_loss(
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    cu_seqlens: Tensor,
    kind: Kind = "sigmoid",
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    desirable: Tensor | None = None,
    baseline: Tensor | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
) -> PreferenceLoss:
    """Return one loss a pair (one a completion for "kto"), the rewards and the summed log-probabilities.

    policy_logps, reference_logps: float32 [C] nats; reference_logps is None for a loss without a reference.
    cu_seqlens: int64 [S + 1]; for pairs chosen and rejected in turn, S = 2 E.
    desirable: bool [S], baseline: [S] (nats, no gradient), weights: (desirable, undesirable), all for "kto" alone.
    Raises ValueError on an unknown kind, an odd S, shapes that differ, or a reference where the loss has none.
    """
    if kind not in _LOSSES and kind != "kto":
        raise ValueError(f"unknown kind '{kind}'; there are {', '.join([*_LOSSES, 'kto'])}")
    if kind in REFERENCE_FREE and reference_logps is not None:
        raise ValueError(f"'{kind}' has no reference: pass reference_logps=None")
    if reference_logps is not None and reference_logps.shape != policy_logps.shape:
        given = f"{[*policy_logps.shape]} and {[*reference_logps.shape]}"
        raise ValueError(f"policy_logps and reference_logps differ in shape: {given}")
    ratios = policy_logps if reference_logps is None else policy_logps - reference_logps
    h = sequence_sum(ratios, cu_seqlens, mean=kind in AVERAGED)
    logps = sequence_sum(policy_logps.detach(), cu_seqlens)
    if kind == "kto":
        if desirable is None or baseline is None:
            raise ValueError("'kto' needs desirable [S] and baseline [S]")
        if not desirable.shape == baseline.shape == h.shape:
            given = f"{[*desirable.shape]} and {[*baseline.shape]}"
            raise ValueError(f"'kto' needs desirable and baseline of {[*h.shape]}, got {given}")
        # new_tensor: plain numbers would be rounded to float32 where h is float64
        sign = torch.where(desirable.bool(), h.new_tensor(1.0), h.new_tensor(-1.0))
        weight = torch.where(desirable.bool(), h.new_tensor(weights[0]), h.new_tensor(weights[1]))
        # 1 - s(x) = s(-x)
        losses = weight * torch.sigmoid(-beta * sign * (h - baseline.detach()))
        return PreferenceLoss(losses, beta * h.detach(), logps)
    if len(h) % 2:
        raise ValueError(f"'{kind}' wants pairs, got {len(h)} completions")
    losses = _LOSSES[kind](h[0::2], h[1::2], beta, label_smoothing, gamma)
    return PreferenceLoss(losses, beta * h.detach(), logps)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - e^x) for x <= 0, exact near both ends; x = 0 is taken as the largest number below it."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    # where() differentiates both branches, so each gets only arguments that it is finite on
    near = x > -math.log(2.0)
    log_small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    log_large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, log_small, log_large)


def _sigmoid(c: Tensor, r: Tensor, beta: float, eps: float, gamma: float) -> Tensor:
    x = beta * (c - r)
    return -(1 - eps) * logsigmoid(x) - eps * logsigmoid(-x)


def _robust(c: Tensor, r: Tensor, beta: float, eps: float, gamma: float) -> Tensor:
    x = beta * (c - r)
    return (-(1 - eps) * logsigmoid(x) + eps * logsigmoid(-x)) / (1 - 2 * eps)


def _hinge(c: Tensor, r: Tensor, beta: float, eps: float, gamma: float) -> Tensor:
    return relu(1 - beta * (c - r))


def _ipo(c: Tensor, r: Tensor, beta: float, eps: float, gamma: float) -> Tensor:
    return (c - r - 1 / (2 * beta)) ** 2


def _simpo(c: Tensor, r: Tensor, beta: float, eps: float, gamma: float) -> Tensor:
    return -logsigmoid(beta * (c - r) - gamma)


def _orpo(c: Tensor, r: Tensor, beta: float, eps: float, gamma: float) -> Tensor:
    return -logsigmoid((c - log1mexp(c)) - (r - log1mexp(r)))


_LOSSES = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "cpo": _sigmoid,
    "ipo": _ipo,
    "simpo": _simpo,
    "orpo": _orpo,
}
