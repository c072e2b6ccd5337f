"""Samplers that do not use the training process's model, such as a server: what the engine asks of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from alignkit.config import Sampling
from alignkit.errors import ConfigError
from alignkit.rollout.batched import Sampled
from alignkit.rollout_settings import Rollout


class Sampler(Protocol):
    """Samples completions with weights of its own, which `update` sets.

    processed: whether its log-probabilities are of the distribution that it draws from; False: of the bare model,
    without temperature, top_k, top_p and min_new_tokens (vLLM's default).
    """

    processed: bool

    def update(self, version: int, model: nn.Module) -> None:
        """Put the weights of `model` in force, as version `version`: the optimiser steps that they have had."""
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        n: int,
        seed: int,
        numbers: Sequence[int],
        greedy: bool,
    ) -> list[list[Sampled]]:
        """Return n completions of each prompt with the sampler's `logps`, see `alignkit.rollout.sample`."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


def is_comparable(processed: bool, sampling: Sampling) -> bool:
    """Return whether a sampler's log-probabilities can be compared with the trainer's.

    Those of the bare model cannot be turned into those at a temperature: the sum over the vocabulary is not known.
    """
    bare = sampling.temperature == sampling.top_p == 1 and not sampling.top_k and not sampling.min_new_tokens
    return processed or bare


def check_comparable(processed: bool, sampling: Sampling, rollout: Rollout) -> None:
    """Raise ConfigError where a correction would compare two different distributions."""
    if rollout.corrects == "none" or is_comparable(processed, sampling):
        return
    given = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_new_tokens")}
    changed = ", ".join(f"{k} {v:g}" for k, v in given.items() if v != type(sampling).model_fields[k].default)
    raise ConfigError(
        f"the sampler returns log-probabilities of the bare model, but completions are drawn with {changed}, so that "
        "rollout.correction would compare two distributions. Let it return those that it draws from (vLLM: "
        "--logprobs-mode processed_logprobs), remove these settings of `sampling`, or set rollout.correction: none"
    )
