"""Checks of methods that sample: ratios, gradients, repeatability and the estimate of the KL."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignkit.engine.averages import counts, term_sums
from alignkit.testing.bench import Bench
from alignkit.testing.suite import Suite, only_for
from alignkit.testing.world import VOCABULARY
from alignkit.types import Batch, Completion, Example


class OnlineChecks(Suite):
    """The part of the suite for methods with `data = "prompts"`; others do not have it."""

    @only_for("prompts")
    def test_ratio_is_one_on_policy(self, config: dict[str, Any]) -> None:
        """In the first update of a batch the policy equals the old policy, and nothing is clipped."""
        metrics = Bench(self.made(config)).step(self.examples()).metrics
        ratio = metrics.get("ratio/max", 1.0)  # a method that computes no ratio logs none
        assert abs(ratio - 1) < 1e-6, f"the ratio is {ratio!r} before any update"
        assert metrics.get("clip_fraction", 0.0) == 0

    @only_for("prompts")
    def test_nothing_flows_through_rewards(self, config: dict[str, Any]) -> None:
        """Attached numbers and metrics have no gradient; the loss has one."""
        bench = Bench(self.made(config))
        (batch,) = bench.collect(self.examples())
        assert not [n for n in _numbers(batch) if batch[n].requires_grad]
        with torch.enable_grad():
            terms = bench.method.loss(batch, bench.models)
        assert any(t.coef and t.value.requires_grad for t in terms.values()), "no term has a gradient"
        assert not [n for n, t in terms.items() if not t.coef and t.value.requires_grad], "a metric has a gradient"

    @only_for("prompts")
    def test_a_correction_scales_the_gradient_once(self, config: dict[str, Any]) -> None:
        """The weights against a sampler's mismatch act in `models.policy` alone: the gradient is linear in them."""
        bench = Bench(self.made(config))
        (batch,) = bench.collect(self.examples())
        none, half, whole = (_gradient(bench, batch, weight) for weight in (0.0, 0.5, 1.0))
        scale = float(whole.abs().max())
        worst = float((half - (none + whole) / 2).abs().max())
        assert worst <= 1e-6 * scale, "the loss uses 'rollout_weights' itself; models.policy applies them already"

    @only_for("prompts")
    def test_steps_repeat(self, config: dict[str, Any]) -> None:
        """From the same state and samples, a step returns the same numbers, all finite."""
        bench = Bench(self.made(config))
        examples = self.examples()
        whole = bench.step(examples).metrics
        assert all(math.isfinite(v) for v in whole.values()), f"not finite: {whole}"
        bench.method.load_state_dict(self.made(config).state_dict())
        again = bench.step(examples).metrics
        assert again == whole, "a second step with the same samples and state logs other numbers"

    @only_for("prompts", role="reference")
    def test_kl_is_unbiased(self, config: dict[str, Any]) -> None:
        """The metric "kl", averaged over all tokens that the policy may sample, is KL(policy || reference)."""
        bench = Bench(self.made(config))
        prompt = self.examples()[1]
        policy, reference = (
            s.model(input_ids=prompt.prompt[None].long()).logits[0, -1].double().log_softmax(-1).detach()
            for s in (bench.models.policy_scorer, bench.models.reference_scorer)
        )
        want = float((policy.exp() * (policy - reference)).sum())

        def only(token: int) -> float:
            def sampled(example: Example, n: int) -> Example:
                one = Completion(torch.tensor([token], dtype=torch.int32))
                return replace(example, completions=(one,) * n)

            bench.scripted = sampled
            metrics = bench.step([prompt]).metrics
            assert "kl" in metrics, "uses has 'reference', but loss logs no 'kl'; add alignkit.rollout_metrics"
            return metrics["kl"]

        got = sum(float(policy[token].exp()) * only(token) for token in range(VOCABULARY))
        assert math.isclose(got, want, rel_tol=1e-5), f"the mean of the estimates is {got}, the KL is {want}"


def _gradient(bench: Bench, batch: Batch, weight: float) -> Tensor:
    """Return the gradient of the trained module, flat, where every token has this weight of a correction."""
    weights = torch.full((len(batch.targets),), weight)
    summed = term_sums(bench.method, batch.attach(per_token={"rollout_weights": weights}), bench.models)
    parameters = [p for p in bench.models.trained.parameters() if p.requires_grad]
    share = summed.loss_share(counts(batch, lambda t: t))
    found = torch.autograd.grad(share, parameters, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def _numbers(batch: Batch) -> list[str]:
    return [*batch.per_example, *batch.per_completion, *batch.per_token]
