"""KTO: conformance, the loss by hand in float64, and the baseline z: clamped, deranged, without a gradient."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignkit.errors import ConfigError
from alignkit.testing import *
from alignkit.types import Completion, Example
from alignkit_kto import KTO, MAX_WEIGHT, mismatched, weights


class TestKTO(Conformance):
    method = KTO
    configs = ({}, {"beta": 0.5}, {"desirable_weight": 1.33, "undesirable_weight": 0.7})

    def expected_step(self, c, rows, bench):
        """2402.01306; the pairing is the plugin's (its properties are tested below), the rest is by hand."""
        examples = [row.example for row in rows]
        lent = bench.score(mismatched(examples, bench.context(examples).generator))
        z = max(0.0, sum(row.only.h for row in lent) / len(lent))
        losses = [
            c.desirable_weight * (1 - sigmoid(c.beta * (row.only.h - z)))
            if row.example.numbers["desirable"]
            else c.undesirable_weight * (1 - sigmoid(c.beta * (z - row.only.h)))
            for row in rows
        ]
        return sum(losses) / len(losses)


def thumbs(*prompts):
    """Return one example per prompt, each with its own completion."""
    return [
        Example(
            torch.tensor([p], dtype=torch.int32),
            (Completion(torch.tensor([10 + i], dtype=torch.int32)),),
            {"desirable": float(i % 2)},
            i + 1,
        )
        for i, p in enumerate(prompts)
    ]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def terms_of(says_policy, says_reference, examples, **config):
    completions = [e.completions[0] for e in examples]
    policy, reference = (dict(zip(completions, says, strict=True)) for says in (says_policy, says_reference))
    models = ScriptedModels(policy, reference)
    bench = Bench(KTO(KTO.Config(**config)), models)
    (batch,) = bench.collect(examples)
    models.leaves.clear()
    return bench.method.loss(batch, models), batch, models


def test_two_rows_by_hand():
    """h = 2 (undesirable) and h = 1 (desirable): each lends to the other, z = 1.5, and the loss is s(0.05) twice."""
    examples = thumbs(1, 2)
    terms, batch, _ = terms_of([-1.0, -2.0], [-3.0, -3.0], examples, beta=0.1)
    assert batch["baseline"].tolist() == [1.5, 1.5]
    assert batch["desirable"].tolist() == [False, True]
    assert terms["kto"].value.tolist() == pytest.approx([1 / (1 + math.exp(-0.05))] * 2)
    assert terms["rewards/margin"].value.tolist() == pytest.approx([-0.05, -0.05])
    assert terms["rewards/accuracy"].value.tolist() == [0.0, 0.0]
    assert terms["logratios/chosen"].value.tolist() == terms["logratios/rejected"].value.tolist() == [2.0, 1.0]
    assert (terms["logratios/chosen"].over, terms["logratios/rejected"].over) == ("desirable", "undesirable")


def test_baseline_is_clamped_at_zero():
    terms, batch, _ = terms_of([-3.0, -4.0], [-1.0, -1.0], thumbs(1, 2), beta=1.0)
    assert batch["baseline"].tolist() == [0.0, 0.0]
    assert terms["kto"].value.tolist() == pytest.approx([1 - 1 / (1 + math.exp(-2)), 1 - 1 / (1 + math.exp(3))])


def test_no_gradient_flows_through_the_baseline():
    """The gradient is that of h alone: -w b s'(b (h - z)) where desirable, the opposite where not."""
    terms, batch, models = terms_of([-1.0, -2.0], [-3.0, -3.0], thumbs(1, 2), beta=0.1)
    assert not batch["baseline"].requires_grad
    terms["kto"].value.sum().backward()
    (leaf,) = models.leaves
    slope = 0.1 * math.exp(-0.05) / (1 + math.exp(-0.05)) ** 2
    assert leaf.grad.tolist() == pytest.approx([slope, -slope])


@given(prompts=st.lists(st.integers(0, 4), min_size=2, max_size=24), seed=st.integers(0, 99))
def test_no_example_gets_its_own_completion(prompts, seed):
    """Every completion is lent once, none to its own example, and none to its own prompt where that is possible."""
    examples = thumbs(*prompts)
    lent = mismatched(examples, generator(seed))
    for own, other in zip(examples, lent, strict=True):
        assert torch.equal(own.prompt, other.prompt)
        assert own.completions[0] is not other.completions[0]
    assert {id(e.completions[0]) for e in lent} == {id(e.completions[0]) for e in examples}
    prompt_of = {e.completions[0]: int(e.prompt) for e in examples}
    met_own_prompt = sum(prompt_of[e.completions[0]] == int(e.prompt) for e in lent)
    largest = Counter(prompts).most_common(1)[0][1]
    # by pigeonhole: the largest group can place only so many completions outside itself
    unavoidable = max(0, 2 * largest - len(prompts))
    assert met_own_prompt == unavoidable


def test_pairing_is_drawn_anew():
    examples = thumbs(*range(12))
    drawn = {tuple(int(e.completions[0].tokens) for e in mismatched(examples, generator(s))) for s in range(8)}
    assert len(drawn) == 8


@pytest.mark.parametrize("ranks", [2, 3])
def test_baseline_is_the_same_on_all_ranks(ranks):
    bench = Bench(KTO(KTO.Config()))
    examples = tiny_examples("unpaired", 7)
    (whole,) = bench.collect(examples)
    parts = bench.collect(examples, Cut(ranks=ranks))
    want = whole["baseline"][0].item()
    assert want > 0
    for part in parts:
        assert part["baseline"].tolist() == pytest.approx([want] * len(part), rel=1e-12)


def test_a_batch_of_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size 1 is too small"):
        train(KTO, tmp_path, batch_size=1)


def test_pairs_become_two_rows(tmp_path):
    """Rows with chosen and rejected serve KTO too: one desirable example, and one undesirable."""
    result = train(KTO, tmp_path, data=tiny_rows("pairs", 4), batch_size=8, max_steps=1)
    assert math.isfinite(result.metrics["rewards/chosen"])
    assert math.isfinite(result.metrics["rewards/rejected"])


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_advised_weights_balance_the_two_kinds_as_far_as_the_largest_weight_allows(good, bad):
    settings = {c.name: c.value for c in weights(good, bad)}
    ratio = settings.get("desirable_weight", 1.0) * good / (settings.get("undesirable_weight", 1.0) * bad)
    if max(good, bad) <= MAX_WEIGHT * min(good, bad):
        assert 1 - 1e-9 <= ratio <= 4 / 3 + 1e-9
    else:
        assert list(settings.values()) == [10.0]
    assert all(0 < value <= 10 for value in settings.values())
