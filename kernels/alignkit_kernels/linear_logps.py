"""Log-probabilities of chosen tokens from hidden states and the weight of the language-model head, without the logits.

    z = softcap(scale * (hidden @ weight.T + bias)) / temperature,   logp_n = z_n[t_n] - lse(z_n)

Four exact paths, chosen by what needs a gradient; G is one product with the head, 2 N H V FLOP:

    1  frozen head           2G   the upstream gradient is one number per token, so the forward computes
                                  d(sum of logps) / d hidden, a block of rows at a time; the backward only scales it
    2  trained head          3G   the logits are kept and overwritten by their own gradient
    3  ... and low memory    4G   the backward recomputes the logits, a slice of the vocabulary at a time, except those
                                  that fit the budget, which are kept as in 2
    4  no gradient           1G   a slice of the vocabulary at a time
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignkit_kernels.linear_lse import fold_product, fuses
from alignkit_kernels.linear_plan import Plan, plan_linear_logps
from alignkit_kernels.row_stats import RowStats
from alignkit_kernels.transform import Transform, accumulator, check_targets


class LinearLogps:
    """`linear_logps(...)`, a function, and `linear_logps.plan(...)`, the plan of a call; see `__call__` for both."""

    __name__ = "linear_logps"

    def __reduce__(self) -> str:
        return "linear_logps"

    def __repr__(self) -> str:
        return "<function linear_logps>"

    @overload
    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, softcap: float | None = None,
        scale: float = 1.0, temperature: float = 1.0, entropy: Literal[False] = False,
        memory_budget: float | None = None,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, softcap: float | None = None,
        scale: float = 1.0, temperature: float = 1.0, *, entropy: Literal[True], memory_budget: float | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, softcap: float | None = None,
        scale: float = 1.0, temperature: float = 1.0, entropy: bool = False, memory_budget: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        softcap: float | None = None,
        scale: float = 1.0,
        temperature: float = 1.0,
        entropy: bool = False,
        memory_budget: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the log-probability of each target under softmax(hidden @ weight.T), with `entropy` the entropy too.

        hidden: [N, H], only the positions that predict a target. weight: [V, H]. targets: int64 [N]. bias: [V].
        softcap: c in c * tanh(z / c), applied after `scale`. temperature: above 0, divides last.
        memory_budget: bytes of logits that may be kept for the backward when the head is trained (default 1 GiB).
        Returns float32 [N] in nats (float64 for float64 inputs), or a pair of them with `entropy`.
        Raises ValueError on shapes or types that do not match.
        """
        transform = Transform(softcap, scale, temperature).checked()
        hidden, weight, bias = _checked(hidden, weight, targets, bias)
        of_hidden, of_weight, of_bias = (_learns(t) for t in (hidden, weight, bias))
        sizes = (len(hidden), hidden.shape[1], len(weight), hidden.dtype)
        plan = self.plan(*sizes, of_hidden, of_weight, of_bias, hidden.device.type, memory_budget)
        with torch.autocast(hidden.device.type, enabled=False):
            if plan.path == 4:
                stats = _fold_all(hidden, weight, bias, targets, transform, entropy, plan.chunk)
                logps, entropies = stats.logps(), stats.entropies()
            else:
                function = _FrozenHead if plan.path == 1 else _TrainedHead
                logps, entropies = function.apply(hidden, weight, bias, targets, _How(transform, entropy, plan))
        return logps if entropies is None else (logps, entropies)

    plan = staticmethod(plan_linear_logps)


linear_logps = LinearLogps()


def _learns(leaf: Tensor | None) -> bool:
    return leaf is not None and leaf.requires_grad and torch.is_grad_enabled()


def _checked(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [N, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"expected one target per row of hidden, got {list(targets.shape)} for {list(hidden.shape)}")
    check_targets(hidden, targets)
    if weight.device != hidden.device:
        raise ValueError(f"weight is on '{weight.device}', but hidden is on '{hidden.device}'")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected a bias of {list(weight.shape[:1])}, got {list(bias.shape)}")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        given = f"{hidden.dtype}, {weight.dtype}" + (f" and {bias.dtype}" if bias is not None else "")
        raise ValueError(f"hidden, weight and bias differ in type: {given}")
    return hidden, weight, bias


def _pieces(vocabulary: int, kept: int, chunk: int) -> Iterator[slice]:
    if kept:
        yield slice(0, kept)
    for first in range(kept, vocabulary, chunk):
        yield slice(first, min(first + chunk, vocabulary))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, memory: Tensor) -> Tensor:
    """Return hidden @ weight.T + bias, written into the flat `memory`."""
    out = memory[: len(hidden) * len(weight)].view(len(hidden), len(weight))
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)


def _fold_all(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: Transform,
    entropy: bool,
    chunk: int,
    stash: Tensor | None = None,
) -> RowStats:
    """Return the statistics of the rows; `stash` [N, kept] receives the logits of the first columns."""
    stats = RowStats(hidden, targets, len(weight), transform, entropy)
    if stash is None and fuses(hidden, weight):
        fold_product(stats, hidden, weight, bias)
        return stats
    memory = hidden.new_empty(len(hidden) * chunk) if stash is None or stash.shape[1] < len(weight) else None
    for columns in _pieces(len(weight), 0 if stash is None else stash.shape[1], chunk):
        to = stash.view(-1) if stash is not None and columns.start == 0 else memory
        assert to is not None
        stats.fold(_logits(hidden, weight[columns], _part(bias, columns), to), columns.start)
    return stats


