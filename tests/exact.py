"""Is a float32 result right but for rounding? Judged against float64, so the bound is no processor's.

Two float32 computations of the same sums round in different orders, and their errors are of one size. So the error of
the one under test may be a few times that of the model's own forward, both measured against a float64 copy, and not
more. A constant bound would hold the rounding of the processor that it was chosen on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FACTOR = (
    8.0  # of the largest error of the model's own forward; a wrong mask or position is wrong by a thousand times it
)
ULPS = 16.0  # of the largest value, where the model's own forward happens to be exact


def exact_copy(model: Any) -> Any:
    """A float64 copy of the model. transformers still computes some norms and softmaxes in float32."""
    exact = copy.deepcopy(model).double()
    if getattr(getattr(exact, "config", None), "_experts_implementation", None) == "grouped_mm":
        exact.set_experts_implementation("eager")  # torch has no grouped product of float64
    return exact


def assert_rounding_only(got: Tensor, own: Tensor, exact: Tensor, what: str = "") -> None:
    """Fail where `got` is further from `exact` than rounding explains.

    got: the float32 result under test. own: the same numbers by the model's own float32 forward. exact: by its float64
    copy. All of one shape.
    """
    assert got.shape == own.shape == exact.shape, what
    exact = exact.detach().double()
    error, floor = ((x.detach().double() - exact).abs().max().item() for x in (got, own))
    allowed = FACTOR * floor + ULPS * torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error <= allowed, (
        f"{what}: off by {error:.3g}; the model's own forward by {floor:.3g}, allowed {allowed:.3g}"
    )


def gradients(model: Any, loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """The gradient of `loss(model)` with respect to every parameter that has one, by name; the model's are cleared."""
    model.zero_grad()
    loss(model).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
