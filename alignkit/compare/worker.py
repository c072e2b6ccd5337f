"""One method: trained, then evaluated on held-out prompts against its base; or the base alone."""

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
from alignkit.data.dataset import of_forms
from alignkit.data.rows import RawRows
from alignkit.demo import policy_metrics
from alignkit.engine import Engine
from alignkit.errors import AlignkitError, DataError
from alignkit.files import replace_text
from alignkit.models.loading import from_pretrained, load_tokenizer
from alignkit.rewards import build_judge, build_rewards
from alignkit.rollout import Sampled, sample
from alignkit.rollout.completions import answers_of, distinct
from alignkit.runs.sessions import peak_memory
from alignkit.types import Example

N_EVALUATED = 128  # held-out pairs, and sampled answers


def main(path: Path) -> None:
    """Do the job in the file and write the figures next to it; an AlignkitError is printed, with exit code 2."""
    try:
        figures = run_job(Job.read(path))
    except AlignkitError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    replace_text(path.with_suffix(".figures.json"), json.dumps(figures, indent=2))


def run_job(job: Job) -> dict[str, float | None]:
    """Train (where the job has a method) and return the figures; None where the task does not define one.

    win_rate: of sampled answers against the base's, by the task's judge or reward. accuracy: of preferences on held-out
    pairs. kl: nats per sequence. distinct_2: distinct bigrams of tokens divided by all. seconds: of the whole run.
    peak_mib: memory of the process until the run ended; on a GPU its own memory.
    """
    tokenizer = load_tokenizer(job.config())
    train, held_out = rows_of(job, tokenizer)
    figures: dict[str, float | None] = {"seconds": None, "peak_mib": None}
    base: Any = from_pretrained(str(job.settings["model"]), job.config())
    model = base
    if job.method is not None:
        started = time.perf_counter()
        settings = {k: v for k, v in job.settings.items() if k != "eval_fraction"} | {"data": train}
        model = Engine(**settings).run(job.method, output=job.folder, name=job.method).model
        figures = {"seconds": time.perf_counter() - started, "peak_mib": peak_memory(torch.cuda.is_available()) / 2**20}
    base = base.to(next(model.parameters()).device).eval()
    return evaluated(job, model, base, tokenizer, held_out) | figures


def evaluated(job: Job, model: Any, base: Any, tokenizer: Any, held_out: RawRows) -> dict[str, float | None]:
    """Return the figures that `run_job` defines for a model in memory."""
    config = job.config()

    def examples(kind: Any) -> list[Example]:
        return tokenise.tokenise_as(config, data.load(held_out, kind, of_forms(config.columns)), tokenizer)[0][
            :N_EVALUATED
        ]

    prompts = examples("prompts")
    # the same noise for every method; the base plays against itself with different noise
    sampled = _sampled(model, tokenizer, prompts, config, config.seed + 1)
    n_different, n_all = distinct(sampled)
    try:
        accuracy = policy_metrics.preference_accuracy(model, base, examples("pairs"))
    except DataError:  # rows without preferences
        accuracy = None
    return {
        "win_rate": _win_rate(job, base, tokenizer, prompts, sampled),
        "accuracy": accuracy,
        "kl": policy_metrics.kl_of_samples(model, base, prompts, sampled),
        "distinct_2": n_different / max(n_all, 1),
    }


def _sampled(model: Any, tokenizer: Any, prompts: list[Example], config: RunConfig, seed: int) -> list[list[Sampled]]:
    n = max(1, N_EVALUATED // len(prompts))  # with few prompts, several answers to each
    backend = config.rollout.local or "generate"  # the servers of a run have no weights of others
    return sample(model, tokenizer, [e.prompt for e in prompts], config.sampling, n=n, seed=seed, backend=backend)


def _win_rate(
    job: Job, base: Any, tokenizer: Any, prompts: list[Example], sampled: list[list[Sampled]]
) -> float | None:
    config, device = job.config(), next(base.parameters()).device
    if not job.verdict:
        return None
    opponent = _sampled(base, tokenizer, prompts, config, config.seed)
    answers, opposing = (answers_of(tokenizer, prompts, samples) for samples in (sampled, opponent))
    if "judge" in job.verdict:
        judge = build_judge(job.verdict["judge"], device)
        wins = judge.wins(answers, opposing)
        judge.close()
        return sum(wins) / len(wins)
    rewards = build_rewards(job.verdict["reward"], device)
    totals = [rewards.score(side).total for side in (answers, opposing)]
    rewards.close()
    # where no reward applies to one of the two, they cannot be compared
    both = [(a, b) for a, b in zip(*totals, strict=True) if a is not None and b is not None]
    return policy_metrics.win_rate(*zip(*both, strict=True)) if both else None
