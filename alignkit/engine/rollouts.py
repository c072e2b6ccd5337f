"""Sampling and scoring completions: the implementation of a method's `ctx.rollouts`, for one rank's part of a step.

A completion depends only on the weights, the seed, the step and its position in the step over all ranks: not on how the
ranks share the step, nor on the other completions in its batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from alignkit.config import RunConfig
from alignkit.data.stream import seed_of
from alignkit.engine.sampled import sampled_metrics
from alignkit.engine.scorers import Scorers
from alignkit.errors import PluginError, RewardError
from alignkit.method import Context
from alignkit.models.passes import Autocast
from alignkit.models.ranks import Ranks
from alignkit.models.scoring import Scorer
from alignkit.models.sharding import gathered
from alignkit.reference.reference import Reference
from alignkit.rewards import Answers, Scores
from alignkit.rewards.answers import text_of
from alignkit.rollout import Draw, Mixture, Sampled, sample
from alignkit.rollout.completions import answers_of, with_completions
from alignkit.runs.folder import StepLines
from alignkit.types import Batch, Example
from alignkit_kernels import sequence_sum

T = TypeVar("T")


class SamplingStep(Context, Protocol):
    """A step in which completions are sampled."""

    @property
    def number(self) -> int:
        """Number of the step that is trained, which seeds its samples; 0 in an evaluation."""
        ...

    @property
    def offset(self) -> int:
        """Place of the first of these rows among the held-out ones; 0 in training."""
        ...


@dataclass
class Online:
    """Samples, scores and compares completions in a run; `lines` is open while its loop runs.

    policy: gathered on each rank while it samples, where it is sharded. updates: optimiser steps per collected batch.
    seconds: of this step.
    """

    config: RunConfig
    roles: frozenset[str]
    tokenizer: Any
    scorers: Scorers
    policy: Scorer
    reference: Reference | None
    ranks: Ranks
    autocast: Autocast
    updates: int
    lines: StepLines | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"sampling": 0.0, "scoring": 0.0})

    def open(self, folder: Path, done: int, evaluated: int) -> None:
        """Open completions.jsonl (one file per rank), without the lines of steps that will be repeated."""
        name = "completions.jsonl" if self.ranks.is_main else f"completions-{self.ranks.own}.jsonl"
        self.lines = StepLines(folder / name, done, evaluated)

    def close(self) -> None:
        """Close the file, the rewards and the judge."""
        for one in (self.lines, self.scorers.rewards, self.scorers.judge):
            if one is not None:
                one.close()

    def rollouts(self, ctx: SamplingStep, batch: Batch, draw: Draw) -> Batch:
        """Return the batch's prompts with sampled and scored completions, see `alignkit.method.Context.rollouts`."""
        sampled = self.sample(ctx, batch.examples, draw, None)
        grown, answers = with_completions(batch.examples, sampled, batch), self.answers(batch.examples, sampled)
        if draw.sampling.temperature != self.config.sampling.temperature:
            grown = replace(grown, temperature=draw.sampling.temperature)
        grown = self._with_logps(ctx, grown) if draw.logps else grown
        lines: dict[str, Sequence[Any]] = {}
        if "reward" in self.roles:
            scores = self.score(answers)
            lines = {"reward": scores.total, **{f"reward/{k}": v for k, v in scores.parts.items()}}
            scored = torch.tensor([value is not None for value in scores.total], device=batch.device)
            grown = grown.attach(per_completion={"rewards": _float32(scores.numbers, batch.device), "scored": scored})
        if draw.mixture is not None:
            others = self.sample(ctx, batch.examples, draw, draw.mixture)
            against = self.answers(batch.examples, others)
            lines |= {"wins": self.compare(answers, against), "against": list(map(text_of, against.completions))}
            grown = grown.attach(per_completion={"wins": _float32(lines["wins"], batch.device)})
        measured = sampled_metrics(ctx.sum, sampled, lines, draw.n)
        ctx.log(**{f"{draw.prefix}{name}": value for name, value in measured.items()})
        if "old_logps" in grown:
            lines |= {"logp": sequence_sum(grown["old_logps"], grown.cu_seqlens).tolist()}
        if draw.name:
            lines |= {"rollout": [draw.name] * len(answers)}
        self.write(ctx.step + 1 if ctx.training else ctx.step, ctx.training, answers, lines)
        if not ctx.training:
            self.took(0.0)  # the seconds of an evaluation are not those of a step
        return grown

    def _with_logps(self, ctx: SamplingStep, grown: Batch) -> Batch:
        """Attach the log-probabilities and values of the sampled tokens that the method needs."""
        if "reference" in self.roles and self.reference is not None:
            grown = self.reference.attach(grown, keep=False)
        if "critic" in self.roles or self.updates > 1:
            outputs = ctx.models.policy(grown, values="critic" in self.roles)
            grown = grown.attach(per_token={"old_logps": outputs.logps})
            if outputs.values is not None:
                grown = grown.attach(per_token={"values": outputs.values})
        return grown

    def took(self, total: float) -> dict[str, float]:
        """Return how the seconds of a step were spent, and start counting those of the next step."""
        spent, self.seconds = self.seconds, {"sampling": 0.0, "scoring": 0.0}
        spent["learning"] = total - sum(spent.values())
        return {f"seconds/{name}": value for name, value in spent.items()}

    def sample(
        self, ctx: SamplingStep, examples: Sequence[Example], draw: Draw, mixture: float | None
    ) -> list[list[Sampled]]:
        """Return the completions of each of this rank's prompts, [prompt][completion]; mixture: the opponent's."""
        started, ranks = time.perf_counter(), self.ranks
        opponent = None if mixture is None else self._mixture(mixture)
        with gathered(*self._sampled(mixture)), self.autocast():
            sampled = sample(
                self.policy.model,
                self.tokenizer,
                [e.prompt for e in examples],
                draw.sampling,
                n=draw.n,
                seed=self._seed(ctx, draw.number, mixture is not None),
                numbers=[ctx.offset + ranks.own + i * ranks.n for i in range(len(examples))],
                mixture=opponent,
                greedy=draw.greedy,
            )
        self.seconds["sampling"] += time.perf_counter() - started
        return sampled

    def _seed(self, ctx: SamplingStep, call: int, opponent: bool) -> int:
        """Return the seed of a call's noise: calls of one step share none, and a resumed run repeats it."""
        first = seed_of(self.config.seed, (4 if ctx.training else 6) + opponent, ctx.number)
        return seed_of(first, 11, call) if call else first

    def score(self, answers: Answers) -> Scores:
        """Score this rank's completions. Raises RewardError on all ranks where one of them fails."""
        rewards = self.scorers.rewards
        assert rewards is not None
        return self._on_all_ranks(lambda: rewards.score(answers))

    def compare(self, first: Answers, second: Answers) -> list[float]:
        """Return the judge's P(first wins). Raises RewardError on all ranks where one of them fails."""
        judge = self.scorers.judge
        if judge is None:
            raise PluginError("a mixture was sampled without a judge; the method must declare 'judge' in `uses`")
        return self._on_all_ranks(lambda: judge.wins(first, second))

    def answers(self, examples: Sequence[Example], sampled: Sequence[Sequence[Sampled]]) -> Answers:
        """Return prompts and completions as rewards receive them."""
        return answers_of(self.tokenizer, examples, sampled, self.scorers.columns)

    def write(self, step: int, training: bool, answers: Answers, more: Mapping[str, Sequence[Any]]) -> None:
        """Write one line for each completion to completions.jsonl."""
        assert self.lines is not None
        for i, (row, prompt, completion) in enumerate(
            zip(answers.rows, answers.prompts, answers.completions, strict=True)
        ):
            about = {"training": training, "row": row, "prompt": prompt, "completion": text_of(completion)}
            about |= {"number": i, "tokens": answers.lengths[i], "ended": answers.ended[i]}
            self.lines.write(step, about | {k: v[i] for k, v in more.items()}, flush=False)
        self.lines.flush()

    def _mixture(self, weight: float) -> Mixture:
        assert self.reference is not None
        scorer, context = self.reference.scorer_and_context()
        return Mixture(scorer.model, weight, context)

    def _sampled(self, mixture: float | None) -> list[Scorer]:
        """Return the models that a call samples from."""
        if mixture is None or self.reference is None:
            return [self.policy]
        other = self.reference.scorer_and_context()[0]
        return [self.policy] if other is self.policy else [self.policy, other]

    def _on_all_ranks(self, call: Callable[[], T]) -> T:
        started = time.perf_counter()
        found = self.ranks.together(call, RewardError)
        self.seconds["scoring"] += time.perf_counter() - started
        return found


def _float32(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
