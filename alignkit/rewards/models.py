"""Reward models and pairwise preference models: sequence classifiers with one label, from a folder.

They read the tokens that they were trained on: prompts and completions are tokenised as training data is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from alignkit.data import Dataset
from alignkit.data.chat import Chat
from alignkit.data.rows import Content, Report, Row
from alignkit.data.tokenise import tokenise
from alignkit.errors import ConfigError
from alignkit.hub import meant
from alignkit.pairwise import PAIRWISE, pairwise_ids
from alignkit.rewards.answers import text_of
from alignkit.rewards.classifier import Classifier
from alignkit.rewards.verifiers import Options

_HOW = 'its config.json needs one label ("id2label": {"0": ...}) and a ...ForSequenceClassification architecture'


class ModelOptions(Options):
    """Options of a reward model's folder."""

    max_tokens: int = Field(
        16384, ge=1, description="tokens of a batch, padding included; affects memory, never the result"
    )


def check_folder(folder: str, pairwise: bool) -> None:
    """Raise ConfigError where the folder has no sequence classifier with one label; pairwise: one that compares two."""
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"the folder '{folder}' does not exist.{meant(folder)}")
    if not (path / "config.json").is_file():
        if (path / "model" / "config.json").is_file():
            raise ConfigError(f"'{folder}' is a run's folder; its model is in {path / 'model'}")
        adapter = (path / "adapter_config.json").is_file()
        why = "it has an adapter only; merge it into its base first" if adapter else "it has no config.json"
        raise ConfigError(f"the folder '{folder}' holds no model: {why}")
    try:
        about = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kinds, labels = (
            about.get("architectures") or ["?"],
            len(about.get("id2label", "LR")),
        )  # transformers' default is two labels
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"cannot read {path / 'config.json'}: {error}") from None
    if not kinds[0].endswith("ForSequenceClassification"):
        raise ConfigError(f"the folder '{folder}' holds a {kinds[0]}, which is not a reward model: {_HOW}")
    if labels != 1:
        raise ConfigError(f"the classifier in '{folder}' has {labels} labels; a reward model has 1: {_HOW}")
    if bool(about.get(PAIRWISE)) != pairwise:
        other = f"compares two completions; give it as `judge: {folder}`"
        plain = f"scores single completions; as a judge it is `judge: {{bradley_terry: {folder}}}`"
        raise ConfigError(f"the model in '{folder}' {plain if pairwise else other}")


class RewardModel(Classifier):
    """A reward: the classifier's score of prompt + completion."""

    def __call__(
        self, prompts: Sequence[Content], completions: Sequence[Content], ended: Sequence[bool]
    ) -> list[float]:
        """Score each completion; cut completions have no end-of-sequence token."""

        def sequences() -> list[list[int]]:
            made = trees(self.tokenizer, prompts, [[c] for c in completions])
            return [[*t.prompt, *cut(self.tokenizer, t.completions[0], e)] for t, e in zip(made, ended, strict=True)]

        return self.scores(sequences)


class PairwiseModel(Classifier):
    """A judge: P(first wins) = sigmoid(s(first, second) - s(second, first)), as trained; the order does not matter."""

    def __call__(self, prompts: Sequence[Content], first: Sequence[Content], second: Sequence[Content]) -> list[float]:
        """Compare each pair in both orders."""
        eos, n = self.tokenizer.eos_token_id, len(prompts)

        def sequences() -> list[list[int]]:
            made = trees(self.tokenizer, prompts, list(zip(first, second, strict=True)))
            forwards = [pairwise_ids(t.prompt, t.completions[0], t.completions[1], eos) for t in made]
            return forwards + [pairwise_ids(t.prompt, t.completions[1], t.completions[0], eos) for t in made]

        scores = torch.tensor(self.scores(sequences), dtype=torch.float64)
        return torch.sigmoid(scores[:n] - scores[n:]).tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Tree:
    """Token ids of a prompt and of the completions that continue it."""

    prompt: list[int]
    completions: list[list[int]]


def trees(tokenizer: Any, prompts: Sequence[Content], answers: Sequence[Sequence[Content]]) -> list[Tree]:
    """Tokenise each prompt with its completions as training data is, with an end-of-sequence token after each.

    Messages go through the tokenizer's chat template. An empty completion is an end-of-sequence token only.
    Raises as `alignkit.data.tokenise.tokenise` does.
    """
    # `tokenise` drops rows with empty or equal answers, so such answers are not passed to it
    distinct = [[a for k, a in enumerate(some) if not _empty(a) and a not in some[:k]] for some in answers]
    rows = [Row(p, tuple(some), row=i) for i, (p, some) in enumerate(zip(prompts, distinct, strict=True))]
    made = _tokenised(tokenizer, rows)
    dropped = [Row(row.prompt, row=row.row) for row in rows if row.row not in made]
    made |= _tokenised(tokenizer, dropped)
    found = []
    for i, some in enumerate(answers):
        example = made[i]
        ids = [completion.tokens.tolist() for completion in example.completions]
        by_answer = list(zip(distinct[i], ids, strict=False))
        end = [tokenizer.eos_token_id]
        found.append(
            Tree(example.prompt.tolist(), [next((t for a, t in by_answer if a == answer), end) for answer in some])
        )
    return found


def cut(tokenizer: Any, ids: Sequence[int], ended: bool) -> list[int]:
    """Return a completion's tokens, without the final token that ends it where the completion was cut."""
    ends = {tokenizer.eos_token_id, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    return list(ids[:-1]) if not ended and ids and ids[-1] in ends else list(ids)


def _tokenised(tokenizer: Any, rows: list[Row]) -> dict[int, Any]:
    dataset = Dataset(rows, "text", "completion", "the sampled completions", Report(len(rows)))
    # sampled text is scored as the template shows it; a template that cuts it must not end the run
    return {example.row: example for example in tokenise(dataset, tokenizer, chat=Chat(on_dropped="report"))[0]}


def _empty(answer: Content) -> bool:
    return not text_of(answer).strip()
