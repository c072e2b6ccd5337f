import math
from dataclasses import replace

import pytest
import torch

from alignkit.testing import *
from alignkit.testing.bench import Bench
from alignkit.types import Completion
from alignkit_grpo import GRPO, RLOO


def deviation(values, mean):
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def kl_of(kind, r):
    return {"k1": r, "k2": r * r / 2, "k3": math.exp(-r) - 1 + r}[kind]


class TestGRPO(Conformance):
    method = GRPO
    configs = (
        {},
        {"group_size": 3, "beta": 0.0},
        {"variant": "dr_grpo", "group_size": 4, "kl": "k3"},
        {"variant": "dapo", "group_size": 4, "mask_truncated": True},
        {"variant": "bnpo", "group_size": 4, "kl": "k1"},
        {"variant": "cispo", "group_size": 4, "scale": "batch"},
        {"ratio": "sequence", "group_size": 4},
    )

    def expected_step(self, config, rows, bench):
        """At ratio 1: -A + beta KL a token, then the variant's average."""
        every = [a.reward for row in rows for a in row.answers]
        batch_mean = sum(every) / len(every)
        batch_std = math.sqrt(sum((r - batch_mean) ** 2 for r in every) / (len(every) - 1))
        by_completion, by_token, n_completions = [], [], 0
        for row in rows:
            rewards = [a.reward for a in row.answers]
            mean = sum(rewards) / len(rewards)
            scale = config.scale or ("none" if config.variant == "dr_grpo" else "group")
            divisor = {"group": deviation(rewards, mean) + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[scale]
            for answer, completion in zip(row.answers, row.example.completions, strict=True):
                if config.mask_truncated and int(completion.tokens[-1]) != 2:
                    continue
                n_completions += 1
                advantage = (answer.reward - mean) / divisor if max(rewards) > min(rewards) else 0.0
                tokens = []
                for p, q in zip(answer.policy, answer.reference, strict=True):
                    weight = -p if config.variant == "cispo" else -1.0
                    tokens.append(weight * advantage + config.beta * kl_of(config.kl, p - q))
                by_token += tokens
                by_completion.append(sum(tokens) / (256 if config.variant == "dr_grpo" else len(tokens)))
        if config.variant in ("dapo", "bnpo", "cispo"):
            return sum(by_token) / len(by_token)
        return sum(by_completion) / n_completions


class TestRLOO(Conformance):
    method = RLOO
    configs = (
        {},
        {"group_size": 2, "beta": 0.0},
        {"group_size": 3, "beta": 0.5},
        {"group_size": 3, "normalise_advantages": True},
    )

    def expected_step(self, config, rows, bench):
        """At ratio 1 the surrogate's value is -A a token, summed over a completion."""
        advantages, lengths = [], [a.n for row in rows for a in row.answers]
        for row in rows:
            scores = [a.reward - config.beta * a.h for a in row.answers]
            for i, score in enumerate(scores):
                others = scores[:i] + scores[i + 1 :]
                advantages.append(score - sum(others) / len(others))
        if config.normalise_advantages:
            mean = sum(advantages) / len(advantages)
            advantages = [(a - mean) / (deviation(advantages, mean) + 1e-4) for a in advantages]
        return sum(-a * n for a, n in zip(advantages, lengths, strict=True)) / len(lengths)


def group(*lengths):
    """Sample these lengths, every completion of other tokens."""

    def sampled(example, n):
        assert n == len(lengths)
        return replace(
            example,
            completions=tuple(
                Completion(torch.arange(5 + 7 * k, 5 + 7 * k + length, dtype=torch.int32))
                for k, length in enumerate(lengths)
            ),
        )

    return sampled


def metrics(config, *lengths, rows=(1, 2)):
    bench = Bench(GRPO(GRPO.Config(group_size=len(lengths), **config)), scripted=group(*lengths))
    return bench.step([e for e in TestGRPO().examples() if e.row in rows])


def test_equal_rewards_teach_nothing_and_are_counted():
    def same(example, n):
        return replace(example, completions=(Completion(torch.tensor([7, 8, 2], dtype=torch.int32)),) * n)

    bench = Bench(GRPO(GRPO.Config(beta=0.0)), scripted=same)
    examples = TestGRPO().examples()[:3]
    ctx = bench.context(examples)
    with torch.no_grad():
        batch = bench.method.collect(ctx.shard(examples), ctx)
    assert ctx.logged["advantage/zero_variance_groups"] == 3
    assert not batch["advantages"].any()
    measured = bench.step(examples)
    assert measured.loss == 0
    assert all(not g.any() for g in measured.gradients.values())


def scored(method, rewards, **config):
    """Collect and compute a step whose groups have these rewards, None where no reward applies."""
    size = len(rewards[0])
    bench = Bench(method(method.Config(group_size=size, **{"beta": 0.0} | config)))
    examples = TestGRPO().examples()[: len(rewards)]
    ctx = bench.context(examples)
    rollouts = ctx.rollouts

    def with_rewards(batch, n=1, mixture=None):
        flat = [r for group in rewards for r in group]
        numbers = {
            "rewards": torch.tensor([r or 0.0 for r in flat]),
            "scored": torch.tensor([r is not None for r in flat]),
        }
        return rollouts(batch, n, mixture).attach(per_completion=numbers)

    ctx.rollouts = with_rewards
    with torch.no_grad():
        batch = bench.method.collect(ctx.shard(examples), ctx)
    return bench, ctx, batch


def test_a_completion_that_no_reward_applies_to_is_left_out_of_its_group():
    _, ctx, batch = scored(GRPO, [[None, 1.0, 1.0, 1.0], [None, 1.0, 2.0, 3.0], [None] * 4])
    by_hand = [0, 0, 0, 0, 0, -1 / 1.0001, 0, 1 / 1.0001, 0, 0, 0, 0]  # mean 2, standard deviation 1
    assert batch["advantages"].tolist() == pytest.approx(by_hand, abs=1e-6)
    assert batch["learned"].tolist() == [True] * 8 + [False] * 4  # the last group is skipped
    assert ctx.logged["advantage/zero_variance_groups"] == 1


def test_both_scales_divide_by_the_deviation_of_the_sample():
    """By hand: the group's rewards are 1, 2 and 6, 7; the batch has mean 4 and the squares 9, 4, 4, 9."""
    rewards = [[1.0, 2.0], [6.0, 7.0]]
    by_group = [-0.5 / (math.sqrt(0.5) + 1e-4), 0.5 / (math.sqrt(0.5) + 1e-4)] * 2
    by_batch = [-0.5 / (math.sqrt(26 / 3) + 1e-4), 0.5 / (math.sqrt(26 / 3) + 1e-4)] * 2
    assert scored(GRPO, rewards)[2]["advantages"].tolist() == pytest.approx(by_group, rel=1e-6)
    assert scored(GRPO, rewards, scale="batch")[2]["advantages"].tolist() == pytest.approx(by_batch, rel=1e-6)
    assert scored(GRPO, [[5.0, None]], scale="batch")[2]["advantages"].tolist() == [0, 0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rewards_that_differ_by_rounding_are_equal(scale):
    above = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0)).item()
    assert torch.tensor(above) > 0.3
    third = 1000.0 * (1 / 3)
    _, ctx, batch = scored(GRPO, [[0.3, above, 0.3], [third, third + 1e-4, third], [0.0, 1e-6, 0.0]], scale=scale)
    assert batch["advantages"][:6].tolist() == [0.0] * 6
    assert batch["advantages"][6:].abs().min() > 0  # next to 0, nothing else is rounding
    assert ctx.logged["advantage/zero_variance_groups"] == 2


