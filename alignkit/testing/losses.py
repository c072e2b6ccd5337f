"""Checks of a loss's values: equal to those by hand, finite at extremes, and the same however a step is cut."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from alignkit.engine.averages import counts, sum_terms
from alignkit.testing.bench import Bench, Cut, Scripted, assert_same, reordered
from alignkit.testing.models import ScriptedModels, TinyModels
from alignkit.testing.suite import Suite, only_for
from alignkit.testing.world import column_values, same_answers
from alignkit.types import Completion, Example, Layout

POLICY_LOGPS = (0.0, -1e-7, -1.0, -30.0, -1e4)  # per token
REFERENCE_LOGPS = (0.0, -1.0, -1e4)
LENGTHS = (1, 200)
TOLERANCE = 1e-6  # of expected values: both sides are float64, but a method may keep constants in float32


class LossChecks(Suite):
    """The part of the suite that checks the loss."""

    def test_expected_values(self, config: dict[str, Any]) -> None:
        """The step's loss equals what `expected` derives from single sequences."""
        bench = Bench(self.made(config))
        examples = self.examples()
        (batch,) = bench.collect(examples)  # with the completions of a method that samples
        answered = examples if self.method.data != "prompts" else batch.examples
        want = self.expected_step(self.method.Config(**config), bench.score(answered, batch.temperature or 1.0), bench)
        for layout in (Layout("forest", 64), Layout("padded")):
            got = bench.step(examples, Cut(layout)).loss
            assert math.isclose(got, want, rel_tol=TOLERANCE, abs_tol=TOLERANCE), f"loss {got!r}, by hand {want!r}"

    def test_micro_batches(self, config: dict[str, Any]) -> None:
        """Loss and gradient do not depend on how a step is cut into micro-batches."""
        bench, examples = Bench(self.made(config)), self.examples()
        whole = bench.step(examples)
        for max_tokens in (1, max(e.n_tokens for e in examples), sum(e.n_tokens for e in examples) // 2):
            assert_same(whole, bench.step(examples, Cut(max_tokens=max_tokens)), "the micro-batches")

    def test_row_order(self, config: dict[str, Any]) -> None:
        """Loss and gradient do not depend on the order of the collected examples."""
        bench, examples = Bench(self.made(config)), self.examples()
        whole = bench.step(examples)
        for order in reordered(len(examples)):
            assert_same(whole, bench.step(examples, Cut(order=order)), "the order of rows")

    def test_row_width(self, config: dict[str, Any]) -> None:
        """Loss and gradient do not depend on how many tokens a packed row holds."""
        bench, examples = Bench(self.made(config)), self.examples()
        whole = bench.step(examples)
        narrow, wide = Layout("forest", 1), Layout("forest", 4096, attention_cost=0.0)
        for layout in (narrow, wide, Layout("forest", 100, multiple_of=16)):
            assert_same(whole, bench.step(examples, Cut(layout)), "the width of rows")

    def test_layout(self, config: dict[str, Any]) -> None:
        """Loss and gradient are those of padded rows with one sequence each."""
        bench, examples = Bench(self.made(config)), self.examples()
        assert_same(bench.step(examples), bench.step(examples, Cut(Layout("padded"))), "the layout")

    def test_ranks(self, config: dict[str, Any]) -> None:
        """Loss and gradient do not depend on how many processes share a step."""
        bench, examples = Bench(self.made(config)), self.examples()
        whole = bench.step(examples)
        for ranks in (2, 3):
            assert_same(whole, bench.step(examples, Cut(ranks=ranks)), "the number of ranks")

    def _with_columns(self, examples: list[Example]) -> list[Example]:
        return [replace(e, declared=column_values(self.method.columns, i)) for i, e in enumerate(examples)]

    @only_for("text", "pairs", "unpaired")
    def test_ties_count_half(self, config: dict[str, Any]) -> None:
        """An accuracy that the method logs is one half on equal answers."""
        bench = Bench(self.made(config))
        bench.models.reference_scorer = bench.models.policy_scorer
        (tie,) = self._with_columns([same_answers(self.method.data)])
        metrics = bench.step([tie] * max(2, self.method.min_batch)).metrics
        accuracies = {n: v for n, v in metrics.items() if n.endswith("accuracy")}
        assert set(accuracies.values()) <= {0.5}, f"on equal answers: {accuracies}"

    def test_extreme_log_probabilities(self, config: dict[str, Any]) -> None:
        """Loss and gradient are finite in float32 for log-probabilities from 0 to -10,000 per token."""
        examples, models = extreme_rows(self.method.data)
        examples = self._with_columns(examples)
        bench = Bench(self.made(config), models)
        if self.method.data == "prompts":
            examples, bench.scripted = _prompts_of(examples)
        (batch,) = bench.collect(examples)
        models.leaves.clear()
        terms = bench.method.loss(batch, models)
        for name, term in terms.items():
            assert bool(term.value.isfinite().all()), (
                f"'{name}' is not finite for {_culprit(term.value, models, batch)}"
            )
        loss = sum_terms(terms, batch, self.method.name).loss_share(counts(batch, lambda t: t))
        loss.backward()  # type: ignore[no-untyped-call]
        for leaf in models.leaves:
            assert leaf.grad is not None, "the loss has no gradient with respect to the policy"
            bad = (~leaf.grad.isfinite()).nonzero()
            assert not len(bad), f"the gradient is not finite at a log-probability of {leaf[bad[0]].tolist()} per token"

    def test_extreme_rows(self, config: dict[str, Any]) -> None:
        """Loss and gradient are finite for a policy with extreme logits, on very long, very short and equal answers."""
        models = TinyModels(self.made(config), torch.float32)
        with torch.no_grad():
            models.policy_scorer.get_parameter("model.lm_head.weight").mul_(1000.0)
        answers = [_repeated(7, 1), _repeated(7, 300), _repeated(9, 300), _repeated(9, 1)]
        pairs = [*itertools.product(answers, answers)]
        n_answers = 2 if self.method.data == "pairs" else 1
        examples = [
            Example(torch.tensor([5], dtype=torch.int32), pair[:n_answers], {"desirable": float(i % 2)}, i + 1)
            for i, pair in enumerate(pairs[:: 1 if n_answers == 2 else 4])
        ]
        bench, examples = Bench(models.method, models), self._with_columns(examples)
        if self.method.data == "prompts":
            examples, bench.scripted = _prompts_of(examples)
        measured = bench.step(examples, Cut(Layout("forest", 640)))
        assert all(math.isfinite(v) for v in measured.metrics.values()), f"not finite: {measured.metrics}"
        bad = [n for n, g in measured.gradients.items() if not bool(g.isfinite().all())]
        assert not bad, f"gradients are not finite: {bad}"


def extreme_rows(kind: str) -> tuple[list[Example], ScriptedModels]:
    """Return rows of one and of 200 tokens, and models with every combination of extreme log-probabilities for them."""
    extremes = [*itertools.product(POLICY_LOGPS, REFERENCE_LOGPS, LENGTHS)]
    n_answers = 2 if kind == "pairs" else 1
    prompt = torch.tensor([5], dtype=torch.int32)
    policy: dict[Completion, float] = {}
    reference: dict[Completion, float] = {}
    examples = []
    for i, answers in enumerate(itertools.product(extremes, repeat=n_answers)):
        completions = tuple(_repeated(7, length) for _, _, length in answers)
        for completion, (policy_logp, reference_logp, _) in zip(completions, answers, strict=True):
            policy[completion], reference[completion] = policy_logp, reference_logp
        examples.append(Example(prompt, completions, {"desirable": float(i % 2)}, i + 1))
    return examples, ScriptedModels(policy, reference)


def _prompts_of(examples: list[Example]) -> tuple[list[Example], Scripted]:
    """Return the rows as prompts, and a sampler of groups of neighbouring answers, each answer at least once."""
    pool = [c for e in examples for c in e.completions]

    def sampled(example: Example, n: int) -> Example:
        return replace(example, completions=tuple(pool[(example.row + k) % len(pool)] for k in range(n)))

    return [replace(e, completions=()) for e in examples], sampled


def _repeated(token: int, n: int) -> Completion:
    return Completion(torch.full((n,), token, dtype=torch.int32))


def _culprit(value: torch.Tensor, models: ScriptedModels, batch: Any) -> str:
    """Return the scripted values at the first place where a term is not finite."""
    at = int((~value.isfinite()).nonzero()[0])
    if len(value) != len(batch):
        return f"entry {at} of {len(value)}"
    answers: Sequence[str] = [
        f"{len(c.tokens)} tokens, policy {models.policy_says[c]}, reference {models.reference_says[c]}"
        for c in batch.examples[at].completions
    ]
    return " against ".join(answers)
