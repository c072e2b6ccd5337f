"""What happens between a model's logits and the next token, the noise excepted, and where a completion ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.rollout.sampler import Sampled
from alignkit.rollout_settings import Sampling


def warpers(sampling: Sampling, ends: Sequence[int], width: int, device: torch.device, greedy: bool) -> list[Any]:
    """Return transformers' logits processors for the settings. width: of the prompts before the sampled tokens."""
    # passed explicitly: `generate` adds its own only where it draws, and these must come after the mixture
    from transformers.generation import logits_process as known

    s, found = sampling, list[Any]()
    if s.min_new_tokens:
        at = torch.tensor(ends, device=device)
        found.append(known.MinNewTokensLengthLogitsProcessor(width, s.min_new_tokens, at, device=str(device)))
    if greedy:  # the others keep the most likely token where it is
        return found
    if s.temperature != 1:
        found.append(known.TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        found.append(known.TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        found.append(known.TopPLogitsWarper(s.top_p))
    return found


class Stops:
    """A stopping criterion of transformers' `generate`: a row ends with the token that completes a stop string.

    Only completions are searched; transformers' own criterion also finds strings that start in the prompt.
    lengths: row -> tokens of its completion, up to the stop string. rows: their numbers, None for the first ones.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        # a token has at least one byte; one token more, because decoders drop a space before the first one
        self.reach = max((len(s.encode()) for s in stop), default=0) + 1
        self.lengths: dict[int, int] = {}
        self.rows: Sequence[int] | None = None

    def __call__(self, input_ids: Tensor, scores: Any) -> Tensor:
        """Return which rows have reached a stop string, bool [R]."""
        tails = input_ids[:, max(self.width, input_ids.shape[1] - self.reach) :]
        texts = self.tokenizer.batch_decode(tails, clean_up_tokenization_spaces=False)
        hits = [any(s in text for s in self.stop) for text in texts]
        for row, hit in zip(range(len(hits)) if self.rows is None else self.rows, hits, strict=True):
            if hit:
                self.lengths.setdefault(row, input_ids.shape[1] - self.width)
        return torch.tensor(hits, device=input_ids.device)


def cut(tokens: Sequence[int], ends: Sequence[int], stopped_at: int | None) -> Sampled:
    """Return a completion up to its end. stopped_at: its tokens up to a stop string, None without one."""
    own = list(tokens[:stopped_at])
    last = next((i for i, token in enumerate(own) if token in ends), None)
    return Sampled(own if last is None else own[: last + 1], last is not None or stopped_at is not None)
