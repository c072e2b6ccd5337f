"""A sampler elsewhere, as a double: a copy of the model that is a little off, with its own log-probabilities."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from alignkit.rollout import Request, Sampled, Sampler, backends, sample
from alignkit.rollout_settings import Sampling


def drawn_from(logits: Tensor, sampling: Sampling, first: bool, ends: Sequence[int]) -> Tensor:
    """The distribution that a sampler draws from, [V], token by token in plain Python."""
    z = [x / sampling.temperature for x in logits.tolist()]
    order = sorted((i for i in range(len(z)) if not (first and i in ends)), key=lambda i: -z[i])
    order = order[: sampling.top_k] if sampling.top_k else order
    mass, kept, reached = math.fsum(math.exp(z[i]) for i in order), list[int](), 0.0
    for i in order:
        if reached >= sampling.top_p:
            break
        kept.append(i)
        reached += math.exp(z[i]) / mass
    found = torch.full((len(z),), -math.inf, dtype=torch.float64)
    mass = math.fsum(math.exp(z[i]) for i in kept)
    for i in kept:
        found[i] = z[i] - math.log(mass)
    return found


def letters(completions: list[str]) -> list[float]:
    """A reward: how many letters are an e, less a little for every letter."""
    return [text.count("e") - 0.02 * len(text) for text in completions]


class Double(Sampler):
    """Samples with a copy of the weights, off by `noise` of their deviation.

    updates: the versions that were put in force. asked: the version and the seed of every call.
    """

    def __init__(self, folder: str | Path, noise: float = 0.05, processed: bool = True) -> None:
        self.tokenizer, self.noise, self.processed = AutoTokenizer.from_pretrained(folder), noise, processed
        self.model: Any = None
        self.updates: list[int] = []
        self.asked: list[tuple[int, int]] = []

    def update(self, version: int, model: nn.Module) -> None:
        self.model, g = copy.deepcopy(model).requires_grad_(False), torch.Generator().manual_seed(0)
        for parameter in self.model.parameters():
            parameter.add_(self.noise * parameter.std() * torch.randn(parameter.shape, generator=g))
        self.updates.append(version)
        self.version = version

    def sample(self, request: Request) -> list[list[Sampled]]:
        self.asked.append((self.updates[-1], request.seed))
        how: dict[str, Any] = {"n": request.n, "seed": request.seed, "numbers": request.numbers}
        prompts, sampling = request.prompts, request.sampling
        made = sample(self.model, self.tokenizer, prompts, sampling, greedy=request.greedy, **how)
        return [
            [Sampled(s.tokens, s.ended, self._logps(prompt, s.tokens, sampling)) for s in some]
            for prompt, some in zip(prompts, made, strict=True)
        ]

    @torch.no_grad()
    def _logps(self, prompt: Sequence[int], tokens: list[int], sampling: Sampling) -> list[float]:
        logits = self.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].double()
        rule, end = sampling if self.processed else Sampling(), [self.tokenizer.eos_token_id]
        rows = [drawn_from(row, rule, i < rule.min_new_tokens, end) for i, row in enumerate(logits)]
        return [float(row[token]) for row, token in zip(rows, tokens, strict=True)]


def uses(monkeypatch: pytest.MonkeyPatch, sampler: Any) -> None:
    """Make it the sampler that a plugin brings as backend "double"."""
    monkeypatch.setattr(backends, "_factory", lambda name: lambda setup: sampler)
