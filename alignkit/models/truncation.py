"""What sampling leaves out of a token's distribution, and how likely the rest is under the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.rollout_settings import Sampling
from alignkit.types import Batch


@dataclass(frozen=True)
class Truncation:
    """The rules by which sampling leaves tokens out: top_k, top_p, and the `ends` of a completion that is too short.

    early: at which of the C tokens a completion is too short to end, bool [C]; None where it always may.
    """

    top_k: int
    top_p: float
    ends: tuple[int, ...] = ()
    early: Tensor | None = None

    @classmethod
    def of(cls, sampling: Sampling, ends: tuple[int, ...], batch: Batch) -> Truncation | None:
        """Return the rules for a batch of sampled completions; None where sampling leaves nothing out."""
        early = None
        if sampling.min_new_tokens:
            numbers_C = torch.arange(len(batch.targets), device=batch.device)
            numbers_C = numbers_C - batch.cu_seqlens[:-1].repeat_interleave(batch.lengths)
            early = numbers_C < sampling.min_new_tokens
        if not sampling.top_k and sampling.top_p == 1 and early is None:
            return None
        return cls(sampling.top_k, sampling.top_p, ends, early)

    def kept(self, z_nV: Tensor, targets_n: Tensor, at: slice) -> Tensor:
        """Return the log of the total probability of the tokens that are kept, [n] nats; the targets are kept.

        z: logits as they are sampled from, but for these rules. at: the rows among the C tokens.
        """
        from transformers.generation import logits_process as known

        scores: Any = z_nV
        if self.early is not None:
            of_end = torch.zeros(z_nV.shape[1], dtype=torch.bool, device=z_nV.device)
            of_end[list(self.ends)] = True
            scores = scores.masked_fill(self.early[at, None] & of_end, -torch.inf)
        if self.top_k:  # as `generate` does it, in its order
            scores = known.TopKLogitsWarper(self.top_k)(None, scores)
        if self.top_p < 1:
            scores = known.TopPLogitsWarper(self.top_p)(None, scores)
        kept = (scores > -torch.inf).scatter(1, targets_n[:, None], True)
        return torch.where(kept, z_nV, -torch.inf).logsumexp(1) - z_nV.logsumexp(1)
