"""The clipped policy surrogate with a KL and an entropy term, per token, over ragged completions.

    ratio_t = e^(logp_t - old_t)                                  "token"     PPO, GRPO   1707.06347 eq. 7
    ratio_t = e^(mean of logp - old over t's completion)          "sequence"  GSPO        2507.18071
    loss_t  = -min(ratio_t A_t, clip(ratio_t, 1 - low, 1 + high) A_t) + kl_coef kl_t - entropy_coef entropy_t

The KL between policy and reference, with r = logp - reference (http://joschu.net/blog/kl-approx.html), on-policy:

    k1 = r               unbiased value; its gradient is 0 in expectation: as a loss it only adds noise
    k2 = r^2 / 2         biased value; its gradient r grad(logp) is the KL's gradient: the one for a loss
    k3 = e^-r - 1 + r    unbiased value, never negative; its gradient is biased (that of the reversed KL)

Both versions compute in float64 and round once. Log-ratios beyond 60 nats count as 60 and pass no gradient: float32
ends at e^88.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignkit_kernels.backend import jit, launching, tl, triton, uses_triton
from alignkit_kernels.sequence_sum import check_segments, sequence_sum

LIMIT = 60.0
BLOCK = 512
RATIOS, KLS = ("token", "sequence"), ("k1", "k2", "k3")


class PolicyLoss(NamedTuple):
    """losses [C]; ratios [C], clipped bool [C] (the clip removed the gradient), kl [C] (raw): these three detached."""

    losses: Tensor
    ratios: Tensor
    clipped: Tensor
    kl: Tensor


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    ratio: Literal["token", "sequence"] = "token",
    clip: tuple[float, float] = (0.2, 0.2),
    reference_logps: Tensor | None = None,
    kl: Literal["k1", "k2", "k3"] = "k3",
    kl_coef: float = 0.0,
    entropies: Tensor | None = None,
    entropy_coef: float = 0.0,
    mask: Tensor | None = None,
) -> PolicyLoss:
    """Return one loss per token, its ratio, whether the clip is active, and the KL to the reference (0 without one).

    logps, old_logps, reference_logps, entropies: [C] nats. Only logps and entropies get gradients.
    advantages: [C], or [S] for one per completion (read as [C] when both fit). cu_seqlens: int64 [S + 1].
    clip: (low, high), low in [0, 1]; a high above low is DAPO's clip-higher, 2503.14476. mask: bool [C]; where it is
    False loss, KL and gradient are 0, the ratio is 1, and a sequence's mean leaves the token out.
    With "sequence" a mean over each completion's tokens, then over completions, is GSPO's objective.
    Returns float32 (float64 for float64 logps). Raises ValueError on unknown names, shapes that do not match, a clip
    out of range, or a coefficient without its reference_logps or entropies.
    """
    if ratio not in RATIOS or kl not in KLS:
        raise ValueError(f"ratio must be one of {RATIOS} and kl one of {KLS}, got '{ratio}' and '{kl}'")
    if not (0 <= clip[0] <= 1 and clip[1] >= 0):
        raise ValueError(f"clip must be (low, high) with low in [0, 1] and high 0 or more, got {clip}")
    if kl_coef and reference_logps is None:
        raise ValueError(f"kl_coef is {kl_coef}, but reference_logps is missing: pass reference_logps [C]")
    if entropy_coef and entropies is None:
        raise ValueError(f"entropy_coef is {entropy_coef}, but entropies is missing: pass entropies [C]")
    named = {"old_logps": old_logps, "reference_logps": reference_logps, "entropies": entropies, "mask": mask}
    _check_shapes(logps, named, advantages, cu_seqlens)
    options = _Options(ratio == "sequence", 1 - clip[0], 1 + clip[1], KLS.index(kl) + 1, kl_coef, entropy_coef)
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    logps, entropies = logps.to(dtype), entropies.to(dtype) if entropies is not None and entropy_coef else None
    old_logps, advantages = old_logps.detach().to(dtype), advantages.detach().to(dtype)
    reference_logps = None if reference_logps is None else reference_logps.detach().to(dtype)
    run = _PolicyLoss.apply if uses_triton(logps) else _eager
    return PolicyLoss(*run(logps, entropies, old_logps, advantages, reference_logps, cu_seqlens, mask, options))


class _Options(NamedTuple):
    sequence: bool
    floor: float
    ceiling: float
    kl: int
    kl_coef: float
    entropy_coef: float


def _check_shapes(logps: Tensor, named: dict[str, Tensor | None], advantages: Tensor, cu_seqlens: Tensor) -> None:
    if logps.dim() != 1:
        raise ValueError(f"expected logps [C], got {[*logps.shape]}")
    for name, tensor in named.items():
        if tensor is not None and tensor.shape != logps.shape:
            raise ValueError(f"expected {name} of the shape of logps {[*logps.shape]}, got {[*tensor.shape]}")
    mask = named["mask"]
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"expected a bool mask, got {mask.dtype}")
    check_segments(logps, cu_seqlens)
    if [*advantages.shape] not in ([len(logps)], [len(cu_seqlens) - 1]):
        sizes = f"one per token [{len(logps)}] or one per completion [{len(cu_seqlens) - 1}]"
        raise ValueError(f"expected advantages, {sizes}, got {[*advantages.shape]}")


def _eager(
    logps: Tensor, entropies: Tensor | None, old_logps: Tensor, advantages: Tensor, reference_logps: Tensor | None,
    cu_seqlens: Tensor, mask: Tensor | None, options: _Options,
) -> tuple[Tensor, ...]:  # fmt: skip
    counted = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask

    def kept(x: Tensor) -> Tensor:
        return torch.where(counted, x.double(), 0.0)

    at = torch.arange(len(logps), device=logps.device)
    segments = torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True)
    log_ratios = kept(logps) - kept(old_logps)
    if options.sequence:
        counts = sequence_sum(counted.double(), cu_seqlens)
        log_ratios = (sequence_sum(log_ratios, cu_seqlens) / counts.clamp(min=1))[segments]
    ratios = torch.where(counted, log_ratios.clamp(-LIMIT, LIMIT).exp(), 1.0)
    a = kept(advantages if advantages.shape == logps.shape else advantages[segments])
    clipped = ((ratios > options.ceiling) & (a > 0)) | ((ratios < options.floor) & (a < 0))
    # where(), because minimum() halves the gradient at the clip's edge
    losses = -torch.where(clipped, ratios.clamp(options.floor, options.ceiling).detach(), ratios) * a
    kl = torch.zeros_like(losses)
    if reference_logps is not None:
        r = (kept(logps) - kept(reference_logps)).clamp(-LIMIT, LIMIT)
        kl = r if options.kl == 1 else r * r / 2 if options.kl == 2 else torch.expm1(-r) + r
        losses = losses + options.kl_coef * kl
    if entropies is not None:
        losses = losses - options.entropy_coef * kept(entropies)
    return losses.to(logps.dtype), ratios.detach().to(logps.dtype), clipped, kl.detach().to(logps.dtype)


@jit
def _counted(mask_ptr, at, end):  # type: ignore[no-untyped-def]
    counted = at < end
    if mask_ptr is not None:
        counted = tl.load(mask_ptr + at, mask=counted, other=0) != 0
    return counted


@jit
def _load(ptr, at, counted):  # type: ignore[no-untyped-def]
    return tl.load(ptr + at, mask=counted, other=0.0).to(tl.float64)


@jit
def _saturated(x, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    # comparisons, not clamp(): NaN must stay NaN
    x = tl.where(x > LIMIT, LIMIT, x)
    return tl.where(x < -LIMIT, -LIMIT, x)


@jit
def _mean_log_ratio(logps_ptr, old_ptr, mask_ptr, start, end, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.float64)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        counted = _counted(mask_ptr, at, end)
        total += _load(logps_ptr, at, counted) - _load(old_ptr, at, counted)
        count += counted.to(tl.float64)
    n = tl.maximum(tl.sum(count), 1.0)
    return tl.sum(total) / n, n


@jit
def _kl_and_slope(log_ratios, KL: tl.constexpr, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    r = _saturated(log_ratios, LIMIT)
    if KL == 1:
        kl, slope = r, r * 0 + 1
    elif KL == 2:
        kl, slope = r * r / 2, r
    else:
        kl, slope = tl.exp(-r) - 1 + r, 1 - tl.exp(-r)
    return kl, tl.where(tl.abs(log_ratios) > LIMIT, 0.0, slope)


# fmt: off
@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    logps_ptr, entropies_ptr, old_ptr, advantages_ptr, reference_ptr, cu_seqlens_ptr, mask_ptr,
    losses_ptr, ratios_ptr, clipped_ptr, kl_ptr, slopes_ptr, kl_slopes_ptr,
    floor: tl.float64, ceiling: tl.float64, kl_coef: tl.float64, entropy_coef: tl.float64,
    SEQUENCE: tl.constexpr, PER_TOKEN: tl.constexpr, KL: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):
    # several programs share the blocks of a long completion; each sums all of it, so that one launch is enough
    s = tl.program_id(0).to(tl.int64)
    start, end = tl.load(cu_seqlens_ptr + s).to(tl.int64), tl.load(cu_seqlens_ptr + s + 1).to(tl.int64)
    if SEQUENCE:
        mean, n = _mean_log_ratio(logps_ptr, old_ptr, mask_ptr, start, end, BLOCK)
    for first in range(start + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        counted = _counted(mask_ptr, at, end)
        logps = _load(logps_ptr, at, counted)
        x = tl.zeros([BLOCK], tl.float64) + mean if SEQUENCE else logps - _load(old_ptr, at, counted)
        ratios = tl.where(counted, tl.exp(_saturated(x, LIMIT)), 1.0)
        a = _load(advantages_ptr, at if PER_TOKEN else at * 0 + s, counted)
        high, low = (ratios > ceiling) & (a > 0), (ratios < floor) & (a < 0)
        losses = -tl.where(high, ceiling, tl.where(low, floor, ratios)) * a
        # d loss / d log ratio; the backward distributes a sequence's over its tokens
        slopes = tl.where(high | low | (tl.abs(x) > LIMIT), 0.0, -ratios * a)
        if SEQUENCE:
            slopes /= n
        kl = tl.zeros([BLOCK], tl.float64)
        if reference_ptr is not None:
            kl, kl_slopes = _kl_and_slope(logps - _load(reference_ptr, at, counted), KL, LIMIT)
            losses += kl_coef * kl
            if SEQUENCE:
                tl.store(kl_slopes_ptr + at, (kl_coef * kl_slopes).to(tl.float32), mask=at < end)
            else:
                slopes += kl_coef * kl_slopes
        if entropies_ptr is not None:
            losses -= entropy_coef * _load(entropies_ptr, at, counted)
        tl.store(losses_ptr + at, losses.to(tl.float32), mask=at < end)
        tl.store(ratios_ptr + at, ratios.to(tl.float32), mask=at < end)
        tl.store(clipped_ptr + at, (high | low).to(tl.uint8), mask=at < end)
        tl.store(kl_ptr + at, kl.to(tl.float32), mask=at < end)
        tl.store(slopes_ptr + at, slopes.to(tl.float32), mask=at < end)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    upstream_ptr, upstream_stride, slopes_ptr, kl_slopes_ptr, cu_seqlens_ptr, mask_ptr, g_logps_ptr, g_entropies_ptr,
    entropy_coef: tl.float64, SEQUENCE: tl.constexpr, BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    start, end = tl.load(cu_seqlens_ptr + s).to(tl.int64), tl.load(cu_seqlens_ptr + s + 1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    if SEQUENCE:
        for first in range(start, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            counted = _counted(mask_ptr, at, end)
            total += _load(upstream_ptr, at * upstream_stride, counted) * _load(slopes_ptr, at, counted)
        total = tl.zeros([BLOCK], tl.float64) + tl.sum(total)
    for first in range(start + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        counted = _counted(mask_ptr, at, end)
        upstream = _load(upstream_ptr, at * upstream_stride, counted)
        g = total if SEQUENCE else upstream * _load(slopes_ptr, at, counted)
        if kl_slopes_ptr is not None:
            g += upstream * _load(kl_slopes_ptr, at, counted)
        tl.store(g_logps_ptr + at, tl.where(counted, g, 0.0).to(tl.float32), mask=at < end)
        if g_entropies_ptr is not None:
            tl.store(g_entropies_ptr + at, (-entropy_coef * upstream).to(tl.float32), mask=at < end)
# fmt: on


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        """Take the arguments of _eager."""
        per_token, options = args[3].shape == args[0].shape, args[-1]
        tensors: list[Any] = [None if t is None else t.contiguous() for t in args[:-1]]
        logps, *given, mask = tensors
        entropies, _, _, reference_logps, cu_seqlens = given
        mask = None if mask is None else mask.view(torch.uint8)
        losses, ratios, kl, slopes = (torch.empty_like(logps) for _ in range(4))
        clipped = torch.empty_like(logps, dtype=torch.uint8)
        kl_slopes = torch.empty_like(logps) if options.sequence and reference_logps is not None else None
        outputs = (losses, ratios, clipped, kl, slopes, kl_slopes)
        numbers = (float(x) for x in (options.floor, options.ceiling, options.kl_coef, options.entropy_coef))
        flags = {"SEQUENCE": options.sequence, "PER_TOKEN": per_token, "KL": options.kl, "LIMIT": LIMIT}
        if len(logps):
            with launching(logps):
                _forward_kernel[_grid(logps, cu_seqlens)](logps, *given, mask, *outputs, *numbers, **flags, BLOCK=BLOCK)
        ctx.save_for_backward(slopes, kl_slopes, cu_seqlens, mask)
        ctx.options, ctx.has_entropies = options, entropies is not None
        clipped = clipped.view(torch.bool)
        ctx.mark_non_differentiable(ratios, clipped, kl)
        return losses, ratios, clipped, kl

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        slopes, kl_slopes, cu_seqlens, mask = ctx.saved_tensors
        g_logps = torch.empty_like(slopes)
        g_entropies = torch.empty_like(slopes) if ctx.has_entropies else None
        given = (upstream, upstream.stride(0), slopes, kl_slopes, cu_seqlens, mask, g_logps, g_entropies)
        if len(slopes):
            with launching(slopes):
                _backward_kernel[_grid(slopes, cu_seqlens)](
                    *given, float(ctx.options.entropy_coef), SEQUENCE=ctx.options.sequence, BLOCK=BLOCK
                )
        return g_logps, g_entropies, None, None, None, None, None, None


def _grid(tokens: Tensor, cu_seqlens: Tensor) -> tuple[int, int]:
    """Return the grid: completions by the blocks of a completion of average length."""
    n_completions = len(cu_seqlens) - 1
    return n_completions, min(256, triton.cdiv(len(tokens), n_completions * BLOCK))
