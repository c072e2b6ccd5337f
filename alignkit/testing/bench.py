"""The test bench of a method: one training step in float64 on a small model, cut in any way, on simulated ranks.

The step is the engine's: collect once, count over all ranks, then a backward for each micro-batch with the counts of
`alignkit.engine.averages`. Only devices, optimiser and files are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignkit.engine import averages
from alignkit.method import Method
from alignkit.models.packing import batch_of
from alignkit.models.values import ActorCritic
from alignkit.rollout.draws import checked
from alignkit.rollout_settings import Sampling
from alignkit.testing.byhand import ScoredRow, score_of, score_rows
from alignkit.testing.models import TinyModels
from alignkit.testing.ranks import SimulatedRanks
from alignkit.testing.world import EOS, with_completions
from alignkit.types import Batch, Example, Layout


@dataclass(frozen=True)
class Cut:
    """The cut of a step into parts; it must not change the result.

    layout: of the rows. max_tokens: of a micro-batch. ranks: simulated processes. order: of the collected examples.
    """

    layout: Layout = Layout("forest", 64)
    max_tokens: int = 1_000_000
    ranks: int = 1
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Measured:
    """The result of a step: its loss, the mean of every term and metric, and the policy's gradients by name."""

    loss: float
    metrics: dict[str, float]
    gradients: dict[str, Tensor]


Scripted = Callable[[Example, int], Example]
SAMPLING = Sampling()


