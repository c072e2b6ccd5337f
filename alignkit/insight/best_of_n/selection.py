"""best_of_n(): samples of a model, their rewards, and the best of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from alignkit.config import RunConfig
from alignkit.data import Dataset, load
from alignkit.data.chat import Chat
from alignkit.data.rows import Content
from alignkit.data.tokenise import tokenise
from alignkit.errors import ConfigError
from alignkit.insight.best_of_n.curve import Point, curve
from alignkit.insight.model_paths import device, model_folder
from alignkit.insight.sampling_settings import OF_SAMPLING, sampling_config
from alignkit.models.loading import from_pretrained, load_tokenizer
from alignkit.rewards import Rewards, build_rewards, check_rewards
from alignkit.rollout import sample
from alignkit.rollout.completions import answers_of
from alignkit.rollout_settings import local_backend
from alignkit.types import Example

logger = logging.getLogger(__name__)

CHUNK = 32  # prompts between two lines of the log
USED = (*OF_SAMPLING[:2], "max_prompt_tokens", *OF_SAMPLING[2:], "rollout")  # settings of a run


@dataclass(frozen=True)
class Samples:
    """A prompt with its n samples. golds: None without a gold reward. ended: False where max_new_tokens cut the sample.

    prompt_cut: whether max_prompt_tokens left the model only the prompt's end; rewards and files have all of the
    prompt.
    """

    row: int
    prompt: Content
    completions: tuple[Content, ...]
    rewards: tuple[float, ...]
    golds: tuple[float, ...] | None
    ended: tuple[bool, ...]
    prompt_cut: bool

    @property
    def best(self) -> int:
        """The sample with the highest reward, the first one if several have it."""
        return max(range(len(self.rewards)), key=lambda i: self.rewards[i])

    @property
    def worst(self) -> int:
        """The sample with the lowest reward, the first one if several have it."""
        return min(range(len(self.rewards)), key=lambda i: self.rewards[i])


@dataclass(frozen=True)
class BestOfN:
    """All samples, and the curve of the best; reward, gold: the names of these rewards."""

    model: str
    n: int
    reward: str
    gold: str | None
    asked: tuple[Samples, ...]
    curve: tuple[Point, ...]


def best_of_n(
    model: str,
    data: object,
    reward: Any,
    *,
    n: int = 16,
    gold: Any = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> BestOfN:
    """Sample n completions of each prompt, and score them.

    model: folder or hub name of a model, an adapter, or a run. data: rows with prompts, of which at most `limit`
    are used. reward, gold: specs (docs/rewards.md); the reward chooses samples, the gold reward chooses nothing.
    settings: those in USED, such as {"sampling.temperature": 0.8, "seed": 1}. Raises AlignkitError.
    """
    if n < 1:
        raise ConfigError(f"n is {n}; give 1 or more")
    for spec in (reward, gold):
        if spec is not None:
            check_rewards(spec)
    folder = model_folder(model)
    config = sampling_config("best-of-n", folder, settings or {}, USED)
    local_backend(config.rollout, "best-of-n")
    rows = load(data, "prompts", columns)
    rows = replace(rows, rows=rows.rows[:limit])
    tokenizer = load_tokenizer(config)
    prompts = _prompts(rows, tokenizer, config.max_prompt_tokens, Chat.of(config))
    run_on = torch.device("cpu") if config.device == "cpu" else device()
    scorers = [build_rewards(spec, run_on) for spec in (reward, gold) if spec is not None]
    policy = from_pretrained(folder, config).to(run_on).eval()
    asked: list[Samples] = []
    for start in range(0, len(prompts), CHUNK):
        asked += _sample_and_score(policy, tokenizer, config, prompts[start : start + CHUNK], start, n, scorers)
        logger.info("sampled and scored %d of %d prompts", len(asked), len(prompts))
    for scorer in scorers:
        scorer.close()
    names = [" + ".join(scorer.names) for scorer in scorers]
    golds = [a.golds for a in asked if a.golds is not None]
    found = curve([a.rewards for a in asked], golds or None)
    return BestOfN(folder, n, names[0], names[1] if gold is not None else None, tuple(asked), found)


def _prompts(rows: Dataset, tokenizer: Any, limit: int | None, chat: Chat) -> list[tuple[Example, bool]]:
    """Return the prompts, each with whether it was cut; logs about the rows what a run logs."""
    prompts, report = tokenise(rows, tokenizer, limit, chat=chat)
    for line in [rows.lines()[0], *(rows.report + report).lines()]:
        logger.info(line)
    whole, _ = tokenise(rows, tokenizer, chat=chat)
    return [(cut, len(cut.prompt) < len(complete.prompt)) for cut, complete in zip(prompts, whole, strict=True)]


def _sample_and_score(
    policy: Any,
    tokenizer: Any,
    config: RunConfig,
    prompts: Sequence[tuple[Example, bool]],
    first: int,
    n: int,
    scorers: Sequence[Rewards],
) -> list[Samples]:
    """Sample and score prompts, numbered from `first`."""
    numbers = range(first, first + len(prompts))
    examples = [e for e, _ in prompts]
    ids = [e.prompt for e in examples]
    backend = local_backend(config.rollout, "best-of-n")
    sampled = sample(policy, tokenizer, ids, config.sampling, n=n, seed=config.seed, numbers=numbers, backend=backend)
    answers = answers_of(tokenizer, examples, sampled)
    scores = [scorer.score(answers).numbers for scorer in scorers]
    found = []
    for i, (example, cut) in enumerate(prompts):
        part = slice(i * n, (i + 1) * n)
        found.append(
            Samples(
                example.row,
                answers.prompts[part][0],
                tuple(answers.completions[part]),
                tuple(scores[0][part]),
                tuple(scores[1][part]) if len(scores) > 1 else None,
                tuple(answers.ended[part]),
                cut,
            )
        )
    return found
