"""One method: trained, then measured on held-out prompts against the base; or the base alone."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from alignkit import data
from alignkit.compare.jobs import Job, rows_of
from alignkit.config import RunConfig
from alignkit.data import tokenise
from alignkit.data.rows import RawRows
from alignkit.demo import against_base as measures
from alignkit.engine import Engine
from alignkit.errors import AlignkitError, DataError
from alignkit.models.loading import from_pretrained, load_tokenizer
from alignkit.rewards import build_judge, build_rewards
from alignkit.rollout import Sampled, sample
from alignkit.rollout.completions import answers_of, distinct
from alignkit.runs.sessions import peak_memory
from alignkit.types import Example

ASKED = 128  # held-out pairs that are looked at, and answers that are sampled


def main(path: Path) -> None:
    """Do the job in the file and write what was measured beside it; what alignkit refuses is printed, exit code 2."""
    try:
        figures = done(Job.read(path))
    except AlignkitError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    path.with_suffix(".figures.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")


def done(job: Job) -> dict[str, float | None]:
    """Train (where there is a method) and return the figures; None where the task gives none.

    win_rate: of sampled answers against the base's, by the task's judge or reward. accuracy: of preferences on held-out
    pairs. kl: nats a sequence. distinct_2: different pairs of tokens, of all. seconds: of the whole run. peak_mib: of
    the process until the run ended; on a GPU of its own memory.
    """
    tokenizer = load_tokenizer(job.config())
    train, held_out = rows_of(job, tokenizer)
    figures: dict[str, float | None] = {"seconds": None, "peak_mib": None}
    base: Any = from_pretrained(str(job.settings["model"]), job.config())
    model = base
    if job.method is not None:
        started = time.perf_counter()
        settings = {k: v for k, v in job.settings.items() if k != "eval_fraction"} | {"data": train}
        model = Engine().run(job.method, **settings, output=job.folder, name=job.method).model
        figures = {"seconds": time.perf_counter() - started, "peak_mib": peak_memory(torch.cuda.is_available()) / 2**20}
    base = base.to(next(model.parameters()).device).eval()
    return measured(job, model, base, tokenizer, held_out) | figures


def measured(job: Job, model: Any, base: Any, tokenizer: Any, held_out: RawRows) -> dict[str, float | None]:
    """Return what `done` says, of a model in memory."""
    config = job.config()
    limits = (config.max_prompt_tokens, config.max_completion_tokens)

    def examples(kind: Any) -> list[Example]:
        return tokenise.tokenise(data.load(held_out, kind, config.columns), tokenizer, *limits)[0][:ASKED]

    prompts = examples("prompts")
    # the same noise for every method; the base meets itself with another
    sampled = _sampled(model, tokenizer, prompts, config, config.seed + 1)
    n_different, n_all = distinct(sampled)
    try:
        accuracy = measures.preference_accuracy(model, base, examples("pairs"))
    except DataError:  # rows without preferences
        accuracy = None
    return {
        "win_rate": _win_rate(job, base, tokenizer, prompts, sampled),
        "accuracy": accuracy,
        "kl": measures.kl_of_samples(model, base, prompts, sampled),
        "distinct_2": n_different / max(n_all, 1),
    }


def _sampled(model: Any, tokenizer: Any, prompts: list[Example], config: RunConfig, seed: int) -> list[list[Sampled]]:
    n = max(1, ASKED // len(prompts))  # few prompts are asked more than once
    return sample(model, tokenizer, [e.prompt for e in prompts], config.sampling, n=n, seed=seed)


def _win_rate(
    job: Job, base: Any, tokenizer: Any, prompts: list[Example], sampled: list[list[Sampled]]
) -> float | None:
    config, device = job.config(), next(base.parameters()).device
    if not job.verdict:
        return None
    opponent = _sampled(base, tokenizer, prompts, config, config.seed)
    mine, theirs = (answers_of(tokenizer, prompts, made) for made in (sampled, opponent))
    if "judge" in job.verdict:
        judge = build_judge(job.verdict["judge"], device)
        wins = judge.wins(mine, theirs)
        judge.close()
        return sum(wins) / len(wins)
    rewards = build_rewards(job.verdict["reward"], device)
    scores = [rewards.score(answers).total for answers in (mine, theirs)]
    rewards.close()
    return measures.win_rate(*scores)
