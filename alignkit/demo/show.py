"""Run the demo and print before and after."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignkit.config import Sampling
from alignkit.demo import world
from alignkit.demo.base import write_start
from alignkit.engine import Engine
from alignkit.errors import ConfigError, nearest
from alignkit.metrics import wins
from alignkit.models import plain_logps
from alignkit.rollout import sample

# A model of a million parameters wants rates a hundred times those of the billions that the defaults are for.
SFT = {"learning_rate": 2e-3, "epochs": 24, "batch_size": 32, "warmup_fraction": 0.05}
SHARED = {"batch_size": 16, "epochs": 2, "max_prompt_tokens": 64, "max_completion_tokens": 64}
LENGTH = Sampling(max_new_tokens=64)
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"learning_rate": 1e-4},
    "ipo": {"learning_rate": 1e-4},
    "kto": {"learning_rate": 1e-4, "batch_size": 32},  # a pair is two examples
    "orpo": {"learning_rate": 1e-3, "lambda_": 0.5},
    "simpo": {"learning_rate": 1e-4},
    "cpo": {"learning_rate": 5e-4},
}


@dataclass(frozen=True)
class Measures:
    """What the demo measures on held-out questions. answers: one sample a question."""

    answers: list[str]
    brief: float
    facts: float
    accuracy: float
    kl: float


def run_demo(method: str, output: Path, seed: int) -> str:
    """Make the task, fine-tune, align with `method`, and print the tables; return the last words."""
    if method not in SETTINGS:
        raise ConfigError(f"the demo has no '{method}'; it has {', '.join(SETTINGS)}.{nearest(method, SETTINGS)}")
    started = time.perf_counter()
    folder = _folder(output, method)
    train, held_out = world.questions(seed)
    rows = world.write_jsonl(folder / "data/sft.jsonl", world.sft_rows(train))
    pairs = world.write_jsonl(folder / "data/pairs.jsonl", world.pair_rows(train))
    test = world.write_jsonl(folder / "data/held-out.jsonl", world.pair_rows(held_out))
    texts = [q.prompt + answer for q in train for answer in (q.brief, q.chatty)]
    start = write_start(folder / "start", texts, seed)

    engine = Engine(output=folder, seed=seed, reference_cache=True, cache_file=folder / "reference.sqlite")
    base = engine.run("sft", model=str(start), data=str(rows), name="sft", **SFT)
    before = measure(base.model, base.model, base.tokenizer, held_out, seed)
    aligned = engine.run(
        method,
        model=str(folder / "sft/model"),
        data=str(pairs),
        eval_data=str(test),
        name=method,
        **{**SHARED, **SETTINGS[method]},
    )
    after = measure(aligned.model, base.model, base.tokenizer, held_out, seed + 1)
    _print(method, held_out, before, after, _win_rates(base, held_out, before, after, seed))
    return (
        f"{time.perf_counter() - started:.0f} s. Model: {aligned.folder / 'model'}. "
        f"Metrics: {aligned.folder / 'metrics.jsonl'}. "
        f"Again: alignkit run {aligned.folder / 'config.yaml'} --name again"
    )


def measure(model: Any, base: Any, tokenizer: Any, held_out: list[world.Question], seed: int) -> Measures:
    """Sample an answer to every question, and compare what policy and base say about the brief and the chatty one.

    accuracy: how often log policy - log base is higher for the brief answer, ties half; 50 % for the base itself.
    kl: of the policy from the base in nats a sequence, the mean of log policy - log base over the policy's own samples.
    """
    answers = [one.tokens for (one,) in sample(model, tokenizer, [q.prompt for q in held_out], LENGTH, seed=seed)]
    texts = [tokenizer.decode(a, skip_special_tokens=True) for a in answers]
    scores = [world.score(q, t) for q, t in zip(held_out, texts, strict=True)]
    prefers, kl = [], []
    for q, answer in zip(held_out, answers, strict=True):
        prompt = tokenizer(q.prompt)["input_ids"]
        brief, chatty = (tokenizer(a)["input_ids"] + [tokenizer.eos_token_id] for a in (q.brief, q.chatty))
        prefers.append(wins(_log_ratio(model, base, prompt, brief), _log_ratio(model, base, prompt, chatty)))
        kl.append(_log_ratio(model, base, prompt, answer))
    return Measures(
        answers=texts,
        brief=sum(s == 2 for s in scores) / len(scores),
        facts=sum(s > 0 for s in scores) / len(scores),
        accuracy=float(torch.stack(prefers).mean()),
        kl=float(torch.stack(kl).mean()),
    )


def _log_ratio(model: Any, base: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.tensor(prompt + answer, device=next(model.parameters()).device)
        return (plain_logps(model, ids, len(prompt)) - plain_logps(base, ids, len(prompt))).sum()


def _win_rates(base: Any, asked: list[world.Question], before: Measures, after: Measures, seed: int) -> list[float]:
    """How often the judge prefers an answer to a fresh one of the base model, ties half: (before, after)."""
    others = sample(base.model, base.tokenizer, [q.prompt for q in asked], LENGTH, seed=seed + 2)
    against = [
        world.score(q, base.tokenizer.decode(o.tokens, skip_special_tokens=True))
        for q, (o,) in zip(asked, others, strict=True)
    ]
    rates = []
    for m in (before, after):
        mine = torch.tensor([world.score(q, a) for q, a in zip(asked, m.answers, strict=True)])
        rates.append(float(wins(mine, torch.tensor(against)).mean()))
    return rates


def _print(method: str, asked: list[world.Question], before: Measures, after: Measures, win_rates: list[float]) -> None:
    console = Console(width=None if Console().is_terminal else 120)
    table = Table(f"{len(asked)} held-out questions", "base (SFT)", f"after {method}", box=None)
    table.add_row("win rate against the base", *(f"{r:.1%}" for r in win_rates))
    table.add_row("sampled answers in the preferred style", f"{before.brief:.1%}", f"{after.brief:.1%}")
    table.add_row("sampled answers with the right fact", f"{before.facts:.1%}", f"{after.facts:.1%}")
    table.add_row("preference accuracy", f"{before.accuracy:.1%}", f"{after.accuracy:.1%}")
    table.add_row("KL to the base (nats a sequence)", f"{before.kl:.2f}", f"{after.kl:.2f}")
    console.print(table)
    samples = Table("question", "base (SFT)", f"after {method}", box=None)
    for q, a, b in list(zip(asked, before.answers, after.answers, strict=True))[:4]:
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
