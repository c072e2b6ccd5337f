"""Online DPO: conformance, which completions are compared, and the loss by hand."""

from __future__ import annotations

import math
from itertools import permutations
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignkit.testing import *
from alignkit.testing.bench import Bench
from alignkit.testing.byhand import log_sigmoid, sigmoid
from alignkit_dpo import OnlineDPO
from alignkit_dpo.online import of_pairs, preferred


def pairs_by_hand(rewards, every):
    """Return (better, worse) of a prompt, by number; None: not scored."""
    known = [(r, i) for i, r in enumerate(rewards) if r is not None]
    found = [(i, j) for (a, i), (b, j) in permutations(known, 2) if a > b]
    if every or not found:
        return found
    best = min(i for r, i in known if r == max(known)[0])
    worst = min(i for r, i in known if r == min(known)[0])
    return [(best, worst)]


class TestOnlineDPO(Conformance):
    method = OnlineDPO
    configs = (
        {},
        {"group_size": 4, "beta": 0.5, "label_smoothing": 0.1},
        {"group_size": 4, "pairs": "all"},
        {"group_size": 3, "loss_type": "apo_zero", "pairs": "all"},
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"loss_type": "hinge"},
        {"sync_every": 1},
    )

    expected_failures: ClassVar = {
        "test_resume_lora[sync_every=1]": "mixing adapters is not mixing weights, so it is refused",
    }

    def expected_step(self, c, rows, bench):
        """2402.04792 algorithm 1 with the loss of 2305.18290: a mean over prompts of the mean over their pairs."""
        losses = []
        for row in rows:
            pairs = pairs_by_hand([a.reward for a in row.answers], c.pairs == "all")
            some = [of_pair(c, row.answers[i].h, row.answers[j].h) for i, j in pairs]
            losses += [sum(some) / len(some)] if some else []
        return sum(losses) / len(losses)


def of_pair(c, chosen, rejected):
    x, e = c.beta * (chosen - rejected), c.label_smoothing
    right, flipped = -log_sigmoid(x), -log_sigmoid(-x)
    return {
        "sigmoid": (1 - e) * right + e * flipped,
        "robust": ((1 - e) * right - e * flipped) / (1 - 2 * e),
        "hinge": max(0.0, 1 - x),
        "apo_zero": sigmoid(-c.beta * chosen) + sigmoid(c.beta * rejected),
    }[c.loss_type]


REWARDS = st.lists(st.one_of(st.none(), st.integers(-2, 2).map(float)), min_size=2, max_size=5)


@given(REWARDS, st.booleans())
def test_which_completions_are_compared(rewards, every):
    known = torch.tensor([[r or 0.0 for r in rewards]])
    scored = torch.tensor([[r is not None for r in rewards]])
    beats = preferred(known, scored, every)
    want = pairs_by_hand(rewards, every)
    assert sorted(map(tuple, beats[0].nonzero().tolist())) == sorted(want)
    values = torch.arange(len(rewards) ** 2, dtype=torch.float64).view(1, len(rewards), -1)
    mean = sum(float(values[0, i, j]) for i, j in want) / max(len(want), 1)
    assert float(of_pairs(values, beats)) == pytest.approx(mean)


def test_rewards_that_differ_by_rounding_make_no_pair():
    third = torch.tensor(1 / 3)
    rewards = torch.stack([third, third.nextafter(torch.tensor(1.0))])[None]
    assert not preferred(rewards, torch.ones(1, 2, dtype=torch.bool), True).any()


def with_rewards(config, rewards):
    """Return a bench, and a step collected with these rewards, [prompt][completion]."""
    bench = Bench(OnlineDPO(OnlineDPO.Config(**config)))
    examples = TestOnlineDPO().examples()[: len(rewards)]
    ctx = bench.context(examples)
    made = ctx.rollouts

    def rollouts(batch, n=1, **options):
        flat = [r for some in rewards for r in some]
        numbers = {
            "rewards": torch.tensor([r or 0.0 for r in flat]),
            "scored": torch.tensor([r is not None for r in flat]),
        }
        return made(batch, n, **options).attach(per_completion=numbers)

    ctx.rollouts = rollouts
    with torch.no_grad():
        return bench, bench.method.collect(ctx.shard(examples), ctx), ctx


def test_a_prompt_without_a_pair_has_no_loss():
    bench, batch, ctx = with_rewards({}, [[1.0, 1.0], [None, 2.0], [0.0, 1.0]])
    assert batch["paired"].tolist() == [False, False, True]
    assert ctx.logged["pairs/prompts_without"] == 2
    terms = bench.method.loss(batch, bench.models)
    row = bench.score(batch.examples)[2]
    want = -log_sigmoid(0.1 * (row.answers[1].h - row.answers[0].h))
    assert terms["sigmoid"].value.tolist() == pytest.approx([0.0, 0.0, want], abs=1e-6)
    assert terms["sigmoid"].over == "paired"
    margin = 0.1 * (row.answers[1].h - row.answers[0].h)
    assert float(terms["rewards/margin"].value[2]) == pytest.approx(margin, abs=1e-6)
    assert float(terms["rewards/accuracy"].value[2]) == (margin > 0)


def test_the_gradient_is_that_of_the_pairs_own_sequences():
    """By autograd on the model's own forward of each sequence alone."""
    bench, batch, _ = with_rewards({"group_size": 3, "pairs": "all", "beta": 0.5}, [[2.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    model = bench.models.policy_scorer.model
    rows = bench.score(batch.examples)

    def log_ratio(row, k):
        ids = torch.cat([row.example.prompt, row.example.completions[k].tokens]).long()
        logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        return logps[len(row.example.prompt) - 1 :].sum() - math.fsum(row.answers[k].reference)

    total = 0.0
    for row, pairs in zip(rows, ([(0, 1), (0, 2), (2, 1)], [(0, 2), (1, 2)]), strict=True):
        for better, worse in pairs:
            margin = 0.5 * (log_ratio(row, better) - log_ratio(row, worse))
            total = total - torch.nn.functional.logsigmoid(margin) / len(pairs) / 2
    model.zero_grad()
    total.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    bench.method.loss(batch, bench.models)["sigmoid"].value.mean().backward()
    for name, parameter in model.named_parameters():
        if name in want:
            scale = float(want[name].abs().max())
            assert torch.allclose(parameter.grad, want[name], atol=1e-5 * scale + 1e-9), name


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"loss_type": "exo_pair"}, "exo_pair needs label_smoothing above 0"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing has no effect on loss_type: hinge"),
        ({"sync_alpha": 0.5}, "sync_alpha has an effect with sync_every only"),
        ({"pairs": "all"}, "pairs: all is the same as best_worst for two completions; raise group_size"),
    ],
)
def test_settings_that_do_not_fit(config, words):
    with pytest.raises(ValueError, match=words):
        OnlineDPO.Config(**config)
