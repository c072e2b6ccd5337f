"""Metrics of an aligned policy against its base, on held-out prompts: preference accuracy, KL, win rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.metrics import wins
from alignkit.models.scoring import plain_logps
from alignkit.rollout import Sampled
from alignkit.types import Example


def preference_accuracy(model: Any, base: Any, pairs: Sequence[Example]) -> float:
    """Return how often log policy - log base is higher for the chosen answer, ties half: 0.5 for the base itself."""
    ratios = [[_log_ratio(model, base, e.prompt, c.tokens)[c.trained_at].sum() for c in e.completions] for e in pairs]
    chosen, rejected = torch.tensor(ratios).unbind(1)
    return float(wins(chosen, rejected).mean())


def kl_of_samples(model: Any, base: Any, prompts: Iterable[Example], sampled: Iterable[Sequence[Sampled]]) -> float:
    """Return KL(policy || base) in nats per sequence: the mean of log policy - log base over the policy's samples."""
    ratios = [
        _log_ratio(model, base, e.prompt, torch.tensor(sample.tokens)).sum()
        for e, samples in zip(prompts, sampled, strict=True)
        for sample in samples
    ]
    return float(torch.stack(ratios).mean())


def win_rate(scores: Sequence[float], opponent: Sequence[float]) -> float:
    """Return how often a score is above the opponent's score at the same place, ties half."""
    return float(wins(torch.tensor(scores), torch.tensor(opponent)).mean())


@torch.no_grad()
def _log_ratio(model: Any, base: Any, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Return log policy - log base of each token of an answer, float32."""
    n, ids = len(prompt), torch.cat([prompt, tokens]).to(next(model.parameters()).device)
    return plain_logps(model, ids, n) - plain_logps(base, ids, n)
