"""Run the demo and print before and after."""

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
from alignkit.demo import against_base as measures
from alignkit.demo import world
from alignkit.demo.base import write_start
from alignkit.demo.recipes import LENGTH, SETTINGS, SFT, VERDICTS, recipe
from alignkit.engine import Engine
from alignkit.errors import ConfigError, nearest
from alignkit.rewards import Answers, Rewards, build_rewards
from alignkit.rollout import Sampled, sample
from alignkit.types import Example

SAMPLES = 4  # of each question: one alone would leave the base several points from 50 % against itself


@dataclass(frozen=True)
class HeldOut:
    """Held-out questions, and the same as pairs in tokens."""

    questions: list[world.Question]
    pairs: list[Example]

    def sampled(self, model: Any, tokenizer: Any, seed: int) -> list[list[Sampled]]:
        """Return SAMPLES answers to each question."""
        return sample(model, tokenizer, [e.prompt for e in self.pairs], LENGTH, n=SAMPLES, seed=seed)

    def answers(self, tokenizer: Any, sampled: Sequence[Sequence[Sampled]]) -> Answers:
        """Return the samples as rewards see them."""
        flat = [(q, e, one) for q, e, some in zip(self.questions, self.pairs, sampled, strict=True) for one in some]
        return Answers(
            prompts=[q.prompt for q, _, _ in flat],
            completions=[tokenizer.decode(one.tokens, skip_special_tokens=True) for _, _, one in flat],
            columns={"fact": [q.fact for q, _, _ in flat]},
            rows=[e.row for _, e, _ in flat],
            lengths=[len(one.tokens) for _, _, one in flat],
            ended=[one.ended for _, _, one in flat],
        )


@dataclass(frozen=True)
class Measures:
    """What the demo measures on held-out questions. scores: the world's own; reward: the run's, their mean."""

    answers: list[Any]
    scores: list[int]
    accuracy: float
    kl: float
    reward: float | None


def run_demo(method: str, output: Path, seed: int) -> str:
    """Make the task, fine-tune, align with `method`, and print the tables; return the last words."""
    if method not in SETTINGS:
        raise ConfigError(f"the demo has no '{method}'; it has {', '.join(SETTINGS)}.{nearest(method, SETTINGS)}")
    started = time.perf_counter()
    folder = _folder(output, method)
    train, test = world.questions(seed)
    rows = world.write_jsonl(folder / "data/sft.jsonl", world.sft_rows(train))
    texts = [q.prompt + answer for q in train for answer in (q.brief, q.chatty)]
    start = write_start(folder / "start", texts, seed)

    engine = Engine(output=folder, seed=seed, reference_cache=True, cache_file=folder / "reference.sqlite")
    base = engine.run("sft", model=str(start), data=str(rows), name="sft", **SFT)
    settings = {**recipe(method), "model": str(folder / "sft/model")}
    if method == "ppo":  # as it is known: with a reward model, from which its critic begins
        pairs = _data(folder, "pairs", train, test)
        engine.run("reward", **{**recipe("reward"), **pairs, "model": settings["model"]}, name="reward")
        settings["reward"] = str(folder / "reward/model")
    kind = registry.get(method).data
    rewards = build_rewards(settings.get("reward", VERDICTS["reward"])) if kind == "prompts" else None
    asked = HeldOut(test, tokenise.tokenise(data.load(world.pair_rows(test), "pairs"), base.tokenizer)[0])
    before = measure(base.model, base.model, base.tokenizer, asked, seed, rewards)
    aligned = engine.run(method, **settings, **_data(folder, kind, train, test), name=method)
    after = measure(aligned.model, base.model, base.tokenizer, asked, seed + 1, rewards)
    against = _scores(asked.answers(base.tokenizer, asked.sampled(base.model, base.tokenizer, seed + 2)))
    _print(method, test, (before, after), against)
    return (
        f"{time.perf_counter() - started:.0f} s. Model: {aligned.folder / 'model'}. "
        f"Metrics: {aligned.folder / 'metrics.jsonl'}. "
        f"Again: alignkit run {aligned.folder / 'config.yaml'} --name again"
    )


def measure(model: Any, base: Any, tokenizer: Any, asked: HeldOut, seed: int, rewards: Rewards | None) -> Measures:
    """Sample answers to every question, and compare what policy and base say about the brief and the chatty one."""
    sampled = asked.sampled(model, tokenizer, seed)
    answers = asked.answers(tokenizer, sampled)
    return Measures(
        answers=answers.completions[::SAMPLES],
        scores=_scores(answers),
        accuracy=measures.preference_accuracy(model, base, asked.pairs),
        kl=measures.kl_of_samples(model, base, asked.pairs, sampled),
        reward=None if rewards is None else sum(rewards.score(answers).total) / len(answers),
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


def _print(method: str, asked: list[world.Question], both: tuple[Measures, Measures], against: list[int]) -> None:
    console = Console(width=None if Console().is_terminal else 120)
    table = Table(f"{len(asked)} held-out questions", "base (SFT)", f"after {method}", box=None)
    n = len(against)
    if both[0].reward is not None:
        table.add_row("mean reward", *(f"{m.reward:.2f}" for m in both))
    table.add_row("win rate against the base", *(f"{measures.win_rate(m.scores, against):.1%}" for m in both))
    table.add_row("sampled answers in the preferred style", *(f"{sum(s == 2 for s in m.scores) / n:.1%}" for m in both))
    table.add_row("sampled answers with the right fact", *(f"{sum(s > 0 for s in m.scores) / n:.1%}" for m in both))
    table.add_row("preference accuracy", *(f"{m.accuracy:.1%}" for m in both))
    table.add_row("KL to the base (nats a sequence)", *(f"{m.kl:.2f}" for m in both))
    console.print(table)
    samples = Table("question", "base (SFT)", f"after {method}", box=None)
    for q, a, b in list(zip(asked, both[0].answers, both[1].answers, strict=True))[:4]:
        samples.add_row(*(escape(t) for t in (q.prompt.split("\n")[0].removeprefix("Question: "), a, b)))
    console.print(samples)


def _folder(output: Path, method: str) -> Path:
    for number in range(1, 10**6):
        folder = output / f"demo-{method}-{number:03d}"
        if not folder.exists():
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise ConfigError(f"cannot make {folder}: {error.strerror}; choose another --output") from error
            return folder
    raise ConfigError(f"{output} is full of demos; choose another --output")
