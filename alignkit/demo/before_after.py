"""Run the demo, and print the policy's metrics and samples before and after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignkit import data, registry
from alignkit.data import tokenise
from alignkit.demo import policy_metrics, recipes, world
from alignkit.engine import Engine
from alignkit.errors import ConfigError, nearest
from alignkit.rewards import Answers, Rewards, build_rewards
from alignkit.rollout import Sampled, sample
from alignkit.types import Example

LOST = 0.03  # a larger loss of facts is harm
SAMPLES = 4  # per question: with one, the base's win rate against itself would be several points from 50 %


@dataclass(frozen=True)
class HeldOut:
    """Held-out questions, and the same questions as tokenised pairs."""

    questions: list[world.Question]
    pairs: list[Example]

    def sampled(self, model: Any, tokenizer: Any, seed: int) -> list[list[Sampled]]:
        """Return SAMPLES answers to each question."""
        return sample(model, tokenizer, [e.prompt for e in self.pairs], recipes.LENGTH, n=SAMPLES, seed=seed)

    def answers(self, tokenizer: Any, sampled: Sequence[Sequence[Sampled]]) -> Answers:
        """Return the samples in the form that rewards read."""
        flat = [(q, e, s) for q, e, some in zip(self.questions, self.pairs, sampled, strict=True) for s in some]
        return Answers(
            prompts=[q.prompt for q, _, _ in flat],
            completions=[tokenizer.decode(s.tokens, skip_special_tokens=True) for _, _, s in flat],
            columns={"fact": [q.fact for q, _, _ in flat]},
            rows=[e.row for _, e, _ in flat],
            lengths=[len(s.tokens) for _, _, s in flat],
            ended=[s.ended for _, _, s in flat],
        )


@dataclass(frozen=True)
class Evaluation:
    """A policy on the held-out questions. scores: of `world.score`; reward: the mean of the run's own reward."""

    answers: list[Any]
    scores: list[int]
    accuracy: float
    kl: float
    reward: float | None

    def rate(self, least: int) -> float:
        """Return the fraction of answers with at least this score."""
        return sum(score >= least for score in self.scores) / len(self.scores)


@dataclass(frozen=True)
class Outcome:
    """Base and policy on the held-out questions. opponent: scores of other samples of the base. folder: the run's."""

    questions: list[world.Question]
    before: Evaluation
    after: Evaluation
    opponent: list[int]
    folder: Path


def run_demo(method: str, output: Path, seed: int) -> str:
    """Create the task, fine-tune, align with `method`, and print the tables; return a closing line."""
    if method == recipes.base_trainer():
        raise ConfigError(
            f"the demo trains its base with '{method}'; choose the next method: {', '.join(recipes.offered())}"
        )
    if method not in (names := recipes.offered()):
        raise ConfigError(f"the demo has no '{method}'; it has {', '.join(names)}.{nearest(method, names)}")
    started = time.perf_counter()
    found = outcome(method, output, seed)
    _print(method, found)
    return (
        f"{time.perf_counter() - started:.0f} s. Model: {found.folder / 'model'}. "
        f"Metrics: {found.folder / 'metrics.jsonl'}. "
        f"Again: alignkit run {found.folder / 'config.yaml'} --name again"
    )


def outcome(method: str, output: Path, seed: int) -> Outcome:
    """Create the task, fine-tune and align in a new folder in `output`, and evaluate before and after."""
    cls, settings = registry.get(method), recipes.recipe(method)
    needs_reward = {"critic", "reward"} <= cls.uses  # the critic begins as a reward model, so one is trained first
    reward = recipes.best("pairs", "reward") if needs_reward else None
    reward_settings = recipes.recipe(reward) if reward else {}
    folder = _folder(output, method)
    print(
        "The demo fine-tunes a model of half a million parameters on questions and answers in two styles, aligns it by "
        f"{method} to the preferred style, and shows what changed: about a minute. Everything is in {folder}."
    )
    train, test = world.questions(seed)
    engine = Engine(output=folder, seed=seed, reference_cache=True, cache_file=folder / "reference.sqlite")
    base = recipes.train_base(engine, folder / "data", train, seed)
    settings["model"] = str(base.folder)
    if reward:
        pairs = _data(folder, "pairs", train, test)
        trained = engine.run(reward, **{**reward_settings, **pairs, "model": settings["model"]}, name=reward)
        settings["reward"] = str(trained.folder / "model")
    rewards = build_rewards(settings.get("reward", recipes.VERDICTS["reward"])) if cls.data == "prompts" else None
    held_out = HeldOut(test, tokenise.tokenise(data.load(world.pair_rows(test), "pairs"), base.tokenizer)[0])
    before = evaluate(base.model, base.model, base.tokenizer, held_out, seed, rewards)
    aligned = engine.run(method, **settings, **_data(folder, cls.data, train, test), name=method)
    after = evaluate(aligned.model, base.model, base.tokenizer, held_out, seed + 1, rewards)
    opponent = _scores(held_out.answers(base.tokenizer, held_out.sampled(base.model, base.tokenizer, seed + 2)))
    return Outcome(test, before, after, opponent, aligned.folder)


