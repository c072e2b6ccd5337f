import math

from alignkit.testing import *
from alignkit.testing.byhand import sigmoid
from alignkit_nash import NashMD


class TestNash(Conformance):
    method = NashMD
    configs = ({}, {"tau": 0.0, "mixture": 0.25}, {"tau": 1.0})

    def expected(self, config, row):
        """At ratio 1 the surrogate's value is minus the bracket, once a token; the kit's judge is s(reward)."""
        bracket = sigmoid(row.only.reward) - 0.5 - config.tau * row.only.h
        return -bracket * row.only.n


def test_the_gradient_is_the_papers():
    """-(P - 1/2 - tau log ratio) grad log policy(y), by autograd on the model's own forward."""
    import torch

    from alignkit.testing.bench import Bench

    bench = Bench(NashMD(NashMD.Config(tau=0.3)))
    examples = TestNash().examples()
    (batch,) = bench.collect(examples)
    rows = bench.score(batch.examples)
    model = bench.models.policy_scorer.model
    total = 0.0
    for row in rows:
        ids = torch.cat([row.example.prompt, row.example.completions[0].tokens]).long()
        logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        bracket = sigmoid(row.only.reward) - 0.5 - 0.3 * row.only.h
        total = total - bracket * logps[len(row.example.prompt) - 1 :].sum() / len(rows)
    model.zero_grad()
    total.backward()
    want = {f"model.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    got = bench.step(examples).gradients
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        assert torch.allclose(got[name], gradient, atol=1e-6 * float(gradient.abs().max())), name
    assert math.isfinite(total.item())
