"""REINFORCE++: conformance, and its advantages by hand in float64."""

import math
import statistics

import pytest
import torch

from alignkit.testing import *
from alignkit.testing.bench import Bench
from alignkit_grpo import Reinforce
from alignkit_grpo.reinforce import above_others


def returns_by_hand(config, row):
    """Return a list for each answer: what each of its tokens gets, before the step's normalisation."""
    if config.baseline == "group":
        mean = statistics.fmean(a.reward for a in row.answers)
        return [[a.reward - mean] * a.n for a in row.answers]
    found = []
    for a in row.answers:
        kl = [p - q for p, q in zip(a.policy, a.reference, strict=True)]
        found.append([a.reward - config.beta * math.fsum(kl[t:]) for t in range(a.n)])
    return found


class TestReinforce(Conformance):
    method = Reinforce
    configs = (
        {},
        {"beta": 0.0},
        {"group_size": 3, "beta": 0.5},
        {"group_size": 3, "baseline": "group", "beta": 0.2},
        {"group_size": 2, "baseline": "group", "beta": 0.0},
    )

    def expected_step(self, config, rows, bench):
        """2501.03262: normalised over all tokens; at ratio 1 the surrogate's value is -A a token, averaged."""
        returns = [value for row in rows for answer in returns_by_hand(config, row) for value in answer]
        mean, deviation = statistics.fmean(returns), statistics.stdev(returns)
        losses = [-(value - mean) / (deviation + 1e-4) for value in returns]
        if config.baseline == "group":
            answers = [a for row in rows for a in row.answers]
            ratios = [p - q for a in answers for p, q in zip(a.policy, a.reference, strict=True)]
            losses = [loss + config.beta * r * r / 2 for loss, r in zip(losses, ratios, strict=True)]
        return statistics.fmean(losses)


def test_the_advantages_of_a_step_have_mean_0_and_deviation_1():
    bench = Bench(Reinforce(Reinforce.Config(group_size=3, beta=0.5)))
    examples = TestReinforce().examples()
    (batch,) = bench.collect(examples)
    values = batch["advantages"].double()
    assert float(values.mean()) == pytest.approx(0, abs=1e-6)
    assert float(values.std()) == pytest.approx(1, abs=1e-3)
    # equal up to the step's one mean and deviation, so differences have one ratio
    by_hand = [
        v for row in bench.score(batch.examples) for answer in returns_by_hand(bench.method.config, row) for v in answer
    ]
    mean, deviation = statistics.fmean(by_hand), statistics.stdev(by_hand) + 1e-4
    assert values.tolist() == pytest.approx([(v - mean) / deviation for v in by_hand], abs=1e-5)


def test_what_no_reward_applies_to_is_nobodys_baseline():
    rewards = torch.tensor([1.0, 3.0, 0.0, 5.0, 0.0, 0.0])
    scored = torch.tensor([True, True, False, True, False, False])
    advantages, counted = above_others(rewards, scored, 3)
    assert advantages.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert counted.tolist() == [True, True, False, False, False, False]


def test_equal_rewards_have_no_advantage_by_rounding():
    for n in (3, 6, 7, 8):
        for value in (100.1, 0.7, 1e-3):
            advantages, counted = above_others(torch.full((2 * n,), value), torch.ones(2 * n, dtype=torch.bool), n)
            assert advantages.tolist() == [0.0] * 2 * n
            assert counted.all()


def test_a_group_needs_two():
    with pytest.raises(ValueError, match="baseline: group compares the completions of a prompt; set group_size to 2"):
        Reinforce.Config(baseline="group")
