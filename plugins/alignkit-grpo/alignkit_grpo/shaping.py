"""GRPO's advantages, and what settings add to its surrogate: a KL for further updates, a second clip, chosen tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from alignkit import Context, wins
from alignkit_kernels import sequence_sum

EPSILON = 1e-4
LIMIT = 60.0  # log-ratios beyond it count as this, as in the kernel
INFINITE = 0x7F800000  # the bits of float32's infinity


def group_advantages(rewards: Tensor, scored: Tensor, scale: str, ctx: Context) -> tuple[Tensor, Tensor]:
    """Return the advantages, flat [S], and whether a group's rewards differ, [E, 1].

    rewards, scored: [E, G]; what is not scored has no advantage. scale: group, batch or none. The deviations are the
    sample's.
    """
    n_scored, infinite = scored.sum(1, keepdim=True), float("inf")
    highest, lowest = (torch.where(scored, rewards, fill) for fill in (-infinite, infinite))
    # rewards that differ by rounding only are equal: divided by their deviation, they would be noise of size 1
    spread = wins(highest.amax(1, keepdim=True), lowest.amin(1, keepdim=True)) == 1
    centred = (rewards - rewards.sum(1, keepdim=True) / n_scored.clamp(min=1)) * scored
    if scale == "group":
        variance = centred.square().sum(1, keepdim=True) / (n_scored - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + EPSILON)
    elif scale == "batch":
        centred = centred / (of_step(rewards, scored, ctx)[1] + EPSILON).to(centred.dtype)
    # equal rewards may differ from their mean by rounding
    return torch.where(spread & scored, centred, 0.0).flatten(), spread


def of_step(values: Tensor, counted: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    """Return mean and sample standard deviation of the counted values of a step on all ranks, float64 scalars."""
    values, n = values.double(), ctx.sum(counted.sum())
    mean = ctx.mean(values, counted)
    variance = ctx.mean((values - mean).square(), counted) * n / (n - 1).clamp(min=1)
    return mean, variance.sqrt()


def unbiased_kl(logps: Tensor, old_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Return q k3 per token, [C] nats, q = policy / policy that sampled: value and gradient are the KL's at any q.

    The factor has a gradient: q (k3 + d k3 / d log policy) = q log(policy / reference), which k3 alone does not have.
    DeepSeek-V3.2, 2512.02556. Computed in float64, rounded once.
    """
    q = (logps.double() - old_logps.double()).clamp(-LIMIT, LIMIT).exp()
    r = (logps.double() - reference_logps.double()).clamp(-LIMIT, LIMIT)
    return (q * (torch.expm1(-r) + r)).to(logps.dtype)


def beyond(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, cu_seqlens: Tensor, ratio: str, delta: float
) -> Tensor:
    """Return which tokens have a ratio above `delta` and a negative advantage, bool [C] (2505.07291).

    The usual clip leaves these without a bound. advantages: [C]. ratio: token or sequence.
    """
    log_ratios = logps.detach() - old_logps
    if ratio == "sequence":
        means = sequence_sum(log_ratios, cu_seqlens, mean=True)
        log_ratios = means.repeat_interleave(cu_seqlens.diff())
    return (log_ratios > math.log(delta)) & (advantages < 0)


def highest(values: Tensor, counted: Tensor, fraction: float, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a mask of the 1 + fraction * (n - 1) largest of the n counted values on all ranks, bool [C].

    values: 0 or more. total: sums over the ranks. Equal values at the limit are all in.
    """
    # floats of one sign have the order of their bits, so 31 halvings find the limit exactly, without a gather
    bits = values.float().clamp(min=0).contiguous().view(torch.int32)
    wanted = 1 + math.floor(fraction * (int(total(counted.sum())) - 1) + 1e-9)
    low, high = 0, INFINITE
    while low < high:
        middle = (low + high + 1) // 2
        enough = int(total(((bits >= middle) & counted).sum())) >= wanted
        low, high = (middle, high) if enough else (low, middle - 1)
    return (bits >= low) & counted
