"""A reward at every prefix of an answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import regex
import torch

from alignkit.data.rows import Content
from alignkit.errors import ConfigError, RewardError
from alignkit.insight.inspect.token_texts import token_texts
from alignkit.insight.model_paths import device, model_folder
from alignkit.rewards import Answers, build_rewards
from alignkit.rewards.answers import text_of
from alignkit.rewards.classifier import Classifier
from alignkit.rewards.functions import RowError
from alignkit.rewards.models import ModelOptions, RewardModel, check_folder, trees

SAME = 1e-3  # of the largest score: rounding, smaller than the effect of a later token


@dataclass(frozen=True)
class Prefixes:
    """A reward along an answer.

    unit: "tokens", or "words" for a reward that reads text. pieces: the answer's, in order. scores: of the prefix that
    ends with each piece, in the reward's units; the last is the answer's. start: the score of the prompt alone, None
    where the reward reads text.
    """

    reward: str
    prompt: str
    unit: str
    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    start: float | None = None

    @property
    def changes(self) -> tuple[float, ...]:
        """The change of the score with each piece; 0 for the first piece where there is no start."""
        before = [self.scores[0] if self.start is None else self.start, *self.scores]
        return tuple(after - b for b, after in zip(before, self.scores, strict=False))

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**asdict(self), "changes": self.changes}


def reward_prefixes(reward: Any, text: str, prompt: Content = "") -> Prefixes:
    """Score every prefix of an answer.

    reward: the folder of a reward model (or of its run), read token by token; any other spec
    (docs/rewards.md) word by word. prompt: text, or messages for the model's chat template. Raises ConfigError,
    ModelError and RewardError.
    """
    if not text.strip():
        raise ConfigError("the text is empty; give an answer")
    if isinstance(reward, str | Path) and (os.sep in str(reward) or Path(reward).is_dir()):
        folder = model_folder(os.path.expanduser(reward))
        check_folder(folder, pairwise=False)
        return _by_tokens(folder, text, prompt)
    return _by_words(reward, text, prompt)


def prefix_scores(model: Classifier, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """Return the model's score of the prompt followed by 0, 1, ... all of the tokens, each prefix on its own.

    A causal model scores all prefixes in one pass; two prefixes show whether it is causal.
    """
    sequences = [[*prompt, *ids[:n]] for n in range(len(ids) + 1)]
    try:
        whole = model.scores([sequences[-1]])
        head = getattr(model.model, "score", None)
        if head is None:
            return model.scores(sequences)
        with torch.no_grad():
            input_ids = torch.tensor([sequences[-1]], device=model.device)
            hidden = model.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0]
            scores: list[float] = head(hidden[len(prompt) - 1 :]).squeeze(-1).float().tolist()
        at = [0, len(ids) // 2]
        alone = [*model.scores([sequences[i] for i in at]), *whole]
    except RowError as error:
        raise RewardError(str(error)) from None
    scale = max(1.0, *map(abs, scores))
    if all(abs(scores[i] - s) <= SAME * scale for i, s in zip([*at, -1], alone, strict=True)):
        return scores
    return model.scores(sequences)


def _by_tokens(folder: str, text: str, prompt: Content) -> Prefixes:
    model = RewardModel(folder, device(), ModelOptions().max_tokens)
    answer: Content = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    (tree,) = trees(model.tokenizer, [prompt], [[answer]])
    (ids,) = tree.completions
    start, *scores = prefix_scores(model, tree.prompt, ids)
    texts = tuple(token_texts(model.tokenizer, tree.prompt, ids))
    return Prefixes(folder, text_of(prompt), "tokens", texts, tuple(scores), start)


def _by_words(spec: Any, text: str, prompt: Content) -> Prefixes:
    rewards = build_rewards(spec, device())
    words: list[str] = regex.findall(r"\s*\S+", text)
    n = len(words)
    prefixes: list[Content] = ["".join(words[: i + 1]) for i in range(n)]
    if not isinstance(prompt, str):
        prefixes = [[{"role": "assistant", "content": text_of(prefix)}] for prefix in prefixes]
    answers = Answers([prompt] * n, prefixes, {}, [1] * n, list(range(1, n + 1)), [i == n - 1 for i in range(n)])
    scores = rewards.score(answers).numbers
    rewards.close()
    return Prefixes(" + ".join(rewards.names), text_of(prompt), "words", tuple(words), tuple(scores))
