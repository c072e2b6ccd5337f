"""Metrics of an aligned policy against its base, on held-out prompts: preference accuracy, KL, win rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.metrics import rounding, wins
from alignkit.models.scoring import plain_logps
from alignkit.rollout import Sampled
from alignkit.types import Completion, Example


def preference_accuracy(model: Any, base: Any, pairs: Sequence[Example]) -> float:
    """Return how often log policy - log base is higher for the chosen answer, ties half: 0.5 for the base itself."""
    answers = [[_summed(model, base, e.prompt, c) for c in e.completions] for e in pairs]
    ratios, tolerances = torch.tensor(answers, dtype=torch.float64).unbind(2)
    return float(wins(ratios[:, 0], ratios[:, 1], tolerances.sum(1)).mean())


def kl_of_samples(model: Any, base: Any, prompts: Iterable[Example], sampled: Iterable[Sequence[Sampled]]) -> float:
    """Return KL(policy || base) in nats per sequence: the mean of log policy - log base over the policy's samples."""
    pairs = [(e.prompt, torch.tensor(s.tokens)) for e, samples in zip(prompts, sampled, strict=True) for s in samples]
    ratios = [_logps(model, *pair) - _logps(base, *pair) for pair in pairs]
    return float(torch.stack([r.sum() for r in ratios]).mean())


def win_rate(scores: Sequence[float], opponent: Sequence[float]) -> float:
    """Return how often a score is above the opponent's score at the same place, ties half."""
    return float(wins(torch.tensor(scores), torch.tensor(opponent)).mean())


def _summed(model: Any, base: Any, prompt: Tensor, answer: Completion) -> tuple[float, float]:
    """Return an answer's log policy - log base, and the rounding of this sum."""
    policy, other = (_logps(each, prompt, answer.tokens)[answer.trained_at] for each in (model, base))
    borders = torch.tensor([0, len(policy)], device=policy.device)
    return float((policy - other).double().sum()), float(rounding(borders, policy, other))


@torch.no_grad()
def _logps(model: Any, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of each token of an answer, float32."""
    return plain_logps(model, torch.cat([prompt, tokens]).to(next(model.parameters()).device), len(prompt))
