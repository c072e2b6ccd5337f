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
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, relu

from alignkit_kernels.backend import jit, launching, tl, uses_triton
from alignkit_kernels.sequence_sum import BLOCK, check_segments, sequence_sum, spread

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
    """Return one loss per pair (per completion for "kto"), the rewards and the summed log-probabilities.

    policy_logps, reference_logps: float32 [C] nats; reference_logps is None for a loss without a reference.
    cu_seqlens: int64 [S + 1]; in pairs chosen and rejected alternate, S = 2 E.
    desirable: bool [S], baseline: [S] (nats, no gradient), weights: (desirable, undesirable); all three only for "kto".
    Raises ValueError on an unknown kind, numbers out of range, shapes that do not match, or a superfluous reference.
    """
    if kind not in _LOSSES and kind != "kto":
        raise ValueError(f"unknown kind '{kind}'; choose from {', '.join([*_LOSSES, 'kto'])}")
    if not beta >= 0 or (kind == "ipo" and beta == 0):
        raise ValueError(f"beta must be {'above 0' if kind == 'ipo' else '0 or more'}, got {beta}")
    if not 0 <= label_smoothing < (0.5 if kind == "robust" else 1):
        raise ValueError(f"'{kind}' needs label_smoothing from 0 to below 1 (robust: 0.5), got {label_smoothing}")
    if kind in REFERENCE_FREE and reference_logps is not None:
        raise ValueError(f"'{kind}' does not use a reference: pass reference_logps=None")
    if reference_logps is not None and reference_logps.shape != policy_logps.shape:
        given = f"{[*policy_logps.shape]} and {[*reference_logps.shape]}"
        raise ValueError(f"policy_logps and reference_logps differ in shape: {given}")
    check_segments(policy_logps, cu_seqlens)
    n_completions = len(cu_seqlens) - 1
    floats = [policy_logps] if reference_logps is None else [policy_logps, reference_logps]
    if kind == "kto":
        if desirable is None or baseline is None:
            raise ValueError("'kto' needs desirable [S] and baseline [S]")
        if not desirable.shape == baseline.shape == (n_completions,):
            given = f"{[*desirable.shape]} and {[*baseline.shape]}"
            raise ValueError(f"'kto' needs desirable and baseline of {[n_completions]}, got {given}")
        floats.append(baseline)
    else:
        if n_completions % 2:
            raise ValueError(f"'{kind}' needs pairs, got {n_completions} completions")
        desirable = baseline = None
    options = _Options(kind, beta, label_smoothing, gamma, desirable, baseline, weights)
    if n_completions and all(uses_triton(each) for each in floats):
        return PreferenceLoss(*_PreferenceLoss.apply(policy_logps, reference_logps, cu_seqlens, options))
    return _eager(policy_logps, reference_logps, cu_seqlens, options)


class _Options(NamedTuple):
    kind: Kind
    beta: float
    label_smoothing: float
    gamma: float
    desirable: Tensor | None
    baseline: Tensor | None
    weights: tuple[float, float]


def _eager(policy: Tensor, reference: Tensor | None, cu_seqlens: Tensor, options: _Options) -> PreferenceLoss:
    kind, beta, label_smoothing, gamma, desirable, baseline, weights = options
    ratios = policy if reference is None else policy - reference
    h = sequence_sum(ratios, cu_seqlens, mean=kind in AVERAGED)
    logps = sequence_sum(policy.detach(), cu_seqlens)
    if desirable is not None and baseline is not None:
        # new_tensor: plain numbers would be rounded to float32 when h is float64
        sign = torch.where(desirable.bool(), h.new_tensor(1.0), h.new_tensor(-1.0))
        weight = torch.where(desirable.bool(), h.new_tensor(weights[0]), h.new_tensor(weights[1]))
        # 1 - s(x) = s(-x)
        losses = weight * torch.sigmoid(-beta * sign * (h - baseline.detach()))
    else:
        losses = _LOSSES[kind](h[0::2], h[1::2], beta, label_smoothing, gamma)
    return PreferenceLoss(losses, beta * h.detach(), logps)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - e^x) for x <= 0, exact near both ends; x = 0 counts as the largest number below it."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    # where() differentiates both branches, so each gets only arguments for which it is finite
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
    "sigmoid": _sigmoid, "robust": _robust, "hinge": _hinge, "cpo": _sigmoid,
    "ipo": _ipo, "simpo": _simpo, "orpo": _orpo,
}  # fmt: skip


# ---- the same in one launch, one program per pair (or completion), in float64; a slope is d loss / d h (or d m)


@jit
def _preference_loss_kernel(  # type: ignore[no-untyped-def]
    policy_ptr, reference_ptr, cu_seqlens_ptr, desirable_ptr, baseline_ptr,
    losses_ptr, rewards_ptr, logps_ptr, slopes_ptr,
    # float arguments are float32 unless annotated
    beta: tl.float64, label_smoothing: tl.float64, offset: tl.float64,
    weight_desirable: tl.float64, weight_undesirable: tl.float64,
    KIND: tl.constexpr, MEAN: tl.constexpr, REFERENCE: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64)
    s = e if KIND == "kto" else 2 * e
    c = _sums(policy_ptr, reference_ptr, cu_seqlens_ptr, rewards_ptr, logps_ptr, s, beta, MEAN, REFERENCE, BLOCK)
    if KIND == "kto":
        desirable = tl.load(desirable_ptr + s).to(tl.float64)
        weight = desirable * weight_desirable + (1.0 - desirable) * weight_undesirable
        sign = 2.0 * desirable - 1.0
        x = sign * beta * (c - tl.load(baseline_ptr + s).to(tl.float32).to(tl.float64))
        loss = weight * _logistic(-x)
        tl.store(slopes_ptr + s, -sign * beta * loss * _logistic(x))
    else:
        s += 1
        r = _sums(policy_ptr, reference_ptr, cu_seqlens_ptr, rewards_ptr, logps_ptr, s, beta, MEAN, REFERENCE, BLOCK)
        if KIND == "orpo":
            c, slope_c = _log_odds(c, EPS)
            r, slope_r = _log_odds(r, EPS)
            x = c - r
        elif KIND == "ipo":
            slope_c, slope_r, x = 1.0, 1.0, c - r - offset
        else:
            slope_c, slope_r, x = beta, beta, beta * (c - r) - offset
        loss, slope = _loss_and_slope(x, label_smoothing, KIND)
        tl.store(slopes_ptr + s - 1, slope * slope_c)
        tl.store(slopes_ptr + s, -slope * slope_r)
    tl.store(losses_ptr + e, loss.to(tl.float32))


