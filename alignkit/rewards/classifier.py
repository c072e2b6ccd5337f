"""Sequence classifiers with one label as functions from tokens to scores, whole or sharded over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from alignkit.errors import ModelError
from alignkit.models.ranks import SINGLE, Ranks
from alignkit.models.refusals import cause, reason
from alignkit.models.rope import switch_of
from alignkit.models.sharding import ready, settle, shard
from alignkit.models.unread import FILES, unread
from alignkit.models.values import Grader
from alignkit.rewards.functions import RowError

Ids = Sequence[int]


@dataclass(frozen=True)
class Shared:
    """Ranks that share a model, which is sharded over their mesh: each scores its own answers."""

    ranks: Ranks
    mesh: DeviceMesh


class Classifier:
    """A sequence classifier with one label and its tokenizer: token ids -> scores, float32.

    A score depends on its own tokens alone: the padding is masked, and the last token is found by length.
    shared: by whom it is sharded; all of them must then call `scores` equally often. None: whole.
    Raises ModelError where the folder cannot be loaded, or lacks weights.
    """

    limits_itself = True  # a large model may be slow, but it does end

    def __init__(self, folder: str, device: torch.device | str, max_tokens: int, shared: Shared | None = None) -> None:
        from transformers import AutoTokenizer

        self.folder, self.device, self.max_tokens = folder, torch.device(device), max_tokens
        self.ranks = SINGLE if shared is None else shared.ranks
        try:  # without trust_remote_code=False, transformers asks on the terminal
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model = _in_parts(folder) if shared else None
            self.model: Any = _whole(folder).to(self.device) if model is None else model
        except ModelError:
            raise
        except Exception as error:  # transformers raises many types here
            why = reason(error, folder, code=False)
            raise ModelError(f"cannot load a reward model from '{folder}': {why}") from cause(error)
        self.grader = Grader(self.model.eval().requires_grad_(False))
        if shared:
            shard(self.grader, shared.mesh)
            ready(self.grader, self.device)

    @property
    def is_shared(self) -> bool:
        """Whether it is sharded over ranks."""
        return self.ranks.n > 1

    def scores(self, sequences: Sequence[Ids] | Callable[[], Sequence[Ids]]) -> list[float]:
        """Score every sequence, longest first, in batches of similar length; equal ones get bitwise equal scores.

        sequences: or what returns them, and may fail. Raises what it raises, and RowError for a sequence that is longer
        than the model's positions; where the model is shared, after this rank's part in the others' passes.
        """
        problem: Exception | None = None
        asked, batches = list[Ids](), list[list[tuple[int, ...]]]()
        try:
            asked = list(sequences() if callable(sequences) else sequences)
            self._check_lengths(asked)
            batches = list(self._batches(asked))
        except Exception as error:  # the other ranks wait for this one's part of the weights
            problem = error
        found: dict[tuple[int, ...], float] = {}
        for i in range(self.ranks.most(len(batches))):
            batch = batches[i] if i < len(batches) else []
            scores = self._score(batch or [(0,)])
            found |= zip(batch, scores, strict=True) if batch else ()
        settle(self.grader)
        if problem is not None:
            raise problem
        return [found[tuple(ids)] for ids in asked]

    def _check_lengths(self, sequences: Sequence[Ids]) -> None:
        config = self.model.config.get_text_config()
        rotary = getattr(config, "rope_parameters", None) is not None  # without a limit
        limit = math.inf if rotary else getattr(config, "max_position_embeddings", math.inf)
        for i, ids in enumerate(sequences):
            if len(ids) > limit:
                raise RowError(
                    i,
                    f"prompt and completion have {len(ids)} tokens, the model in '{self.folder}' reads at most {limit}",
                )

    def _batches(self, sequences: Sequence[Ids]) -> Iterator[list[tuple[int, ...]]]:
        switch = switch_of(self.model)
        left = sorted({tuple(ids) for ids in sequences}, key=lambda ids: (len(ids), ids), reverse=True)
        while left:
            n = max(1, self.max_tokens // len(left[0]))
            if switch:  # no pass mixes lengths that have different rotary frequencies
                n = sum(switch.same_as(len(ids)) == switch.same_as(len(left[0])) for ids in left[:n])
            yield left[:n]
            left = left[n:]

    @torch.no_grad()
    def _score(self, batch: Sequence[tuple[int, ...]]) -> list[float]:
        lengths = torch.tensor([len(ids) for ids in batch], device=self.device)
        width = len(batch[0])
        ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in batch], device=self.device)
        mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        return self.grader(ids, mask, lengths - 1).tolist()  # type: ignore[no-any-return]


def _whole(folder: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    model, loading = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    if missing := sorted(loading["missing_keys"]):  # transformers initialises them at random and only warns
        raise ModelError(f"the reward model in '{folder}' lacks weights: {', '.join(missing[:4])}")
    return model


def _in_parts(folder: str) -> nn.Module | None:
    """Return the model without its weights, None where its files cannot be read in parts."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    about = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    options = {"dtype": torch.float32, "trust_remote_code": False}
    model = unread(folder, AutoModelForSequenceClassification, about, options)
    if model is not None and hasattr(model, "score") and "score.weight" not in getattr(model, FILES):
        raise ModelError(f"the reward model in '{folder}' lacks weights: score.weight")
    return model
