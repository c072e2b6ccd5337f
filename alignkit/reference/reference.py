"""The reference of a run, in one of its four forms.

    cached        scored by the policy before its first update, then read from disk; no second model is ever loaded
    adapter-off   the policy as it was before its new adapters were trained: they are switched off
    full          a frozen copy
    int8          a frozen copy with 8-bit linear layers (bitsandbytes LLM.int8, threshold 0)

In every form, values that do not change pass through the persistent cache, so no row is scored twice on a machine.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from alignkit.config import ReferenceMode
from alignkit.errors import CacheError
from alignkit.models.adapters import before_training, has_start
from alignkit.models.packing import batch_of
from alignkit.models.passes import Autocast, scored
from alignkit.models.ranks import SINGLE, Ranks
from alignkit.models.scoring import Scorer
from alignkit.models.sharding import load_part, local, settle
from alignkit.reference.int8 import to_int8
from alignkit.reference.keys import cached_logps, fill, fingerprint
from alignkit.reference.run_cache import RunCache
from alignkit.types import Batch, Example, Layout

logger = logging.getLogger(__name__)


class Reference:
    """The reference of a run; `logps(examples)` is its main call.

    frozen: the copy of mode "full", where it is sharded. ranks: those that make the passes of a sharded model together.
    """

    def __init__(
        self,
        mode: ReferenceMode,
        policy: Scorer,
        *,
        layout: Layout,
        device: torch.device,
        max_tokens: int,
        cache: RunCache | None,
        compute_dtype: torch.dtype,
        autocast: Autocast = nullcontext,
        temperature: float = 1.0,
        frozen: Scorer | None = None,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.temperature, self._ranks = temperature, ranks
        self.mode, self.layout, self.device, self.max_tokens = mode, layout, device, max_tokens
        self.cache, self._autocast = cache, autocast
        self.scored_examples = 0
        quantisation = "llm.int8" if mode == "int8" else "none"
        self._scorer, self._context = _frozen(mode, policy, frozen)
        self.fingerprint = ""
        if cache is not None:
            adapters = mode != "adapter-off" or has_start(policy.model)  # else the base alone is not the reference
            self.fingerprint = fingerprint(
                policy.model, quantisation=quantisation, dtype=compute_dtype, adapters=adapters
            )

    def prepare(self, examples: Sequence[Example], rank: int = 0, world: int = 1) -> None:
        """Add the missing values of these examples to the cache; an interrupted fill continues where it stopped."""
        if self.cache is not None:
            fill(
                examples,
                self.cache,
                self.fingerprint,
                self._score,
                self.max_tokens,
                _log_fill,
                rank=rank,
                world=world,
                ranks=self._ranks,
            )

    def release(self) -> None:
        """Drop the policy in mode "cached": it is trained from now on, so it is no longer the reference."""
        if self.mode == "cached":
            self._scorer = None

    def logps(self, examples: Sequence[Example], temperature: float | None = None) -> Tensor:
        """Return the log-probabilities, float32 [C] nats on the CPU, from the cache where it has them.

        temperature: of completions that were sampled at another one than the run's; these are in no cache.
        """
        if self.cache is not None and temperature is None:
            return cached_logps(examples, self.cache, self.fingerprint, self._score, self._ranks)
        return self._score(examples, temperature)

    def attach(self, batch: Batch, keep: bool = True) -> Batch:
        """Return the batch with its `reference_logps`; keep=False for rows that no other run will score."""
        logps = self.logps(batch.examples) if keep else self._score(batch.examples, batch.temperature)
        return batch.attach(per_token={"reference_logps": logps.to(batch.device)})

    def update(self, policy: nn.Module, alpha: float) -> None:
        """Move the weights: alpha * policy + (1 - alpha) * reference (TR-DPO, 2404.09656)."""
        assert self.mode == "full"
        assert self._scorer is not None
        with torch.no_grad():
            for own, new in zip(self._scorer.parameters(), policy.parameters(), strict=True):
                local(own).lerp_(local(new).to(own.dtype), alpha)

    def scorer_and_context(self) -> tuple[Scorer, Autocast]:
        """Return the reference, and the context to call it in (its adapters off)."""
        assert self._scorer is not None
        return self._scorer, self._context

    def state(self) -> dict[str, Tensor]:
        """Return the weights of a reference that moves, for a checkpoint."""
        assert self._scorer is not None
        return dict(self._scorer.state_dict())

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` returned, sharded or whole."""
        assert self._scorer is not None
        own = self._scorer.state_dict()
        if own.keys() != tensors.keys():
            raise KeyError(f"the reference's weights differ in {sorted(own.keys() ^ tensors.keys())[:4]}")
        for name, t in tensors.items():
            if t.shape != own[name].shape:
                raise ValueError(f"'{name}' has shape {list(t.shape)}, but the reference's {list(own[name].shape)}")
            load_part(own[name], t)

    def _score(self, examples: Sequence[Example], temperature: float | None = None) -> Tensor:
        if self._scorer is None:
            raise CacheError(
                "the reference was unloaded after its cache was filled, and a row is missing there now: the cache was "
                "cleared, or failed during the run. Continue with --resume, which scores the missing rows first"
            )
        self.scored_examples += len(examples)
        batch = batch_of(examples, self.layout, self.device)
        with torch.no_grad(), self._context(), self._autocast():
            at = self.temperature if temperature is None else temperature
            logps = scored(self._scorer, batch, self.max_tokens, at, self._ranks).cpu()
        settle(self._scorer)
        return logps


def _frozen(mode: ReferenceMode, policy: Scorer, frozen: Scorer | None) -> tuple[Scorer | None, Autocast]:
    if mode == "adapter-off":
        return policy, partial(before_training, policy.model)
    if mode == "cached":
        return policy, nullcontext
    if frozen is None:
        frozen = frozen_copy(policy)
    if mode == "int8":
        frozen.model = to_int8(frozen.model)
    return frozen, nullcontext


def frozen_copy(policy: Scorer) -> Scorer:
    """Return a copy that is not trained."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


def _log_fill(done: int, missing: int) -> None:
    if done == missing:
        logger.info("reference: %d rows scored and written to the cache", done)