def _part(bias: Tensor | None, columns: slice) -> Tensor | None:
    return None if bias is None else bias[columns]


class _How(NamedTuple):
    transform: Transform
    entropy: bool
    plan: Plan


class _FrozenHead(torch.autograd.Function):
    """Path 1: the forward computes unit [N, H] = d(sum of logps) / d hidden."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: _How
    ) -> tuple[Tensor, Tensor | None]:
        transform, entropy, plan = how
        stats = RowStats(hidden, targets, len(weight), transform, entropy)
        unit = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        memory = hidden.new_empty(plan.chunk * len(weight))
        for first in range(0, len(hidden), plan.chunk):
            rows = slice(first, first + plan.chunk)
            logits = _logits(hidden[rows], weight, bias, memory)
            stats.rows(rows).fold_into_unit_gradient(logits)
            torch.mm(logits, weight, out=unit[rows])
        # targets are saved so that autograd notices a change, the others for the entropy's gradient alone
        ctx.save_for_backward(unit, targets, *((hidden, weight, bias) if entropy else ()))
        ctx.stats = stats
        ctx.set_materialize_grads(False)
        return stats.logps(), stats.entropies()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logps: Tensor | None, g_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        unit, _, *head = ctx.saved_tensors
        if g_entropies is None:
            if g_logps is None:
                return (None,) * 5
            return torch.mul(unit, g_logps[:, None], out=torch.empty_like(unit)), *(None,) * 4
        # the entropy's gradient is another vector per token, which few losses need: recompute the logits
        hidden, weight, _ = head
        sizes = (len(hidden), hidden.shape[1], len(weight), hidden.dtype)
        again = plan_linear_logps(*sizes, weight_grad=True, device=hidden.device.type, memory_budget=0)
        with torch.autocast(hidden.device.type, enabled=False):
            return *_backward(ctx, head, None, again.chunk, g_logps, g_entropies), None, None


class _TrainedHead(torch.autograd.Function):
    """Paths 2 and 3: the first `plan.kept` columns of the logits are kept for the backward, the others recomputed."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: _How
    ) -> tuple[Tensor, Tensor | None]:
        transform, entropy, plan = how
        stash = hidden.new_empty(len(hidden), plan.kept) if plan.kept else None
        ctx.stats = _fold_all(hidden, weight, bias, targets, transform, entropy, plan.chunk, stash)
        ctx.save_for_backward(targets, hidden, weight, bias)
        ctx.stash, ctx.plan = stash, plan
        ctx.set_materialize_grads(False)
        return ctx.stats.logps(), ctx.stats.entropies()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logps: Tensor | None, g_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        _, *head = ctx.saved_tensors
        # the gradient overwrites the logits, so a second backward over the same graph recomputes all of them
        stash, ctx.stash = ctx.stash, None
        with torch.autocast(head[0].device.type, enabled=False):
            return *_backward(ctx, head, stash, ctx.plan.chunk, g_logps, g_entropies), None, None


def _backward(
    ctx: Any, head: Any, stash: Tensor | None, chunk: int, g_logps: Tensor | None, g_entropies: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Go through the vocabulary with all N tokens: write each slice of d weight once, sum d hidden in float32."""
    hidden, weight, bias = head
    of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
    kept = 0 if stash is None else stash.shape[1]
    d_hidden = None
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if of_weight else None
    d_bias = torch.empty_like(bias) if bias is not None and of_bias else None
    memory = hidden.new_empty(len(hidden) * min(chunk, len(weight) - kept))
    for columns in _pieces(len(weight), kept, chunk):
        if stash is not None and columns.start == 0:
            dz = stash
        else:
            dz = _logits(hidden, weight[columns], _part(bias, columns), memory)
        ctx.stats.grad(dz, dz, g_logps, g_entropies, columns.start)
        if d_weight is not None:
            torch.mm(dz.T, hidden, out=d_weight[columns])
        if d_bias is not None:
            d_bias[columns] = dz.sum(0, dtype=accumulator(dz.dtype))
        if of_hidden:
            d_hidden = _add_product(d_hidden, dz, weight[columns], alone=dz.shape[1] == len(weight))
    return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias


def _add_product(total: Tensor | None, dz: Tensor, weight: Tensor, alone: bool) -> Tensor:
    if alone:
        return dz @ weight
    if total is None:
        total = torch.zeros(len(dz), weight.shape[1], dtype=accumulator(dz.dtype), device=dz.device)
    if dz.dtype == total.dtype:
        return torch.addmm(total, dz, weight, out=total)
    if dz.is_cuda and torch.version.hip is None:  # into new memory: with out= it has refused valid arguments
        return torch.addmm(total, dz, weight, out_dtype=total.dtype)
    return total.add_(dz @ weight)
