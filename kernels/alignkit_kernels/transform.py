"""The transform of an architecture's logits before the softmax: z = softcap(scale * logits) / temperature."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from alignkit_kernels.backend import jit, tl


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which z and sums over the vocabulary are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_targets(values: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless `values` are real numbers and `targets` are ids on the same device."""
    if not values.is_floating_point():
        raise ValueError(f"expected float32, bfloat16, float16 or float64, got {values.dtype}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expected targets of int64 (or int32), got {targets.dtype}")
    if targets.device != values.device:
        raise ValueError(f"targets are on '{targets.device}', but the other tensors are on '{values.device}'")


class Transform(NamedTuple):
    """z = c * tanh(scale * x / c) / temperature, c the soft cap."""

    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0

    def checked(self) -> Transform:
        """Return self. Raises ValueError when it cannot be applied."""
        if any(isinstance(x, Tensor) for x in self):
            raise ValueError("softcap, scale and temperature must be numbers, which get no gradient; got a tensor")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be above 0 or None, got {self.softcap}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, got {self.scale}")
        return self

    @property
    def slope(self) -> float:
        """dz / dlogits without the soft cap."""
        return self.scale / self.temperature

    def apply(self, logits: Tensor) -> Tensor:
        """Return z in the accumulator's type, in new memory."""
        z = logits.to(accumulator(logits.dtype), copy=True)
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z.div_(self.temperature) if self.temperature != 1.0 else z

    def below_top(self, logits: Tensor, top: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return z minus `top` [N], by default the maximum of each row, in new memory, and that maximum."""
        plain = self == Transform()  # then the maximum is subtracted from the logits directly, without computing z
        z = logits if plain else self.apply(logits)
        if top is None:
            top = z.amax(1).to(accumulator(z.dtype))
        base = torch.where(top == -torch.inf, 0.0, top)[:, None]  # a row may hold nothing else
        return (z - base if plain else z.sub_(base)), top

    def bend(self, z_below_top: Tensor, top: Tensor) -> Tensor | None:
        """Return the factor of the slope that the soft cap adds: d tanh = 1 - tanh^2."""
        if self.softcap is None:
            return None
        return (z_below_top + top[:, None]).mul_(self.temperature / self.softcap).square_().neg_().add_(1)


@jit
def transformed(x, scale, softcap, inverse_temperature, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return z of logits x in float32, and the tanh of the soft cap if there is one."""
    y = x.to(tl.float32) * scale
    t = y
    if SOFTCAP:
        y = y / softcap
        e = tl.exp(-2 * tl.abs(y))
        t = (1 - e) / (1 + e)
        t = tl.where(y < 0, -t, t)
        y2 = y * y  # near 0 the quotient would lose precision
        t = tl.where(y2 < 0.01, y * (1 - y2 * (1 / 3 - y2 * (2 / 15 - y2 * (17 / 315)))), t)
        y = t * softcap
    return y * inverse_temperature, t