@jit
def _sums(policy_ptr, reference_ptr, cu_seqlens_ptr, rewards_ptr, logps_ptr, s, beta, MEAN, REFERENCE, BLOCK):  # type: ignore[no-untyped-def]
    start, end = tl.load(cu_seqlens_ptr + s).to(tl.int64), tl.load(cu_seqlens_ptr + s + 1).to(tl.int64)
    logps, ratios = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        policy = tl.load(policy_ptr + at, mask=at < end, other=0.0).to(tl.float32).to(tl.float64)
        logps += policy
        if REFERENCE:
            ratios += policy - tl.load(reference_ptr + at, mask=at < end, other=0.0).to(tl.float32).to(tl.float64)
    logp = tl.sum(logps)
    h = tl.sum(ratios) if REFERENCE else logp
    if MEAN:
        h /= tl.maximum(end - start, 1).to(tl.float64)
    tl.store(logps_ptr + s, logp.to(tl.float32))
    tl.store(rewards_ptr + s, (beta * h).to(tl.float32))
    return h


@jit
def _loss_and_slope(x, label_smoothing, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    if KIND == "hinge":  # with this comparison NaN stays NaN
        loss, slope = tl.where(x >= 1.0, 0.0, 1.0 - x), tl.where(x >= 1.0, 0.0, -1.0)
    elif KIND == "ipo":
        loss, slope = x * x, 2.0 * x
    elif KIND == "simpo" or KIND == "orpo":
        loss, slope = _softplus(-x), -_logistic(-x)
    else:
        right, wrong = 1.0 - label_smoothing, label_smoothing
        if KIND == "robust":
            right, wrong = right / (1.0 - 2.0 * label_smoothing), -wrong / (1.0 - 2.0 * label_smoothing)
        loss = right * _softplus(-x) + wrong * _softplus(x)
        slope = wrong * _logistic(x) - right * _logistic(-x)
    return loss, slope


@jit
def _log_odds(x, EPS: tl.constexpr):  # type: ignore[no-untyped-def]
    # the clamp of log1mexp: above it the slope is that of x alone
    rest = _log1p(-tl.exp(tl.minimum(x, -EPS)))
    return x - rest, tl.where(x <= -EPS, tl.exp(-rest), 1.0)


@jit
def _softplus(x):  # type: ignore[no-untyped-def]
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@jit
def _logistic(x):  # type: ignore[no-untyped-def]
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, small) / (1.0 + small)


@jit
def _log1p(u):  # type: ignore[no-untyped-def]
    # Triton has no log1p. 1 + u rounds u; the ratio of u to its rounded value corrects that.
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


class _PreferenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, policy: Tensor, reference: Tensor | None, cu_seqlens: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind, beta, label_smoothing, gamma, desirable, baseline, weights = options
        cu_seqlens, n_completions = cu_seqlens.contiguous(), len(cu_seqlens) - 1
        dtype = policy.dtype if reference is None else torch.promote_types(policy.dtype, reference.dtype)
        losses = policy.new_empty(n_completions // 2, dtype=dtype)
        if baseline is not None:
            losses = policy.new_empty(n_completions, dtype=torch.promote_types(dtype, baseline.dtype))
        rewards, logps = policy.new_empty(n_completions, dtype=dtype), policy.new_empty(n_completions)
        slopes = policy.new_empty(n_completions, dtype=torch.float64)
        offset = 1 / (2 * beta) if kind == "ipo" else gamma if kind == "simpo" else 0.0
        with launching(policy):
            _preference_loss_kernel[(len(losses),)](
                policy.contiguous(), policy if reference is None else reference.contiguous(), cu_seqlens,
                policy if desirable is None else desirable.bool().contiguous(),
                policy if baseline is None else baseline.contiguous(), losses, rewards, logps, slopes,
                *(float(x) for x in (beta, label_smoothing, offset, *weights)),
                KIND=kind, MEAN=kind in AVERAGED, REFERENCE=reference is not None,
                EPS=torch.finfo(dtype).eps, BLOCK=BLOCK,
            )  # fmt: skip
        ctx.save_for_backward(cu_seqlens, slopes)
        ctx.n_tokens, ctx.mean = len(policy), kind in AVERAGED
        ctx.mark_non_differentiable(rewards, logps)
        return losses, rewards, logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *none: Tensor) -> tuple[Tensor | None, ...]:
        cu_seqlens, slopes = ctx.saved_tensors
        grad = spread(g, cu_seqlens, ctx.n_tokens, ctx.mean, slopes)
        return grad, -grad if ctx.needs_input_grad[1] else None, None, None
