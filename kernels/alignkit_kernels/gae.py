"""Generalised advantage estimation over ragged, concatenated completions.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   return_t = A_t + V_t

V and A are 0 after a completion's last token. Both versions compute in float64 and round once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit_kernels.backend import jit, launching, tl, uses_triton
from alignkit_kernels.sequence_sum import check_segments

BLOCK = 1024


def gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return the advantages [C] and the returns [C], both without a gradient.

    rewards, values: [C], one per token, in the reward's units. cu_seqlens: int64 [S + 1], ascending from 0 to C.
    gamma, lam: in [0, 1]. Returns float32 (float64 for float64 values).
    Raises ValueError on shapes that differ, boundaries that do not cover the tokens, a gamma or lam out of range.
    Source: 1506.02438 eq. 16. A completion's end counts as terminal: nothing is bootstrapped after it.
    """
    if values.dim() != 1 or rewards.shape != values.shape:
        raise ValueError(f"expected rewards and values of one shape [C], got {[*rewards.shape]} and {[*values.shape]}")
    check_segments(values, cu_seqlens)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must lie in [0, 1], got {gamma} and {lam}")
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    run = _triton if uses_triton(values) else _eager
    return run(rewards.detach().to(dtype), values.detach().to(dtype), cu_seqlens, gamma, lam)


def _eager(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    dtype, n_tokens = values.dtype, len(values)
    rewards, values = rewards.double(), values.double()
    at = torch.arange(n_tokens, device=values.device)
    ends = cu_seqlens[1:].contiguous()
    ends = ends[torch.searchsorted(ends, at, right=True)]
    advantages = rewards + gamma * torch.where(at + 1 < ends, values.roll(-1), 0.0) - values
    # after each round A_t holds the deltas of the next `step` tokens; reading the longest segment would wait for a GPU
    step, decay, longest = 1, gamma * lam, n_tokens
    if not values.is_cuda:
        longest = max(cu_seqlens.diff().tolist(), default=0)
    while step < longest and decay > 0:
        advantages = advantages + decay * torch.where(at + step < ends, advantages.roll(-step), 0.0)
        step, decay = 2 * step, decay * decay
    return advantages.to(dtype), (advantages + values).to(dtype)


@jit
def _compose(decay_1, sum_1, decay_2, sum_2):  # type: ignore[no-untyped-def]
    return decay_1 * decay_2, sum_1 * decay_2 + sum_2


@jit
def _gae_kernel(  # type: ignore[no-untyped-def]
    rewards_ptr,
    values_ptr,
    cu_seqlens_ptr,
    advantages_ptr,
    returns_ptr,
    # float arguments are float32 unless annotated, and lam to the power of a thousand would show it
    gamma: tl.float64,
    decay: tl.float64,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    start, end = tl.load(cu_seqlens_ptr + s).to(tl.int64), tl.load(cu_seqlens_ptr + s + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    behind = tl.sum(tl.zeros([BLOCK], tl.float64))  # the advantage of the token after this block
    for first in range(0, end - start, BLOCK):
        # lane 0 is the last token: a forward scan over reversed addresses, because reverse=True has had bugs
        at = end - 1 - first - lanes
        inside = at >= start
        values = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float64)
        following = tl.load(values_ptr + at + 1, mask=inside & (at + 1 < end), other=0.0).to(tl.float64)
        rewards = tl.load(rewards_ptr + at, mask=inside, other=0.0).to(tl.float64)
        deltas = rewards + gamma * following - values
        decays = tl.zeros([BLOCK], tl.float64) + decay
        decays, advantages = tl.associative_scan((decays, deltas), 0, _compose)
        advantages += decays * behind
        behind = tl.sum(tl.where(lanes == BLOCK - 1, advantages, 0.0))
        tl.store(advantages_ptr + at, advantages.to(tl.float32), mask=inside)
        tl.store(returns_ptr + at, (advantages + values).to(tl.float32), mask=inside)


def _triton(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    rewards, values, cu_seqlens = rewards.contiguous(), values.contiguous(), cu_seqlens.contiguous()
    advantages, returns = torch.empty_like(values), torch.empty_like(values)
    if len(values):
        with launching(values):
            _gae_kernel[(len(cu_seqlens) - 1,)](
                rewards, values, cu_seqlens, advantages, returns, float(gamma), float(gamma * lam), BLOCK=BLOCK
            )
    return advantages, returns
