"""BCO: conformance, its loss by hand in float64, and the means of its shift over steps, killed and resumed."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.testing import *
from alignkit.testing.byhand import log_sigmoid
from alignkit.types import Completion, Example
from alignkit_kto import BCO


class TestBCO(Conformance):
    method = BCO
    configs = ({}, {"beta": 0.5, "decay": 0.0}, {"desirable_weight": 1.5, "undesirable_weight": 0.5})

    def expected(self, c, row):
        """2404.04656 eq. 10, in the first step, whose shift is 0."""
        if row.example.numbers["desirable"]:
            return -c.desirable_weight * log_sigmoid(c.beta * row.only.h)
        return -c.undesirable_weight * log_sigmoid(-c.beta * row.only.h)


def thumbs(*labels):
    """Return one example for each label."""
    return [
        Example(
            torch.tensor([i], dtype=torch.int32),
            (Completion(torch.tensor([10 + i], dtype=torch.int32)),),
            {"desirable": float(good)},
            i + 1,
        )
        for i, good in enumerate(labels)
    ]


def stepped(bench, examples, h):
    """Return the terms of a step whose log-ratios are h, after which the method has moved its means."""
    completions = [e.completions[0] for e in examples]
    bench.models = ScriptedModels(dict(zip(completions, h, strict=True)), dict.fromkeys(completions, 0.0))
    (batch,) = bench.collect(examples)
    terms = bench.method.loss(batch, bench.models)
    metrics = {}
    for name, term in terms.items():
        counted = batch[term.over] if term.over in batch else torch.ones(len(batch), dtype=torch.bool)
        if counted.any():
            metrics[name] = float(term.value[counted].detach().mean())
    bench.method.after_update(bench.context(examples), metrics)
    return terms


def test_the_shift_is_half_of_both_moving_means():
    """beta 0.5, decay 0.75: after h = 4, 2 | -1 the means are 0.25 * 1.5 and 0.25 * -0.5, so d = 0.125."""
    bench = Bench(BCO(BCO.Config(beta=0.5, decay=0.75)), ScriptedModels({}, {}))
    first = stepped(bench, thumbs(1, 1, 0), [4.0, 2.0, -1.0])
    assert first["shift"].value.tolist() == [0.0] * 3
    assert first["bco"].value.tolist() == pytest.approx([-log_sigmoid(2), -log_sigmoid(1), -log_sigmoid(0.5)])
    assert bench.method.state_dict() == pytest.approx({"chosen": 0.375, "rejected": -0.125})
    second = stepped(bench, thumbs(1), [2.0])
    assert second["bco"].value.tolist() == pytest.approx([-log_sigmoid(1 - 0.125)])
    # the second step has no bad answer: that mean stays
    assert bench.method.state_dict() == pytest.approx({"chosen": 0.75 * 0.375 + 0.25, "rejected": -0.125})


def test_a_step_that_is_not_finite_leaves_the_means():
    method = BCO(BCO.Config())
    method.after_update(None, {"rewards/chosen": math.nan, "rewards/rejected": math.inf})
    assert method.state_dict() == {"chosen": 0.0, "rejected": 0.0}


def test_the_metrics_of_each_kind():
    bench = Bench(BCO(BCO.Config(beta=0.5)), ScriptedModels({}, {}))
    terms = stepped(bench, thumbs(1, 0), [1.0, 1.0])
    assert terms["rewards/margin"].value.tolist() == [0.5, -0.5]
    assert terms["rewards/accuracy"].value.tolist() == [1.0, 0.0]
    assert (terms["rewards/chosen"].over, terms["rewards/rejected"].over) == ("desirable", "undesirable")
    assert terms["rewards/chosen"].value.tolist() == [0.5, 0.5]