def evaluate(
    model: Any, base: Any, tokenizer: Any, held_out: HeldOut, seed: int, rewards: Rewards | None
) -> Evaluation:
    """Sample answers to every question, and compare policy and base on the brief and the chatty answer."""
    sampled = held_out.sampled(model, tokenizer, seed)
    answers = held_out.answers(tokenizer, sampled)
    return Evaluation(
        answers=answers.completions[::SAMPLES],
        scores=_scores(answers),
        accuracy=policy_metrics.preference_accuracy(model, base, held_out.pairs),
        kl=policy_metrics.kl_of_samples(model, base, held_out.pairs, sampled),
        reward=None if rewards is None else sum(rewards.score(answers).numbers) / len(answers),
    )


def _scores(answers: Answers) -> list[int]:
    return [world.score(f, str(a)) for f, a in zip(answers.columns["fact"], answers.completions, strict=True)]


def _data(folder: Path, kind: str, train: list[world.Question], test: list[world.Question]) -> dict[str, str]:
    """Write the rows of a kind, and return the settings that name them."""
    name, rows = ("prompts", world.prompt_rows) if kind == "prompts" else ("pairs", world.pair_rows)
    return {
        "data": str(world.write_jsonl(folder / f"data/{name}.jsonl", rows(train))),
        "eval_data": str(world.write_jsonl(folder / f"data/held-out-{name}.jsonl", rows(test))),
    }


def _print(method: str, found: Outcome) -> None:
    """Print the tables."""
    both = found.before, found.after
    console = Console(width=None if Console().is_terminal else 120)
    table = Table(f"{len(found.questions)} held-out questions", "base", f"after {method}", box=None)
    if found.before.reward is not None:
        table.add_row("mean reward", *(f"{e.reward:.2f}" for e in both))
    wins = (policy_metrics.win_rate(e.scores, found.opponent) for e in both)
    table.add_row("win rate against the base", *(f"{rate:.1%}" for rate in wins))
    table.add_row("sampled answers in the preferred style", *(f"{e.rate(2):.1%}" for e in both))
    table.add_row("sampled answers with the right fact", *(f"{e.rate(1):.1%}" for e in both))
    table.add_row("preference accuracy", *(f"{e.accuracy:.1%}" for e in both))
    table.add_row("KL to the base (nats per sequence)", *(f"{e.kl:.2f}" for e in both))
    console.print(table)
    console.print(_meaning(method, *both))
    samples = Table("question", "base", f"after {method}", box=None)
    for q, a, b in list(zip(found.questions, found.before.answers, found.after.answers, strict=True))[:4]:
        samples.add_row(*(escape(t) for t in (q.prompt.split("\n")[0].removeprefix("Question: "), a, b)))
    console.print(samples)


def _meaning(method: str, before: Evaluation, after: Evaluation) -> str:
    """Return a line that says what the numbers mean."""
    style, facts = ([f"{e.rate(least):.0%}" for e in (before, after)] for least in (2, 1))
    lost = before.rate(1) - after.rate(1) > LOST
    return (
        f"{method} was to make the preferred style more frequent ({style[0]} -> {style[1]}) and to keep the facts "
        f"({facts[0]} -> {facts[1]}{', some are lost' if lost else ''}); the KL is how far the policy moved for it."
    )


def _folder(output: Path, method: str) -> Path:
    for number in range(1, 10**6):
        folder = output / f"demo-{method}-{number:03d}"
        if not folder.exists():
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise ConfigError(f"cannot create {folder}: {error.strerror}; choose another --output") from error
            return folder
    raise ConfigError(f"{output} is full of demos; choose another --output")
