import torch

from alignkit.testing import *
from alignkit_remax import ReMax


class TestReMax(Conformance):
    method = ReMax
    configs = ({}, {"beta": 0.0}, {"beta": 0.5, "clip": 0.1})

    def expected(self, c, row):
        """2310.10505: at ratio 1 the surrogate's value is -A a token, summed over the completion."""
        return -(row.only.reward - c.beta * row.only.h - row.greedy) * row.only.n


def with_rewards(bench, examples, sampled, greedy):
    """Collect a step whose completions have these rewards, None where no reward applies."""
    ctx = bench.context(examples)
    made = ctx.rollouts

    def rollouts(batch, n=1, **options):
        rewards = greedy if options.get("greedy") else sampled
        numbers = {
            "rewards": torch.tensor([r or 0.0 for r in rewards]),
            "scored": torch.tensor([r is not None for r in rewards]),
        }
        return made(batch, n, **options).attach(per_completion=numbers)

    ctx.rollouts = rollouts
    with torch.no_grad():
        return bench.method.collect(ctx.shard(examples), ctx), ctx


def test_the_advantage_is_the_reward_above_that_of_the_greedy_completion():
    bench, examples = Bench(ReMax(ReMax.Config(beta=0.0))), TestReMax().examples()[:4]
    batch, ctx = with_rewards(bench, examples, [1.0, 0.25, None, 2.0], [0.5, 1.0, 3.0, None])
    assert batch["gains"].tolist() == [0.5, -0.75, 0.0, 0.0]
    assert batch["compared"].tolist() == [True, True, False, False]
    assert ctx.logged["advantage/over_greedy"] == -0.125  # (0.5 - 0.75) / 2
    terms = bench.method.loss(batch, bench.models)
    by_hand = -batch["gains"] * batch.lengths
    assert terms["policy"].value.tolist() == by_hand.tolist()


def test_the_gradient_is_that_of_reinforce():
    """Each sequence alone through the model in float64: the gradient of the mean of -A log policy(y)."""
    beta = 0.3
    bench, examples = Bench(ReMax(ReMax.Config(beta=beta))), TestReMax().examples()
    got = bench.step(examples).gradients
    (batch,) = bench.collect(examples)
    policy = bench.models.policy_scorer
    for row in bench.score(batch.examples):
        advantage = row.only.reward - row.greedy - beta * row.only.h
        prompt, tokens = row.example.prompt.long(), row.example.completions[0].tokens.long()
        logits = policy.model(input_ids=torch.cat([prompt, tokens])[None]).logits[0].log_softmax(-1)
        logp = logits[len(prompt) - 1 : -1].gather(1, tokens[:, None]).sum()
        (-advantage * logp / len(examples)).backward()
    for name, weight in policy.named_parameters():
        assert torch.allclose(got[name], weight.grad, rtol=1e-5, atol=1e-9), name
