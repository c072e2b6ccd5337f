"""Reward models and pairwise preference models: sequence classifiers with one label, from a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from alignkit.data.rows import Content
from alignkit.errors import ConfigError, ModelError
from alignkit.rewards.functions import RowError
from alignkit.rewards.sequences import cut, pairwise_ids, trees
from alignkit.rewards.verifiers import Options

PAIRWISE = "alignkit_pairwise"  # in config.json of a model that reads two completions
_HOW = 'its config.json needs one label ("id2label": {"0": ...}) and a ...ForSequenceClassification architecture'


class ModelOptions(Options):
    """Options of a reward model's folder."""

    max_tokens: int = Field(16384, ge=1, description="tokens of a batch, padding included; memory, never the result")


def check_folder(folder: str, pairwise: bool) -> None:
    """Raise ConfigError where the folder does not hold a sequence classifier with one label, of the kind wanted."""
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"there is no folder '{folder}'")
    if not (path / "config.json").is_file():
        if (path / "model" / "config.json").is_file():
            raise ConfigError(f"'{folder}' is the folder of a run; its model is in {path / 'model'}")
        adapter = (path / "adapter_config.json").is_file()
        why = "an adapter alone; merge it into its base first" if adapter else "no config.json"
        raise ConfigError(f"the folder '{folder}' holds no model: {why}")
    try:
        about = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kinds, labels = about.get("architectures") or ["?"], len(about.get("id2label", "LR"))  # two where not said
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"cannot read {path / 'config.json'}: {error}") from None
    if not kinds[0].endswith("ForSequenceClassification"):
        raise ConfigError(f"the folder '{folder}' holds a {kinds[0]}, which is no reward model: {_HOW}")
    if labels != 1:
        raise ConfigError(f"the classifier in '{folder}' has {labels} labels; a reward model has 1: {_HOW}")
    if bool(about.get(PAIRWISE)) != pairwise:
        other = f"compares two completions; give it as `judge: {folder}`"
        plain = f"scores single completions; as a judge it is `judge: {{bradley_terry: {folder}}}`"
        raise ConfigError(f"the model in '{folder}' {plain if pairwise else other}")


class Classifier:
    """A sequence classifier with one label and its tokenizer: token ids -> scores, float32.

    A score depends on its own tokens alone: the padding is masked, and the last token is found by length.
    Raises ModelError where the folder cannot be loaded, or lacks weights.
    """

    def __init__(self, folder: str, device: torch.device | str, max_tokens: int) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # transformers raises a dozen kinds here
            raise ModelError(f"cannot load a reward model from '{folder}': {type(error).__name__}: {error}") from error
        if missing := sorted(loading["missing_keys"]):  # transformers draws them at random and only warns
            raise ModelError(f"the reward model in '{folder}' lacks weights: {', '.join(missing[:4])}")
        self.folder, self.device, self.max_tokens = folder, torch.device(device), max_tokens
        self.model = model.to(self.device).eval().requires_grad_(False)

    def scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Score every sequence, longest first, in batches of like length; equal ones get equal scores, bit by bit.

        Raises RowError for one that is longer than the model's positions.
        """
        config = self.model.config.get_text_config()
        rotary = getattr(config, "rope_parameters", None) is not None  # goes on for ever
        limit = math.inf if rotary else getattr(config, "max_position_embeddings", math.inf)
        for i, ids in enumerate(sequences):
            if len(ids) > limit:
                raise RowError(
                    i, f"prompt and completion have {len(ids)} tokens, the model in '{self.folder}' reads {limit}"
                )
        found: dict[tuple[int, ...], float] = {}
        left = sorted({tuple(ids) for ids in sequences}, key=lambda ids: (len(ids), ids), reverse=True)
        while left:
            n = max(1, self.max_tokens // len(left[0]))
            batch, left = left[:n], left[n:]
            found |= zip(batch, self._score(batch), strict=True)
        return [found[tuple(ids)] for ids in sequences]

    @torch.no_grad()
    def _score(self, batch: Sequence[tuple[int, ...]]) -> list[float]:
        lengths = torch.tensor([len(ids) for ids in batch], device=self.device)
        width = len(batch[0])
        ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in batch], device=self.device)
        mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        return self._forward(ids, mask, lengths - 1).tolist()  # type: ignore[no-any-return]

    def _forward(self, ids: Tensor, mask: Tensor, last: Tensor) -> Tensor:
        head = getattr(self.model, "score", None)
        if head is None:  # an encoder's head reads its first token, wherever the padding is
            return self.model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).float()  # type: ignore[no-any-return]
        # a decoder's own forward looks for the last token that is not the pad token, which is the last but one where
        # the end-of-sequence token pads
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return head(hidden[torch.arange(len(ids), device=ids.device), last]).squeeze(-1).float()  # type: ignore[no-any-return]


class RewardModel(Classifier):
    """A reward: the classifier's score of prompt + completion."""

    def __call__(
        self, prompts: Sequence[Content], completions: Sequence[Content], ended: Sequence[bool]
    ) -> list[float]:
        """Score each completion; those that were cut have no end-of-sequence token."""
        made = trees(self.tokenizer, prompts, [[c] for c in completions])
        return self.scores(
            [[*t.prompt, *cut(self.tokenizer, t.completions[0], e)] for t, e in zip(made, ended, strict=True)]
        )


class PairwiseModel(Classifier):
    """A judge: P(first wins) = sigmoid(s(first, second) - s(second, first)), as it was trained; order cannot matter."""

    def __call__(self, prompts: Sequence[Content], first: Sequence[Content], second: Sequence[Content]) -> list[float]:
        """Compare each pair in both orders."""
        eos, n = self.tokenizer.eos_token_id, len(prompts)
        forwards, backwards = [], []
        for tree in trees(self.tokenizer, prompts, list(zip(first, second, strict=True))):
            a, b = tree.completions
            forwards.append(pairwise_ids(tree.prompt, a, b, eos))
            backwards.append(pairwise_ids(tree.prompt, b, a, eos))
        scores = torch.tensor(self.scores([*forwards, *backwards]), dtype=torch.float64)
        return torch.sigmoid(scores[:n] - scores[n:]).tolist()  # type: ignore[no-any-return]
