"""ORPO: conformance, the loss by hand in float64, and probabilities near 1."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.testing import *
from alignkit.types import Completion, Example
from alignkit_orpo import ORPO


def log_odds(mean_logp):
    p = math.exp(mean_logp)
    return math.log(p / (1 - p))


class TestORPO(Conformance):
    method = ORPO
    configs = ({}, {"lambda_": 1.5}, {"lambda_": 0.0})

    def expected(self, c, row):
        """2403.07691 eq. 6 and 7, odds from the probability averaged over tokens (eq. 3 and 4)."""
        gap = log_odds(row.chosen.mean_logp) - log_odds(row.rejected.mean_logp)
        return -row.chosen.mean_logp - c.lambda_ * log_sigmoid(gap)


def terms_of(policy_chosen, policy_rejected):
    chosen, rejected = (Completion(torch.zeros(n, dtype=torch.int32)) for n in (3, 2))
    says = ScriptedModels({chosen: policy_chosen, rejected: policy_rejected}, {})
    bench = Bench(ORPO(ORPO.Config()), says)
    (batch,) = bench.collect([Example(torch.tensor([1], dtype=torch.int32), (chosen, rejected))])
    return bench.method.loss(batch, says), says


def test_a_pair_by_hand():
    """Probability 0.8 against 0.5 a token: odds 4 against 1, so the term is -log(4 / 5)."""
    terms, _ = terms_of(math.log(0.8), math.log(0.5))
    assert terms["odds_ratio"].value.item() == pytest.approx(-math.log(0.8))
    assert terms["odds_ratio"].coef == 0.1
    assert terms["nll/chosen"].value.item() == pytest.approx(-math.log(0.8))


@pytest.mark.parametrize("chosen", [0.0, -1e-9, -1e-6, -1e-3, -50.0])
@pytest.mark.parametrize("rejected", [0.0, -1e-9, -1e-6, -1e-3, -50.0])
def test_probability_near_one(chosen, rejected):
    terms, says = terms_of(chosen, rejected)
    loss = terms["odds_ratio"].value.sum() + terms["nll/chosen"].value.sum()
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(says.leaves[-1].grad.isfinite().all())


@pytest.mark.parametrize("mean_logp", [-1e-5, -1e-3, -0.1, -0.6931, -0.6932, -5.0])
def test_log_odds_keep_their_digits(mean_logp):
    """log(p / (1 - p)) in float32 equals float64's, where a naive log(1 - exp(logp)) has lost half of its digits."""
    terms, _ = terms_of(math.log(0.5), mean_logp)  # the chosen answer's log-odds are 0
    exact = mean_logp - math.log(-math.expm1(mean_logp))
    assert terms["odds_ratio"].value.item() == pytest.approx(-log_sigmoid(-exact), rel=1e-5)
