"""The contract of samplers: tokens in, sampled tokens out, from weights of a version that the caller knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alignkit.models.ranks import SINGLE, Ranks
from alignkit.models.sharding import gathered
from alignkit.rollout.mixture import Mixture
from alignkit.rollout.own_servers import OwnServers
from alignkit.rollout_settings import Rollout, Sampling
from alignkit.types import Example


@dataclass(frozen=True)
class Sampled:
    """A sampled completion.

    tokens: including the token that ended it, or the one that completed a stop string. ended: whether it ended this
    way; False where it was cut. logps: the sampler's own log-probabilities of the tokens, in nats; None where it
    computes what the trainer computes.

    Of a trajectory with an environment, see `alignkit.environments`: trained: which tokens were sampled, the others are
    read only; logps has those of the sampled ones. earned: what the environment paid. messages: the conversation,
    prompt included. turns: of the assistant.
    """

    tokens: list[int]
    ended: bool
    logps: list[float] | None = None
    trained: list[bool] | None = None
    earned: float | None = None
    messages: list[dict[str, Any]] | None = None
    turns: int = 1

    @property
    def n_sampled(self) -> int:
        """Tokens that were sampled."""
        return len(self.tokens) if self.trained is None else sum(self.trained)


@dataclass(frozen=True)
class Request:
    """What a sampler is asked for: n completions of each prompt, which are tokens and never cut.

    seed: from 0 to 2^63 - 1. numbers: identify the prompts; with the seed they identify a completion's randomness.
    mixture: sample from it instead of from the model; only `generate` is asked for that. greedy: take the most likely
    token each time. examples: of the prompts, for a sampler that asks an environment.
    """

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    n: int = 1
    seed: int = 0
    numbers: Sequence[int] = ()
    mixture: Mixture | None = None
    greedy: bool = False
    examples: Sequence[Example] = ()


@dataclass(frozen=True)
class Setup:
    """What a sampler is built from. model: the policy, a causal language model, whose weights change between calls.

    ends: tokens that end a completion, the tokenizer's first. settings: those of `rollout`. folder: of the run.
    autocast: entered around passes of the model. policy: the module that holds the model, which may be sharded.
    servers: those that the run started, which end with the sampler. gather: returns a sharded model's whole weights on
    the main rank, see `engine.gathering.gathered_weights`.
    """

    model: nn.Module
    tokenizer: Any
    ends: Sequence[int]
    settings: Rollout = field(default_factory=Rollout)
    folder: Path = Path()
    ranks: Ranks = SINGLE
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    policy: nn.Module | None = None
    servers: OwnServers | None = None
    gather: Callable[[nn.Module, Path, Ranks, str, bool], dict[str, Tensor]] | None = None

    def gathered(self, blocks: bool = True) -> AbstractContextManager[None]:
        """Inside, each rank holds all weights of a sharded policy, or with blocks=False those outside its blocks."""
        return gathered(*([] if self.policy is None else [self.policy]), blocks=blocks)


class Sampler(ABC):
    """Samples completions. `alignkit.testing.SamplerConformance` checks what a run relies on.

    processed: whether `Sampled.logps` are of the distribution that was sampled from, after temperature, top_k, top_p
    and min_new_tokens; False: of the bare model. version: of the weights in force, None before the first `update`, and
    where they are not known.
    """

    processed: bool = True
    version: int | None = None

    @abstractmethod
    def sample(self, request: Request) -> list[list[Sampled]]:
        """Return the completions of each prompt, [prompt][completion], in the order of the request.

        The same request with the same weights asks for the same randomness. With `rollout.ahead` it is called in a
        thread of its own, one call at a time. Raises RolloutError where completions are missing or come from other
        weights than those of `version`; a part of them is never returned.
        """

    @abstractmethod
    def update(self, version: int, model: nn.Module) -> None:
        """Put the model's weights in force as `version`; every rank calls it, with the same version.

        Raises RolloutError where that fails; `version` is then None.
        """

    def close(self) -> None:  # noqa: B027 - most samplers hold nothing
        """Give back what the sampler holds."""