@dataclass
class BenchContext:
    """The bench's `alignkit.method.Context`. moved: the alphas that `update_reference` was called with."""

    models: Any
    step_examples: tuple[Example, ...]
    step: int = 0
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    uses_reference: bool = True
    uses_critic: bool = False
    layout: Layout = Layout()
    rank: int = 0
    ranks: SimulatedRanks = field(default_factory=lambda: SimulatedRanks(1))
    moved: list[float] = field(default_factory=list)
    training: bool = True
    stale: float = 0.0
    scripted: Scripted | None = None
    logged: dict[str, float] = field(default_factory=dict)
    eos: int = EOS
    max_new_tokens: int = SAMPLING.max_new_tokens
    drawn: list[str] = field(default_factory=list)

    def rollouts(self, batch: Batch, n: int = 1, mixture: float | None = None, **options: Any) -> Batch:
        """Return artificial completions, rewards and verdicts, which depend only on the example and the call."""
        draw = checked(SAMPLING, self.drawn, n, mixture, **options)
        self.drawn.append(draw.name)
        make = self.scripted or partial(with_completions, call=-1 if draw.greedy else draw.number)
        made = batch_of([make(e, n) for e in batch.examples], self.layout)
        if draw.sampling.temperature != SAMPLING.temperature:
            made = replace(made, temperature=draw.sampling.temperature)
        scores = torch.tensor([score_of(c) for e in made.examples for c in e.completions], dtype=torch.float64)
        ended = torch.tensor([int(c.tokens[-1]) == EOS for e in made.examples for c in e.completions])
        numbers = {"ended": ended, "rewards": scores, "scored": torch.ones_like(ended)}
        if mixture is not None:
            numbers["wins"] = scores.sigmoid()
        if not draw.logps:
            return made.attach(per_completion=numbers)
        with torch.no_grad():
            outputs = self.models.policy(made, values=self.uses_critic)
            old = outputs.logps - self.stale * made.targets.double().sin()
            per_token = {"old_logps": old} if self.stale or self.uses_critic else {}
            if outputs.values is not None:
                per_token["values"] = outputs.values
            if self.uses_reference:
                per_token["reference_logps"] = self.models.reference(made).logps
        return made.attach(per_completion=numbers, per_token=per_token)

    def log(self, **values: float) -> None:
        """Record the numbers."""
        self.logged |= values

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        return self.ranks.sum(self.rank, value)

    def shard(self, examples: Sequence[Example]) -> Batch:
        """Return this rank's part of the examples."""
        batch = batch_of(examples[self.rank :: self.ranks.n], self.layout)
        if not self.uses_reference or not all(e.completions for e in examples):
            return batch
        with torch.no_grad():
            return batch.attach(per_token={"reference_logps": self.models.reference(batch).logps})

    def mean(self, value: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the mean over all ranks."""
        counted = torch.ones_like(value, dtype=torch.bool) if counted is None else counted
        total = self.ranks.sum(self.rank, torch.stack([(value.double() * counted).sum(), counted.sum()]))
        return (total[0] / total[1].clamp(min=1)).to(value)

    def update_reference(self, alpha: float) -> None:
        """Record the call."""
        self.moved.append(alpha)


class Bench:
    """One method with its models in float64, or with `models`, such as ScriptedModels.

    scripted: samples completions for a prompt, instead of artificial ones. stale: how far the sampling policy differs
    from the policy: old = policy - stale * sin(token), in nats; at 0 a batch serves one update.
    """

    def __init__(
        self, method: Method[Any], models: Any = None, scripted: Scripted | None = None, stale: float = 0.0
    ) -> None:
        self.method, self.scripted, self.stale = method, scripted, stale
        self.models = models if models is not None else TinyModels(method)

    def context(self, examples: Sequence[Example], cut: Cut = Cut(), rank: int = 0, ranks: Any = None) -> BenchContext:
        """Return the context of a step over these examples."""
        return BenchContext(
            self.models,
            tuple(examples),
            scripted=self.scripted,
            stale=self.stale,
            uses_reference="reference" in self.method.roles(),
            uses_critic="critic" in self.method.roles(),
            layout=cut.layout,
            rank=rank,
            ranks=ranks or SimulatedRanks(1),
        )

    def collect(self, examples: Sequence[Example], cut: Cut = Cut()) -> list[Batch]:
        """Return each rank's batch after `collect`, in the order of `cut`."""
        ranks = SimulatedRanks(cut.ranks)

        def work(rank: int) -> Batch:
            ctx = self.context(examples, cut, rank, ranks)
            return self.method.collect(ctx.shard(examples), ctx)

        batches = ranks.collect(work)
        return [b.select(cut.order) if cut.order is not None else b for b in batches]

    def step(self, examples: Sequence[Example], cut: Cut = Cut()) -> Measured:
        """Return loss, metrics and gradients of one step."""
        batches = self.collect(examples, cut)
        per_rank = [averages.counts(b, lambda t: t) for b in batches]
        names = {n for counts in per_rank for n in counts}
        # `counts` returns at least 1, which is wrong for a rank that has none of them: count again
        totals = {n: max(1.0, float(sum(b.count(n) for b in batches))) for n in names}
        metrics = averages.Averages()
        metrics.expect(totals)
        trained = self.models.trained
        trained.zero_grad()
        for batch in batches:
            for micro in batch.micro_batches(cut.max_tokens):
                summed = averages.term_sums(self.method, micro, self.models)
                summed.loss_share(totals).backward()  # type: ignore[no-untyped-call]
                metrics.add(summed)
        gradients = {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}
        trained.zero_grad()
        means = metrics.means(lambda t: t)
        return Measured(means["loss"], means, gradients)

    def score(self, examples: Sequence[Example], temperature: float = 1.0) -> list[ScoredRow]:
        """Score each answer separately, with the rewards of sampled ones; return plain numbers."""
        models = self.models
        critic = models.trained.critic.model if isinstance(models.trained, ActorCritic) else None
        policy, reference = models.policy_scorer.model, models.reference_scorer.model
        if self.method.data != "prompts":
            return score_rows(policy, reference, examples, critic, temperature=temperature)
        rows = score_rows(policy, reference, examples, critic, score_of, temperature)
        greedy = self.scripted or partial(with_completions, call=-1)
        return [replace(row, greedy=score_of(greedy(row.example, 1).completions[0])) for row in rows]


def assert_same(a: Measured, b: Measured, what: str, tolerance: float = 1e-6) -> None:
    """Fail unless loss, metrics and gradients of two steps agree to `tolerance`, relative to their size.

    In float64 a reordered sum differs by about 1e-14; the rest of the tolerance is for methods that keep a constant in
    float32. A wrong denominator shows in the first digits.
    """
    for name in sorted({*a.metrics, *b.metrics}):
        x, y = a.metrics.get(name, float("nan")), b.metrics.get(name, float("nan"))
        assert abs(x - y) <= tolerance * max(1.0, abs(x)), f"'{name}' depends on {what}: {x!r} and {y!r}"
    assert a.gradients.keys() == b.gradients.keys(), f"which parameters get a gradient depends on {what}"
    scale = max((float(g.abs().max()) for g in a.gradients.values()), default=0.0)
    for name, gradient in a.gradients.items():
        worst = float((gradient - b.gradients[name]).abs().max())
        assert worst <= tolerance * scale, f"the gradient of {name} depends on {what}: off by {worst} of {scale}"


def reordered(n: int) -> list[tuple[int, ...]]:
    """Return two orders of n examples: reversed, and odd ones first."""
    return [tuple(reversed(range(n))), (*range(1, n, 2), *range(0, n, 2))]
