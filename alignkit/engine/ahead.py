"""A sampler with weights of its own: the version of its weights, and what it samples one step ahead.

With `rollout.ahead` the completions of step k are sampled, in a thread, while step k - 1 is learned: with the weights
from before its updates, version k - 1. A copy of these weights stays until the completions are scored.

    step k:   take its completions -> weights k into the sampler -> begin with step k + 1 -> score, learn
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from alignkit.models.earlier_weights import EarlierWeights
from alignkit.models.ranks import SINGLE, Ranks
from alignkit.rollout import Request, Sampled, Sampler

Made = list[list[Sampled]]
Together = Callable[[str, Callable[[], Any]], Any]  # a call of all ranks, which fails on all of them


@dataclass(frozen=True)
class Ask:
    """What one call of `ctx.rollouts` asks of a sampler. step: optimiser steps before it. call: its number there."""

    step: int
    call: int
    request: Request

    @property
    def marks(self) -> list[int]:
        """A number for each prompt, by which it is known in a resumed run."""
        return [zlib.crc32(repr(list(prompt)).encode()) for prompt in self.request.prompts]

    @property
    def how(self) -> str:
        """What is the same in every step of a method that asks for the same."""
        return f"{self.request.n} {self.request.greedy} {self.request.sampling.model_dump_json()}"


@dataclass(frozen=True)
class Early:
    """Completions that were sampled ahead. version: the weights that sampled them. marks, how: see `Ask`."""

    version: int
    marks: list[int]
    how: str
    made: Future[Made]


class Ahead:
    """Samples by a sampler, at most `steps` (0 or 1) ahead of the learning.

    model: whose weights the sampler gets. trained: all that is trained with it, of which a copy is kept.
    A version of the sampler's weights is the number of steps before it.
    early: by step and call, what was sampled ahead; kept until a later step begins, so that a checkpoint has it.
    """

    def __init__(
        self, sampler: Sampler, model: nn.Module, trained: nn.Module, steps: int, ranks: Ranks = SINGLE
    ) -> None:
        self.sampler, self.model, self.steps, self.ranks = sampler, model, steps, ranks
        self.early: dict[tuple[int, int], Early] = {}
        self.weights, self.weights_of = EarlierWeights(trained), -1
        self._thread = ThreadPoolExecutor(1, "sampling-ahead") if steps else None

    def sample(self, ask: Ask, following: Callable[[], Ask | None], together: Together) -> Made:
        """Return the completions of a call, and begin with the same call of the next step. Raises as the sampler."""
        early = self._fitting(ask)
        made: Made | None = together("sampling", early.made.result) if early else None
        later = following() if self._thread else None
        if made is None or later is not None:
            self._put_in_force(ask.step, together)
        if made is None:
            made = together("sampling", lambda: self._now(ask))
        if self._thread and later is not None:
            self.early = {k: v for k, v in self.early.items() if k[0] >= ask.step}
            found = self._thread.submit(self.sampler.sample, later.request)
            self.early[later.step, later.call] = Early(ask.step, later.marks, later.how, found)
        return made

    def keep_weights(self, step: int) -> None:
        """Copy the weights, before the first update of a step moves them, where they sample the next step now."""
        if any(at > step for at, _ in self.early):
            self.weights.take()
            self.weights_of = step

    def outdated(self) -> None:
        """Note that the weights changed other than by a step, so that the sampler gets them again."""
        self.sampler.version = None

    @contextmanager
    def as_sampled(self, ask: Ask) -> Iterator[None]:
        """Put the weights in force that sampled the completions of a call, for passes without a gradient."""
        early = self._early(ask)
        if early is None or early.version != self.weights_of:  # they have not moved since
            yield
            return
        with self.weights.in_force():
            yield

    def close(self) -> None:
        """End the sampler; what it still samples is lost."""
        self.sampler.close()
        if self._thread:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _put_in_force(self, version: int, together: Together) -> None:
        """Give the sampler the weights as they are now, unless it has them; no rank samples meanwhile."""
        if self.sampler.version == version:
            return
        # ranks may share a server, and another rank's completions are of the version before: all wait for all
        together("sync", lambda: wait([one.made for one in self.early.values()]))
        together("sync", lambda: self.sampler.update(version, self.model))

    def _fitting(self, ask: Ask) -> Early | None:
        """Return what was sampled ahead for a call, where all ranks have it; all must call it."""
        if self._thread is None:
            return None
        early = self._early(ask)
        if self.ranks.most(int(early is None)):
            self.early.pop((ask.step, ask.call), None)
            return None
        return early

    def _now(self, ask: Ask) -> Made:
        """Sample a call; in the thread where there is one, so that a sampler is asked for one thing at a time."""
        if self._thread is None:
            return self.sampler.sample(ask.request)
        return self._thread.submit(self.sampler.sample, ask.request).result()

    def _early(self, ask: Ask) -> Early | None:
        """Return what was sampled ahead for a call; None where the method asks for something else than a step ago."""
        found = self.early.get((ask.step, ask.call))
        return found if found and found.marks == ask.marks and found.how == ask.how else None
