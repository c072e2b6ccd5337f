"""Layers that are faster for a few tokens on a CPU, for the time of sampling.

A token's products read every weight once: weights in the memory layout that oneDNN multiplies fastest, and under
autocast in its 16 bits, which otherwise are made anew for every token. Norms are one call each instead of six.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

Forward = Callable[[Tensor], Tensor]


@contextmanager
def fast_layers(lm: nn.Module) -> Iterator[None]:
    """Inside the block, a model's float32 layers on a CPU compute the same faster; the weights must not change.

    Takes the memory of a second set of the linear layers' weights. Layers of other types than nn.Linear (in 8 bits, for
    example) stay as they are, and so do norms that are found to compute something else.
    """
    changed = list[nn.Module]()
    try:
        for module in lm.modules():
            if found := _faster(module):
                module.forward = found
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward  # the class's own is found again


def _faster(module: nn.Module) -> Forward | None:
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype != torch.float32 or weight.device.type != "cpu" or "forward" in vars(module):
        return None
    if type(module) is nn.Linear and torch.backends.mkldnn.is_available() and weight.numel():
        return _product(weight.detach(), module.bias)
    eps = getattr(module, "variance_epsilon", None)
    if isinstance(eps, float) and weight.dim() == 1:
        return _norm(module, weight.detach(), eps)
    return None


def _product(weight: Tensor, bias: Tensor | None) -> Forward:
    # what torch.compile makes of a frozen linear layer; there is no public function for it
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    kept = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), None)
    added = None if bias is None else bias.detach().to(dtype)
    product = torch.ops.mkldnn._linear_pointwise.default

    def forward(inputs: Tensor) -> Tensor:
        return product(inputs.to(dtype), kept, added, "none", [], "")  # type: ignore[no-any-return]

    return forward


@torch.no_grad()
def _norm(module: nn.Module, weight: Tensor, eps: float) -> Forward | None:
    """Return the layer as one call where it is the root mean square norm that its attributes say."""

    def forward(inputs: Tensor) -> Tensor:
        return rms_norm(inputs, weight.shape, weight, eps)

    example = torch.linspace(-2, 3, weight.numel())[None]
    return forward if torch.allclose(module.forward(example), forward(example), rtol=1e-5, atol=1e-6) else None
