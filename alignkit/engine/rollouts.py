"""Sampling and scoring completions: the implementation of a method's `ctx.rollouts`, for one rank's part of a step.

A completion depends only on the weights, the seed, the step and its position in the step over all ranks: not on how the
ranks share the step, nor on the other completions in its batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from alignkit.config import RunConfig
from alignkit.data.stream import seed_of
from alignkit.engine.ahead import Ahead, Ask
from alignkit.engine.roles import Roles
from alignkit.engine.sampled import sampled_metrics, trajectory_lines, trajectory_metrics
from alignkit.engine.scorers import Scorers
from alignkit.errors import PluginError, RewardError, RolloutError
from alignkit.method import Context
from alignkit.models.sharding import gathered
from alignkit.models.truncation import Truncation
from alignkit.reference.reference import Reference
from alignkit.rewards import Answers, Scores
from alignkit.rewards.answers import text_of
from alignkit.rollout import Draw, Mixture, Request, Sampled, Setup
from alignkit.rollout.completions import answers_of, with_completions
from alignkit.rollout.correction import check_comparable, correction_weights, is_comparable, mismatch_metrics
from alignkit.rollout.sampling import Local
from alignkit.runs.folder import StepLines
from alignkit.types import Batch, Example
from alignkit_kernels import sequence_sum

T = TypeVar("T")
TIMED = ("sync", "sampling", "scoring")


class SamplingStep(Context, Protocol):
    """A step in which completions are sampled."""

    @property
    def models(self) -> Roles:
        """The roles that the method declared."""
        ...

    @property
    def following(self) -> Sequence[Example]:
        """This rank's examples of the next step of the training; none in an evaluation, and after the last step."""
        ...

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

    setup: what samplers are built from. updates: optimiser steps per collected batch. ahead: the sampler of the policy.
    seconds: of this step.
    """

    config: RunConfig
    roles: frozenset[str]
    scorers: Scorers
    setup: Setup
    reference: Reference | None
    updates: int
    ahead: Ahead
    lines: StepLines | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TIMED, 0.0))

    def __post_init__(self) -> None:
        self.ranks = self.setup.ranks

    def open(self, folder: Path, done: int, evaluated: int) -> None:
        """Open completions.jsonl (one file per rank), without the lines of steps that will be repeated."""
        name = "completions.jsonl" if self.ranks.is_main else f"completions-{self.ranks.own}.jsonl"
        self.lines = StepLines(folder / name, done, evaluated)
        if self.ranks.is_main:  # those of ranks that there were before a resumption
            for path in folder.glob("completions-*.jsonl"):
                if int(path.stem.rsplit("-", 1)[1]) >= self.ranks.n:
                    StepLines(path, done, evaluated).close()

    def close(self) -> None:
        """Close the file, the rewards, the judge and the sampler."""
        for one in (self.lines, self.scorers.rewards, self.scorers.judge, self.ahead):
            if one is not None:
                one.close()

    def rollouts(self, ctx: SamplingStep, batch: Batch, draw: Draw) -> Batch:
        """Return the batch's prompts with sampled and scored completions, see `alignkit.method.Context.rollouts`."""
        sampled = self.sample(ctx, batch.examples, draw, None)
        grown, answers = with_completions(batch.examples, sampled, batch), self.answers(batch.examples, sampled)
        if draw.sampling.temperature != self.config.sampling.temperature:
            grown = replace(grown, temperature=draw.sampling.temperature)
        grown = self._with_logps(ctx, grown, draw) if draw.logps else grown
        lines = trajectory_lines(sampled) if self.config.environment else {}
        if "reward" in self.roles:
            scores = self.score(answers)
            lines |= {"reward": scores.total, **{f"reward/{k}": v for k, v in scores.parts.items()}}
            scored = torch.tensor([value is not None for value in scores.total], device=batch.device)
            grown = grown.attach(per_completion={"rewards": _float32(scores.numbers, batch.device), "scored": scored})
        if draw.mixture is not None:
            others = self.sample(ctx, batch.examples, draw, draw.mixture)
            against = self.answers(batch.examples, others)
            lines |= {"wins": self.compare(answers, against), "against": list(map(text_of, against.completions))}
            grown = grown.attach(per_completion={"wins": _float32(lines["wins"], batch.device)})
        measured = sampled_metrics(ctx.sum, sampled, lines, draw.n)
        measured |= trajectory_metrics(ctx.sum, sampled) if self.config.environment else {}
        ctx.log(**{f"{draw.prefix}{name}": value for name, value in measured.items()})
        for name, shown in (("old_logps", "logp"), ("sampler_logps", "sampler_logp")):
            if name in grown:
                lines |= {shown: sequence_sum(grown[name], grown.cu_seqlens).tolist()}
        if "rollout_weights" in grown:
            lines |= {"weight": sequence_sum(grown["rollout_weights"], grown.cu_seqlens, mean=True).tolist()}
        if draw.name:
            lines |= {"rollout": [draw.name] * len(answers)}
        self.write(ctx.step + 1 if ctx.training else ctx.step, ctx.training, answers, lines)
        if not ctx.training:
            self.took(0.0)  # the seconds of an evaluation are not those of a step
        return grown

    def _with_logps(self, ctx: SamplingStep, grown: Batch, draw: Draw) -> Batch:
        """Attach the log-probabilities and values of the sampled tokens that the method needs."""
        if "reference" in self.roles and self.reference is not None:
            grown = self.reference.attach(grown, keep=False)
        exact = "sampler_logps" not in grown
        if exact and "critic" not in self.roles and self.updates == 1 and not self.ahead.steps:
            return grown
        truncated = None if exact else partial(Truncation.of, draw.sampling, tuple(self.setup.ends))
        with self.ahead.as_sampled(self._ask(ctx, draw, grown.examples)):
            outputs = ctx.models.policy(grown, values="critic" in self.roles, truncated=truncated)
        numbers = {"old_logps": outputs.logps, "values": outputs.values}
        grown = grown.attach(per_token={name: value for name, value in numbers.items() if value is not None})
        if exact or draw.greedy or not is_comparable(self.ahead.sampler.processed, draw.sampling):
            return grown
        return self._corrected(ctx, grown, outputs.logps if outputs.drawn is None else outputs.drawn, draw.prefix)

    def _corrected(self, ctx: SamplingStep, grown: Batch, drawn: Tensor, prefix: str) -> Batch:
        """Attach the weights against the mismatch of sampler and trainer, and log how large it is.

        drawn: the trainer's log-probabilities in the distribution that the sampler draws from, [C].
        """
        rollout, sampler = self.config.rollout, grown["sampler_logps"]
        weights, beyond = correction_weights(drawn - sampler, grown.cu_seqlens, rollout)
        corrects = rollout.corrects != "none"
        found = mismatch_metrics(ctx.sum, self.ranks.largest, drawn, sampler, beyond if corrects else None)
        if ctx.training:  # an evaluation is in pieces, whose largest ratios have no mean
            ctx.log(**{f"{prefix}{name}": value for name, value in found.items()})
        return grown.attach(per_token={"rollout_weights": weights}) if corrects else grown

    def took(self, total: float) -> dict[str, float]:
        """Return how the seconds of a step were spent, and start counting those of the next step."""
        spent, self.seconds = self.seconds, dict.fromkeys(TIMED, 0.0)
        spent["learning"] = total - sum(spent.values())
        return {f"seconds/{name}": value for name, value in spent.items()}

    def sample(
        self, ctx: SamplingStep, examples: Sequence[Example], draw: Draw, mixture: float | None
    ) -> list[list[Sampled]]:
        """Return the completions of each of this rank's prompts, [prompt][completion]; mixture: the opponent's."""
        if mixture is not None:
            opponent = self._ask(ctx, draw, examples, mixture=self._mixture(mixture)).request
            return self._on_all_ranks("sampling", lambda: self._opponents(opponent))
        ask = self._ask(ctx, draw, examples)
        sampled = self.ahead.sample(ask, lambda: self._following(ctx, draw), self._on_all_ranks)
        if any(s.logps is not None for some in sampled for s in some):
            check_comparable(self.ahead.sampler.processed, draw.sampling, self.config.rollout)
        return sampled

    def _ask(
        self, ctx: SamplingStep, draw: Draw, examples: Sequence[Example], later: int = 0, mixture: Mixture | None = None
    ) -> Ask:
        """Return what a call asks for; later: in as many steps. Its seed: calls of one step share none."""
        seed = seed_of(self.config.seed, (4 if ctx.training else 6) + (mixture is not None), ctx.number + later)
        seed = seed_of(seed, 11, draw.number) if draw.number else seed
        prompts = [e.prompt.tolist() for e in examples]
        numbers = [ctx.offset + self.ranks.own + i * self.ranks.n for i in range(len(examples))]
        call = draw.number if ctx.training else -1 - draw.number  # what is ahead is for training
        request = Request(prompts, draw.sampling, draw.n, seed, numbers, mixture, draw.greedy, tuple(examples))
        return Ask(ctx.step + later, call, request)

    def _following(self, ctx: SamplingStep, draw: Draw) -> Ask | None:
        examples = ctx.following
        return self._ask(ctx, draw, examples, later=1) if examples else None

    def score(self, answers: Answers) -> Scores:
        """Score this rank's completions. Raises RewardError on all ranks where one of them fails."""
        rewards = self.scorers.rewards
        assert rewards is not None
        return self._on_all_ranks("scoring", lambda: rewards.score(answers))

    def compare(self, first: Answers, second: Answers) -> list[float]:
        """Return the judge's P(first wins). Raises RewardError on all ranks where one of them fails."""
        judge = self.scorers.judge
        if judge is None:
            raise PluginError("a mixture was sampled without a judge; the method must declare 'judge' in `uses`")
        return self._on_all_ranks("scoring", lambda: judge.wins(first, second))

    def answers(self, examples: Sequence[Example], sampled: Sequence[Sequence[Sampled]]) -> Answers:
        """Return prompts and completions as rewards receive them."""
        return answers_of(self.setup.tokenizer, examples, sampled, self.scorers.columns)

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

    def _opponents(self, request: Request) -> list[list[Sampled]]:
        """Sample from a mixture, in this process whatever samples from the policy."""
        assert self.reference is not None
        other = self.reference.scorer_and_context()[0]
        with gathered(*([] if other is self.setup.policy else [other])):
            return Local(self.setup).sample(request)

    def _on_all_ranks(self, doing: str, call: Callable[[], T]) -> T:
        """Return the call's result, and count its seconds. Raises on all ranks where it fails on one."""
        started = time.perf_counter()
        found = self.ranks.together(call, RewardError if doing == "scoring" else RolloutError)
        self.seconds[doing] += time.perf_counter() - started
        return found


def _float32(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