def test_leave_one_out_leaves_out_what_no_reward_applies_to():
    bench, _, batch = scored(RLOO, [[None, 1.0, 3.0, 5.0], [None, None, None, 4.0]])
    terms = bench.method.loss(batch, bench.models)
    # the baselines are the means of the two others: 4, 3 and 2; the last group has nobody to compare with
    advantages = torch.tensor([0.0, -3.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    assert terms["policy"].value.tolist() == pytest.approx((-advantages * batch.lengths).tolist(), abs=1e-5)
    assert terms["policy"].over == "scored"


def test_what_has_nobody_to_compare_with_is_not_in_the_normal_advantages():
    """Advantages -3, 0 and 3: the standard deviation of the sample is 3."""
    _, _, batch = scored(RLOO, [[None, 1.0, 3.0, 5.0], [None, None, None, 4.0]], normalise_advantages=True)
    want = [0, -3 / 3.0001, 0, 3 / 3.0001, 0, 0, 0, 0]
    assert batch["advantages"].tolist() == pytest.approx(want, abs=1e-6)


def test_without_a_kl_no_reference_is_needed():
    assert "reference" not in GRPO(GRPO.Config(beta=0.0)).roles()
    assert "reference" not in RLOO(RLOO.Config(beta=0.0)).roles()
    assert "reference" in GRPO(GRPO.Config()).roles()


@pytest.mark.parametrize("variant", ["grpo", "dapo", "cispo"])
def test_stale_samples_are_clipped(variant):
    """By hand from old = policy - 0.5 sin(token), over every token of a step."""
    config = GRPO.Config(group_size=4, beta=0.0, variant=variant)
    bench = Bench(GRPO(config), stale=0.5)
    examples = TestGRPO().examples()
    (batch,) = bench.collect(examples)
    rows = bench.score(batch.examples)
    high = {"grpo": 0.2, "dapo": 0.28, "cispo": 4.0}[variant]
    sums, lengths, clipped = [], [], 0
    for row in rows:
        rewards = [a.reward for a in row.answers]
        mean = sum(rewards) / 4
        for answer, completion in zip(row.answers, row.example.completions, strict=True):
            spread = max(rewards) > min(rewards)
            advantage = (answer.reward - mean) / (deviation(rewards, mean) + 1e-4) if spread else 0.0
            tokens = []
            for logp, token in zip(answer.policy, completion.tokens.tolist(), strict=True):
                ratio = math.exp(0.5 * math.sin(token))
                if variant == "cispo":
                    tokens.append(-min(ratio, 1 + high) * advantage * logp)
                    continue
                tokens.append(-min(ratio * advantage, min(max(ratio, 0.8), 1 + high) * advantage))
                clipped += (ratio > 1 + high and advantage > 0) or (ratio < 0.8 and advantage < 0)
            sums.append(sum(tokens))
            lengths.append(len(tokens))
    want = (
        sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
        if variant == "grpo"
        else (sum(sums) / sum(lengths))
    )
    got = bench.step(examples)
    assert got.loss == pytest.approx(want, abs=1e-6)
    if variant != "cispo":
        assert got.metrics["clip_fraction"] == pytest.approx(clipped / sum(lengths))
        assert clipped


def test_k2_has_the_gradient_of_the_kl():
    """Over all that may be sampled, the gradient of the default estimator is that of KL(policy || reference)."""
    logits = torch.randn(9, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    reference = torch.randn(9, generator=torch.Generator().manual_seed(4), dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    (want,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    from alignkit_kernels import policy_loss

    borders = torch.arange(10)
    for kind, right in (("k2", True), ("k3", False), ("k1", False)):
        out = policy_loss(
            policy, policy.detach(), torch.zeros(9), borders, reference_logps=reference, kl=kind, kl_coef=1.0
        )
        (got,) = torch.autograd.grad((policy.detach().exp() * out.losses).sum(), logits, retain_graph=True)
        assert torch.allclose(got, want) == right, kind
    assert GRPO.Config().kl == "k2"
