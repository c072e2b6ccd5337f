"""IPO in both forms: conformance, and the loss by hand in float64."""

from __future__ import annotations

import pytest
import torch

from alignkit.testing import *
from alignkit.types import Completion, Example
from alignkit_ipo import IPO


class TestIPO(Conformance):
    method = IPO
    configs = ({}, {"tau": 0.5}, {"sum": True})

    def expected(self, c, row):
        """2310.12036 eq. 17, over averaged log-ratios unless `sum` is set."""
        chosen, rejected = (a.h if c.sum else a.h / a.n for a in row.answers)
        return (chosen - rejected - 1 / (2 * c.tau)) ** 2


@pytest.mark.parametrize(("summed", "gap"), [(False, 0.75 - -0.5), (True, 1.5 - -0.5)])
def test_a_pair_by_hand(summed, gap):
    """Two tokens that gained 0.75 nats each against one that lost 0.5; the target is 1 / (2 * 0.1) = 5."""
    chosen, rejected = (Completion(torch.zeros(n, dtype=torch.int32)) for n in (2, 1))
    says = ScriptedModels({chosen: -0.25, rejected: -1.5}, {chosen: -1.0, rejected: -1.0})
    bench = Bench(IPO(IPO.Config(sum=summed)), says)
    (batch,) = bench.collect([Example(torch.tensor([1], dtype=torch.int32), (chosen, rejected))])
    terms = bench.method.loss(batch, says)
    assert terms["ipo"].value.item() == pytest.approx((gap - 5) ** 2)
    assert terms["rewards/margin"].value.item() == pytest.approx(0.1 * gap)


def test_the_target_gap_is_a_minimum():
    """Unlike DPO, IPO pulls back a pair whose gap is beyond 1 / (2 tau)."""
    chosen, rejected = (Completion(torch.zeros(1, dtype=torch.int32)) for _ in range(2))
    pair = Example(torch.tensor([1], dtype=torch.int32), (chosen, rejected))
    pulls = {}
    for gap in (4.0, 5.0, 6.0):
        says = ScriptedModels({chosen: -1.0, rejected: -1.0 - gap}, {chosen: -1.0, rejected: -1.0})
        bench = Bench(IPO(IPO.Config()), says)
        (batch,) = bench.collect([pair])
        bench.method.loss(batch, says)["ipo"].value.sum().backward()
        pulls[gap] = says.leaves[-1].grad[0].item()
    assert pulls == pytest.approx({4.0: -2.0, 5.0: 0.0, 6.0: 2.0})
