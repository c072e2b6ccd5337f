"""From prompts to scored completions: what a method's `ctx.rollouts` does, for one rank's part of a step.

A completion depends on the weights, the seed, the step and its place in the step of all ranks, and on nothing else:
neither on how the step is shared among ranks, nor on which completions it is sampled beside.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignkit.config import RunConfig
from alignkit.errors import ConfigError, PluginError, RewardError
from alignkit.method import Method
from alignkit.packing import batch_of
from alignkit.rewards import Answers, Judge, Rewards, Scores, build_judge, build_rewards, check_judge, check_rewards
from alignkit.rollout import Mixture, Sampled, sample
from alignkit.runfolder import StepLines
from alignkit.stream import seed_of
from alignkit.types import Batch, Completion, Example
from alignkit_kernels import sequence_sum

if TYPE_CHECKING:
    from alignkit.assemble import Parts
    from alignkit.context import StepContext

logger = logging.getLogger(__name__)


def check_online(config: RunConfig, method: Method[Any]) -> None:
    """Raise ConfigError where what samples and scores cannot serve the method; loads nothing."""
    needs = method.roles() if method.data == "prompts" else frozenset[str]()
    for role, check in (("reward", check_rewards), ("judge", check_judge)):
        given = getattr(config, role)
        if role in needs and given is None:
            raise ConfigError(
                f"'{method.name}' needs a {role}: give `{role}`, such as a function `my_module:my_{role}`, the folder "
                f"of a reward model, or one that ships with alignkit; see docs/rewards.md"
            )
        if role not in needs and given is not None:
            raise ConfigError(f"'{method.name}' asks no {role}; leave out `{role}`")
        if given is not None:
            check(given)
    if "judge" in needs and config.patience is not None:
        raise ConfigError(
            f"'{method.name}' plays against an opponent that moves, so patience cannot tell; leave it out"
        )
    if "judge" in needs and config.sampling.backend == "continuous":
        raise ConfigError(f"'{method.name}' samples from a mixture, which backend: continuous cannot; use generate")
    if method.data == "prompts" and config.fsdp:
        raise ConfigError(f"'{method.name}' samples, which a policy sharded by fsdp cannot do yet; leave out fsdp")


def stand_ins(examples: Sequence[Example], sampling_tokens: int) -> list[Example]:
    """Return the prompts with two made-up completions each, so that a model can be tried before anything is sampled."""
    return [
        replace(e, completions=tuple(Completion(e.prompt[-n:].clone()) for n in (min(sampling_tokens, 8), 3)))
        for e in examples
    ]


@dataclass
class Online:
    """What samples, scores and compares in a run; open while its loop runs."""

    config: RunConfig
    tokenizer: Any
    rewards: Rewards | None
    judge: Judge | None
    lines: StepLines | None = None
    columns: tuple[str, ...] = ()
    epochs_per_batch: int = 1
    seconds: dict[str, float] = field(default_factory=lambda: {"sampling": 0.0, "scoring": 0.0})

    @classmethod
    def of_run(
        cls, config: RunConfig, method: Method[Any], tokenizer: Any, examples: Sequence[Example], device: torch.device
    ) -> Online | None:
        """Load what scores; None for a method that samples nothing. examples: all of the run, for their columns."""
        if method.data != "prompts":
            return None
        rewards = build_rewards(config.reward, device) if config.reward is not None else None
        judge = build_judge(config.judge, device) if config.judge is not None else None
        epochs = config.epochs_per_batch or method.epochs_per_batch
        columns = tuple(dict.fromkeys(name for e in examples for name in e.columns))
        for one in (rewards, judge):
            if one is not None:
                one.check_columns(columns)
        return cls(config, tokenizer, rewards, judge, columns=columns, epochs_per_batch=epochs)

    def open(self, folder: Path, done: int, evaluated: int, rank: int) -> None:
        """Begin completions.jsonl (one file a rank), without the lines of steps that are done again."""
        self.lines = StepLines(
            folder / ("completions.jsonl" if rank == 0 else f"completions-{rank}.jsonl"), done, evaluated
        )

    def close(self) -> None:
        """Close the file, and what scores."""
        for one in (self.lines, self.rewards, self.judge):
            if one is not None:
                one.close()

    def rollouts(self, ctx: StepContext, batch: Batch, n: int, mixture: float | None) -> Batch:
        """Return the batch's prompts with sampled and scored completions, see `alignkit.method.Context.rollouts`."""
        parts, roles = ctx.loop.parts, ctx.loop.method.roles()
        if mixture is not None and n != 1:
            raise PluginError(f"a mixture is compared with one completion of the policy; n is {n}")
        sampled = self.sample(ctx, batch.examples, n, 0, None)
        grown, answers = forest(batch.examples, sampled, batch), self.answers(batch.examples, sampled)
        if "reference" in roles and parts.reference:
            grown = parts.reference.attach(grown, keep=False)
        if "critic" in roles or self.updates > 1:
            said = ctx.models.policy(grown, values="critic" in roles)
            grown = grown.attach(per_token={"old_logps": said.logps})
            if said.values is not None:
                grown = grown.attach(per_token={"values": said.values})
        lines: dict[str, Sequence[Any]] = {}
        if "reward" in roles:
            scores = self.score(parts, answers)
            lines = {"reward": scores.total, **{f"reward/{k}": v for k, v in scores.parts.items()}}
            rewards = torch.tensor(scores.total, dtype=torch.float32, device=batch.device)
            grown = grown.attach(per_completion={"rewards": rewards})
        if mixture is not None:
            others = self.sample(ctx, batch.examples, 1, 1, mixture)
            against = self.answers(batch.examples, others)
            lines |= {"wins": self.compare(parts, answers, against), "against": list(map(_text, against.completions))}
            wins = torch.tensor(lines["wins"], dtype=torch.float32, device=batch.device)
            grown = grown.attach(per_completion={"wins": wins})
        self._log(ctx, sampled, lines)
        if "old_logps" in grown:
            lines |= {"logp": sequence_sum(grown["old_logps"], grown.cu_seqlens).tolist()}
        self.write(ctx.step + ctx.training, ctx.training, answers, lines)
        if not ctx.training:
            self.took(0.0)  # an evaluation's seconds are no step's
        return grown

    def took(self, total: float) -> dict[str, float]:
        """Return where the seconds of a step went, and begin to count the next one's."""
        spent, self.seconds = self.seconds, {"sampling": 0.0, "scoring": 0.0}
        spent["learning"] = total - sum(spent.values())
        return {f"seconds/{name}": value for name, value in spent.items()}

    @property
    def updates(self) -> int:
        """Updates that a collected batch serves."""
        return self.epochs_per_batch * self.config.minibatches

    def sample(self, ctx: StepContext, examples: Sequence[Example], n: int, draw: int, mixture: float | None) -> Any:
        """Return n completions of each of this rank's prompts, [prompt][completion]."""
        started, parts = time.perf_counter(), ctx.loop.parts
        with parts.accelerator.autocast():
            made = sample(
                parts.model,
                self.tokenizer,
                [e.prompt for e in examples],
                self.config.sampling,
                n=n,
                seed=self._seed(ctx, draw),
                numbers=[ctx.offset + parts.ranks.own + i * parts.ranks.n for i in range(len(examples))],
                mixture=None if mixture is None else self._mixture(parts, mixture),
            )
        self.seconds["sampling"] += time.perf_counter() - started
        return made

    def score(self, parts: Parts, answers: Answers) -> Scores:
        """Ask the rewards about this rank's completions. Raises RewardError on all ranks where one of them fails."""
        assert self.rewards is not None
        return self._asked(parts, lambda: self.rewards.score(answers))  # type: ignore[no-any-return,union-attr]

    def compare(self, parts: Parts, first: Answers, second: Answers) -> list[float]:
        """Ask the judge for P(first wins). Raises RewardError on all ranks where one of them fails."""
        if self.judge is None:
            raise PluginError("a mixture was sampled without a judge; the method must name 'judge' in `uses`")
        return self._asked(parts, lambda: self.judge.wins(first, second))  # type: ignore[no-any-return,union-attr]

    def answers(self, examples: Sequence[Example], sampled: Sequence[Sequence[Sampled]]) -> Answers:
        """Return prompts and completions as rewards see them: text, special tokens left out."""
        flat = [(e, s) for e, some in zip(examples, sampled, strict=True) for s in some]
        texts = [self.tokenizer.decode(s.tokens, skip_special_tokens=True) for _, s in flat]
        names = dict.fromkeys([*self.columns, *(name for e in examples for name in e.columns)])
        return Answers(
            prompts=[e.asked for e, _ in flat],
            completions=[
                t if isinstance(e.asked, str) else [{"role": "assistant", "content": t}]
                for (e, _), t in zip(flat, texts, strict=True)
            ],
            columns={name: [e.columns.get(name) for e, _ in flat] for name in names},
            rows=[e.row for e, _ in flat],
            lengths=[len(s.tokens) for _, s in flat],
            ended=[s.ended for _, s in flat],
        )

    def write(self, step: int, training: bool, answers: Answers, more: Mapping[str, Sequence[Any]]) -> None:
        """Write a line for each completion into completions.jsonl."""
        assert self.lines is not None
        for i, (row, prompt, completion) in enumerate(
            zip(answers.rows, answers.prompts, answers.completions, strict=True)
        ):
            about = {"training": training, "row": row, "prompt": prompt, "completion": _text(completion)}
            about |= {"number": i, "tokens": answers.lengths[i], "ended": answers.ended[i]}
            self.lines.write(step, about | {k: v[i] for k, v in more.items()}, flush=False)
        self.lines.flush()

    def _seed(self, ctx: StepContext, draw: int) -> int:
        return seed_of(self.config.seed, (4 if ctx.training else 6) + draw, ctx.number)

    def _log(self, ctx: StepContext, sampled: Sequence[Sequence[Sampled]], scored: Mapping[str, Sequence[Any]]) -> None:
        flat = [s for some in sampled for s in some]
        numbers = {k: v for k, v in scored.items() if k == "wins" or k.startswith("reward")}
        sums: list[float] = [len(flat), sum(len(s.tokens) for s in flat), sum(s.ended for s in flat)]
        sums += distinct(sampled)
        for values in numbers.values():
            sums += [sum(values), sum(x * x for x in values)]
        count, tokens, ended, different, bigrams, *moments = ctx.sum(torch.tensor(sums, dtype=torch.float64)).tolist()
        said = {"completion/length": tokens / count, "completion/eos_rate": ended / count}
        said["completion/distinct_2"] = different / max(bigrams, 1)
        for name, total, squares in zip(numbers, moments[0::2], moments[1::2], strict=True):
            said[f"{name}/mean"] = total / count
            if name == "reward":
                said["reward/std"] = max(squares / count - (total / count) ** 2, 0.0) ** 0.5
        ctx.log(**said)

    def _mixture(self, parts: Parts, weight: float) -> Mixture:
        assert parts.reference is not None
        model, context = parts.reference.model_and_context()
        return Mixture(model, weight, context)

    def _asked(self, parts: Parts, ask: Any) -> Any:
        started = time.perf_counter()
        problem, said = None, None
        try:
            said = ask()
        except RewardError as error:
            problem = error
        if parts.ranks.most(int(problem is not None)):  # or the other ranks would wait for this one
            raise problem or RewardError("another rank could not score its completions; its error says why")
        self.seconds["scoring"] += time.perf_counter() - started
        return said


def forest(examples: Sequence[Example], sampled: Sequence[Sequence[Sampled]], like: Batch) -> Batch:
    """Return the prompts with their completions as a batch that carries "ended"."""
    grown = [
        replace(e, completions=tuple(Completion(torch.tensor(s.tokens, dtype=torch.int32)) for s in some))
        for e, some in zip(examples, sampled, strict=True)
    ]
    ended = torch.tensor([s.ended for some in sampled for s in some], device=like.device)
    return batch_of(grown, like.layout, like.device).attach(per_completion={"ended": ended})


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def distinct(sampled: Sequence[Sequence[Sampled]], n: int = 2) -> tuple[int, int]:
    """Count the different n-grams of tokens in all completions, and all n-grams: their ratio is distinct-n."""
    grams = [tuple(s.tokens[i : i + n]) for some in sampled for s in some for i in range(len(s.tokens) - n + 1)]
    return len(set(grams)), len(grams)
