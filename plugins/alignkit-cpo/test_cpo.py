"""CPO: conformance, and the loss by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.testing import *
from alignkit.types import Completion, Example
from alignkit_cpo import CPO


class TestCPO(Conformance):
    method = CPO
    configs = ({}, {"beta": 0.4, "alpha": 0.0}, {"label_smoothing": 0.1})

    def expected(self, c, row):
        """2401.08417, the likelihood term averaged over tokens."""
        x = c.beta * (row.chosen.logp - row.rejected.logp)
        prefer = -(1 - c.label_smoothing) * log_sigmoid(x) - c.label_smoothing * log_sigmoid(-x)
        return prefer - c.alpha * row.chosen.mean_logp


def test_a_pair_by_hand():
    """Summed log-probabilities -1 and -3: x = 0.1 * 2; the chosen answer costs 0.5 nats a token."""
    chosen, rejected = (Completion(torch.zeros(n, dtype=torch.int32)) for n in (2, 3))
    says = ScriptedModels({chosen: -0.5, rejected: -1.0}, {})
    bench = Bench(CPO(CPO.Config()), says)
    (batch,) = bench.collect([Example(torch.tensor([1], dtype=torch.int32), (chosen, rejected))])
    terms = bench.method.loss(batch, says)
    assert terms["cpo"].value.item() == pytest.approx(math.log(1 + math.exp(-0.2)))
    assert terms["nll/chosen"].value.item() == pytest.approx(0.5)
    assert terms["nll/chosen"].coef == 1.0
