"""SimPO: conformance, and the loss by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.testing import *
from alignkit.types import Completion, Example
from alignkit_simpo import SimPO


class TestSimPO(Conformance):
    method = SimPO
    configs = (
        {},
        {"beta": 10.0, "gamma_ratio": 0.3},
        {"gamma_ratio": 0.0, "sft_weight": 0.2},
        {"alpha": 0.4},
        {"alpha": -0.25},
    )

    def expected(self, c, row):
        """2405.14734 eq. 6, with gamma = gamma_ratio * beta; 2501.03884 where there is an alpha."""
        chosen, rejected = (row.chosen.mean_logp, row.rejected.mean_logp)
        if c.alpha:
            chosen, rejected = ((1 - math.exp(m) ** -c.alpha) / c.alpha for m in (chosen, rejected))
        gap = c.beta * (chosen - rejected)
        return -log_sigmoid(gap - c.gamma_ratio * c.beta) - c.sft_weight * row.chosen.mean_logp


def test_gamma_is_a_ratio_to_beta():
    """Average gap 0.75 nats, beta 2, ratio 0.5: x = 2 * 0.75 - 1 = 0.5."""
    chosen, rejected = (Completion(torch.zeros(n, dtype=torch.int32)) for n in (4, 1))
    says = ScriptedModels({chosen: -0.25, rejected: -1.0}, {})
    bench = Bench(SimPO(SimPO.Config()), says)
    (batch,) = bench.collect([Example(torch.tensor([1], dtype=torch.int32), (chosen, rejected))])
    terms = bench.method.loss(batch, says)
    assert terms["simpo"].value.item() == pytest.approx(math.log(1 + math.exp(-0.5)))
    assert terms["rewards/margin"].value.item() == pytest.approx(1.5)


def test_no_sft_term_unless_asked_for():
    bench = Bench(SimPO(SimPO.Config()))
    (batch,) = bench.collect(tiny_examples("pairs"))
    assert {n for n, t in bench.method.loss(batch, bench.models).items() if t.coef} == {"simpo"}
