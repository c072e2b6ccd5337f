"""The results of a case in float64, in all rows or some, and the error of a contender against them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alignkit_kernels.bench.cases import Case, Contender, Inputs
from alignkit_kernels.bench.contenders import dpo_from_logps, eager

ROWS = 128  # of hidden and weight whose gradients are checked: in float64 all rows would take longer than the rest
COLUMNS = 4096  # of the vocabulary at a time


class Exact(NamedTuple):
    """float64 values of a result in its rows `at` (None: all)."""

    values: Tensor
    at: Tensor | None = None


class Error(NamedTuple):
    """relative: the norm of the difference over the norm of the exact values; largest: absolute."""

    relative: float
    largest: float


def results(case: Case, contender: Contender, inputs: Inputs) -> dict[str, Tensor]:
    """Run the contender: its outputs, and the gradients of the wanted inputs as d_NAME."""
    with torch.set_grad_enabled(bool(case.wanted)):
        out = contender(inputs)
    outs = out if isinstance(out, tuple) else (out,)
    named = {f"out{i}" if i else "out": o.detach() for i, o in enumerate(outs)}
    if case.wanted:
        wanted = [inputs[name] for name in case.wanted]
        grads = torch.autograd.grad(outs[0], wanted, inputs["upstream"].to(outs[0].dtype))
        named |= {f"d_{name}": grad for name, grad in zip(case.wanted, grads, strict=True)}
    return named


def errors(got: dict[str, Tensor], exact: dict[str, Exact]) -> dict[str, Error]:
    """Return the error of each result: infinite when it is not finite or has the wrong shape."""
    found = {}
    for name, (values, at) in exact.items():
        mine = got[name] if at is None else got[name][at]
        if mine.shape != values.shape:
            found[name] = Error(float("inf"), float("inf"))
            continue
        difference = mine.double() - values
        relative = float(difference.norm() / values.norm())
        largest = float(difference.abs().max())
        fine = relative == relative
        found[name] = Error(relative, largest) if fine else Error(float("inf"), float("inf"))
    return found


def exact_results(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Compute a case in float64."""
    with torch.no_grad():
        if case.path:
            return _linear(inputs, inputs["upstream"], case.wanted)
        if case.name == "linear_dpo":
            return _dpo(case, inputs)
    if case.name == "selective_logps":
        at = torch.arange(0, case.sizes["N"], max(1, case.sizes["N"] // ROWS), device=case.device)
        some = {name: t.detach()[at] for name, t in inputs.items()}
        return {name: Exact(e.values, at) for name, e in _doubled(case, some).items()}
    return _doubled(case, inputs)


def _doubled(case: Case, inputs: Inputs) -> dict[str, Exact]:
    double = {k: t.detach().double() if t.is_floating_point() else t for k, t in inputs.items()}
    for name in case.wanted:
        double[name].requires_grad_()
    return {name: Exact(values) for name, values in results(case, eager(case), double).items()}


def _linear(x: Inputs, upstream: Tensor, wanted: tuple[str, ...]) -> dict[str, Exact]:
    hidden, weight, targets = x["hidden"].detach().double(), x["weight"].detach(), x["targets"]
    n, v = len(hidden), len(weight)
    blocks = [slice(i, min(i + COLUMNS, v)) for i in range(0, v, COLUMNS)]
    lse = torch.full((n,), -torch.inf, dtype=torch.float64, device=hidden.device)
    for block in blocks:
        lse = torch.logaddexp(lse, (hidden @ weight[block].double().T).logsumexp(1))
    of_targets = weight[targets].double()
    found = {"out": Exact((hidden * of_targets).sum(1) - lse)}
    g = upstream.double()
    if "hidden" in wanted:
        at = torch.arange(0, n, max(1, n // ROWS), device=hidden.device)
        mean = torch.zeros_like(hidden[at])
        for block in blocks:
            part = weight[block].double()
            mean += torch.exp(hidden[at] @ part.T - lse[at, None]) @ part
        found["d_hidden"] = Exact(g[at, None] * (of_targets[at] - mean), at)
    if "weight" in wanted:
        some = torch.arange(0, v, max(1, v // ROWS), device=hidden.device)
        at = torch.cat([some, targets[:ROWS]]).unique()
        dz = -g[:, None] * torch.exp(hidden @ weight[at].double().T - lse[:, None])
        dz += g[:, None] * (targets[:, None] == at)
        found["d_weight"] = Exact(dz.T @ hidden, at)
    return found


def _dpo(case: Case, x: Inputs) -> dict[str, Exact]:
    none = torch.zeros(len(x["hidden"]), device=case.device)
    logps = _linear(x, none, ())["out"].values.requires_grad_()
    reference = _linear({**x, "hidden": x["reference"]}, none, ())["out"].values
    with torch.enable_grad():
        loss = dpo_from_logps(logps, reference, case.sizes["S"])
        (g,) = torch.autograd.grad(loss, logps)
    return {"out": Exact(loss.detach()), "d_hidden": _linear(x, g, case.wanted)["d_hidden"]}
