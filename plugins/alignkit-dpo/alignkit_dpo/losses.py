"""The losses of a pair, by name: of the margin alone, and of the chosen and the rejected answer each.

c and r are the chosen and the rejected answer's log-ratio policy / reference, D = c - r, s the logistic function, b
`beta`, e label smoothing:

    sigmoid, robust, hinge   see alignkit_kernels.preference_loss, which computes them in one kernel
    exo_pair    KL((s(b D), s(-b D)) || (1 - e, e))                              2402.00856, eq. 16
    nca_pair    -log s(b c) - log s(-b c) / 2 - log s(-b r) / 2                  2402.05369
    sppo_hard   (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2                            2405.00675, eq. 4.7 with P 1 and 0
    apo_zero    s(-b c) + s(b r)                                                 2408.06266, eq. 7
    apo_down    s(b c) + s(-b D)                                                 2408.06266, eq. 8
    cal         -log s(D) + (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2                2412.14516
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid

from alignkit_kernels import preference_loss, sequence_sum

LossType = Literal["sigmoid", "robust", "hinge", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "cal"]
SMOOTHED = frozenset({"sigmoid", "robust", "exo_pair"})
OF_MARGIN = frozenset({"hinge", *SMOOTHED})


def pair_losses(ratios_C: Tensor, cu_seqlens: Tensor, kind: LossType, beta: float, smoothing: float) -> Tensor:
    """Return one loss for each pair, [E], from weighted log-ratios of tokens, [C]; chosen and rejected alternate."""
    if kind in _OF_BOTH:
        h_S = sequence_sum(ratios_C, cu_seqlens)
        return _OF_BOTH[kind](h_S[0::2], h_S[1::2], beta, smoothing)
    smoothing = smoothing if kind in SMOOTHED else 0.0
    return preference_loss(ratios_C, None, cu_seqlens, kind, beta=beta, label_smoothing=smoothing).losses  # type: ignore[arg-type]


def _exo_pair(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    x = beta * (c - r)
    right = sigmoid(x) * (logsigmoid(x) - math.log1p(-smoothing))
    return right + sigmoid(-x) * (logsigmoid(-x) - math.log(smoothing))


def _nca_pair(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    return -logsigmoid(beta * c) - (logsigmoid(-beta * c) + logsigmoid(-beta * r)) / 2


def _sppo_hard(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    return (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2


def _apo_zero(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    return sigmoid(-beta * c) + sigmoid(beta * r)


def _apo_down(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    return sigmoid(beta * c) + sigmoid(-beta * (c - r))


def _cal(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    return -logsigmoid(c - r) + _sppo_hard(c, r, beta, smoothing)


_OF_BOTH: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "exo_pair": _exo_pair, "nca_pair": _nca_pair, "sppo_hard": _sppo_hard, "apo_zero": _apo_zero,
    "apo_down": _apo_down, "cal": _cal,
}  # fmt: skip
