import math

import pytest
import torch

from alignkit.testing import *
from alignkit.testing.bench import Bench
from alignkit_ppo import PPO


def mean(values):
    return math.fsum(values) / len(values)


def variance(values):
    return mean([(v - mean(values)) ** 2 for v in values])


def by_hand(config, rows, beta=None):
    """Advantages and returns of every token of a first step: rewards, GAE from the end, whitening."""
    beta = config.beta if beta is None else beta
    scores = [
        a.reward - config.missing_eos_penalty * (int(c.tokens[-1]) != 2)
        for row in rows
        for a, c in zip(row.answers, row.example.completions, strict=True)
    ]
    if config.normalise_rewards:
        scale = math.sqrt(variance(scores)) + 1e-8
        scores = [max(-config.reward_clip, min(config.reward_clip, (s - mean(scores)) / scale)) for s in scores]
    advantages, returns, values = [], [], []
    for row, score in zip(rows, scores, strict=True):
        answer = row.only
        ratios = [p - q for p, q in zip(answer.policy, answer.reference, strict=True)]
        rewards = [-beta * {"k1": r, "k2": r * r / 2, "k3": math.exp(-r) - 1 + r}[config.kl] for r in ratios]
        rewards[-1] += score
        carried, after, own = 0.0, 0.0, []
        for reward, value in reversed(list(zip(rewards, answer.values, strict=True))):
            carried = reward + config.gamma * after - value + config.gamma * config.lam * carried
            after = value
            own.append(carried)
        own.reverse()
        advantages += own
        returns += [a + v for a, v in zip(own, answer.values, strict=True)]
        values += answer.values
    if config.whiten:
        shift, scale = mean(advantages), math.sqrt(variance(advantages)) + 1e-8
        advantages = [(a - shift) / scale for a in advantages]
    return advantages, returns, values


class TestPPO(Conformance):
    method = PPO
    configs = (
        {},
        {"kl": "k3", "whiten": False, "normalise_rewards": False, "missing_eos_penalty": 0.7, "value_clip": 0.01},
        {"kl": "k2", "gamma": 0.9, "lam": 0.8, "entropy_coef": 0.01, "value_coef": 0.5, "reward_clip": 0.5},
        {"critic_warmup_steps": 1, "kl_control": "fixed"},
    )

    def expected_step(self, config, rows, bench):
        """At ratio 1: -A a token, and half the squared error of the values."""
        advantages, returns, values = by_hand(config, rows)
        surrogate = -mean(advantages) if not config.critic_warmup_steps else 0.0
        value_loss = mean([(v - r) ** 2 / 2 for v, r in zip(values, returns, strict=True)])
        bonus = config.entropy_coef * self.entropy(bench, rows) if config.entropy_coef else 0.0
        return surrogate + config.value_coef * value_loss - bonus

    def entropy(self, bench, rows):
        """Mean entropy of the policy over all tokens, from its own logits."""
        found = []
        for row in rows:
            ids = torch.cat([row.example.prompt, row.example.completions[0].tokens]).long()
            logps = bench.models.policy_scorer.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            found += (-(logps.exp() * logps).sum(-1))[len(row.example.prompt) - 1 :].tolist()
        return mean(found)


def test_the_value_loss_is_clipped():
    """A value far from its old one is charged as if it had moved by value_clip only, where that costs more."""
    method = PPO(PPO.Config(value_clip=0.2))
    batch = {"values": torch.tensor([0.0, 0.0, 0.0]), "returns": torch.tensor([1.0, 1.0, -1.0])}
    losses = method._value_losses(batch, torch.tensor([0.5, 0.1, 0.5]))
    # near 0.2: (0.2 - 1)^2 > (0.5 - 1)^2; inside the clip; (0.5 + 1)^2 > (0.2 + 1)^2
    assert losses.tolist() == pytest.approx([0.32, 0.405, 1.125])


def stepped(config, **bench):
    made = Bench(PPO(PPO.Config(**config)), **bench)
    return made, made.step(TestPPO().examples())


def test_the_policy_is_frozen_while_the_critic_warms_up():
    _, measured = stepped({"critic_warmup_steps": 1})
    assert measured.gradients
    assert all(name.startswith("critic.") for name in measured.gradients)
    _, later = stepped({"critic_warmup_steps": 0})
    assert any(name.startswith("policy.") for name in later.gradients)


def test_explained_variance():
    bench = Bench(PPO(PPO.Config()))
    examples = TestPPO().examples()
    ctx = bench.context(examples)
    with torch.no_grad():
        batch = bench.method.collect(ctx.shard(examples), ctx)
    _, returns, values = by_hand(bench.method.config, bench.score(batch.examples))
    left = variance([r - v for r, v in zip(returns, values, strict=True)]) / variance(returns)
    assert ctx.logged["value/explained_variance"] == pytest.approx(1 - left, abs=1e-6)


@pytest.mark.parametrize(("kl", "factor"), [(60.0, 1 + 0.2 * 7 / 100), (0.0, 1 - 0.2 * 7 / 100), (6.6, 1.007)])
def test_adaptive_control_moves_beta_towards_the_target(kl, factor):
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), n the completions of the step."""
    method = PPO(PPO.Config(horizon=100))
    bench = Bench(method)
    method.kl = kl
    method.after_update(bench.context(TestPPO().examples()), {})
    assert method.beta == pytest.approx(0.2 * factor)
    fixed = PPO(PPO.Config(horizon=100, kl_control="fixed"))
    fixed.kl = kl
    fixed.after_update(bench.context(TestPPO().examples()), {})
    assert fixed.beta == 0.2


def test_evaluation_leaves_controller_and_statistics_alone():
    method = PPO(PPO.Config())
    bench = Bench(method)
    examples = TestPPO().examples()
    ctx = bench.context(examples)
    ctx.training = False
    with torch.no_grad():
        method.collect(ctx.shard(examples), ctx)
    assert method.state_dict() == PPO(PPO.Config()).state_dict()


def test_a_batch_is_given_up_far_from_the_policy_that_sampled_it():
    method = PPO(PPO.Config(max_update_kl=0.05))
    assert not method.enough({"update_kl": 0.04})
    assert method.enough({"update_kl": 0.06})
    assert not PPO(PPO.Config()).enough({"update_kl": 9.0})
    _, measured = stepped({}, stale=0.5)
    bench = Bench(PPO(PPO.Config()), stale=0.5)
    (batch,) = bench.collect(TestPPO().examples())
    tokens = [t for e in batch.examples for c in e.completions for t in c.tokens.tolist()]
    want = mean([math.exp(0.5 * math.sin(t)) - 1 - 0.5 * math.sin(t) for t in tokens])
    assert measured.metrics["update_kl"] == pytest.approx(want, abs=1e-6)
    assert measured.metrics["ratio/max"] == pytest.approx(max(math.exp(0.5 * math.sin(t)) for t in tokens))
