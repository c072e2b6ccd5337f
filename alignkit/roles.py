"""Who plays which part in a run: the policy, and the reference in one of its four forms.

    cached        scored by the policy before its first update, then served from disk; no second model is ever loaded
    adapter-off   the policy with its adapters switched off
    full          a frozen copy
    int8          a frozen copy with 8-bit linear layers (bitsandbytes LLM.int8, threshold 0)

Whatever the form, values that do not change pass through the persistent cache, so no row is scored twice on a machine.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.config import ReferenceMode, RunConfig
from alignkit.errors import ConfigError, PluginError
from alignkit.logpcache import LogpCache
from alignkit.method import Method
from alignkit.models import Scorer
from alignkit.packing import batch_of
from alignkit.quantise import to_int8
from alignkit.reference import cached_logps, fill, fingerprint
from alignkit.scalars import ActorCritic, Valuer
from alignkit.types import Batch, Example, Layout, Outputs

logger = logging.getLogger(__name__)

Autocast = Callable[[], AbstractContextManager[Any]]


def _own(n: int) -> int:
    return n


class Roles:
    """The models a method may ask; a role that it did not declare in `uses` is refused.

    trained: the trained module, wrapped or not. plain: the same module unwrapped, for passes without a gradient.
    temperature: what completions are sampled at, and scored at.
    """

    def __init__(
        self,
        method: Method[Any],
        trained: nn.Module,
        plain: Scorer | ActorCritic | Valuer,
        reference: Reference | None,
        max_tokens: int,
        temperature: float = 1.0,
    ) -> None:
        self._method, self._trained, self._plain, self._reference = method, trained, plain, reference
        self.max_tokens, self.temperature = max_tokens, temperature
        self.autocast: Autocast = nullcontext
        self.most: Callable[[int], int] = _own

    def policy(self, batch: Batch, entropy: bool = False, values: bool = False, frozen: bool = False) -> Outputs:
        """Score the batch's targets with the policy; without a gradient in parts of `max_tokens` tokens."""
        self._declared("policy")
        if values:
            self._declared("critic")
        module = self._trained if torch.is_grad_enabled() else self._plain
        options = {"frozen": True} if frozen else {}

        def said(part: Batch) -> tuple[Tensor, ...]:
            out = module(part.rows, part.targets, self.temperature, entropy, **options)
            return tuple(t for t in (out if isinstance(out, tuple) else (out,)) if t is not None)

        if frozen and not values:
            raise PluginError("a frozen policy is scored without a gradient only beside its critic: values=True")
        numbers = said(batch) if torch.is_grad_enabled() else self._by_parts(batch, said)
        return Outputs(numbers[0], numbers[1] if entropy else None, numbers[-1] if values else None)

    def reference(self, batch: Batch) -> Outputs:
        """Score the batch's targets with the reference, without a gradient."""
        self._declared("reference")
        assert self._reference is not None
        return Outputs(self._reference.logps(batch.examples).to(batch.device))

    def reward(self, batch: Batch) -> Tensor:
        """Score each completion as a whole with the reward model that is trained."""
        self._declared("reward")
        if "reward" not in self._method.trains:
            raise PluginError(f"'{self._method.name}' does not train a reward model: `ctx.rollouts` brings the rewards")
        module = self._trained if torch.is_grad_enabled() else self._plain
        with nullcontext() if torch.is_grad_enabled() else self.autocast():
            return module(batch.rows, batch.rows.last_at)  # type: ignore[no-any-return]

    def _by_parts(self, batch: Batch, said: Callable[[Batch], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        with self.autocast():
            return in_parts(said, batch, self.max_tokens, self.most)

    def _declared(self, role: str) -> None:
        if role not in self._method.roles():
            raise PluginError(
                f"method '{self._method.name}' asked for the role '{role}' without declaring it; "
                f"add it: uses = frozenset({sorted({*self._method.uses, role})})"
            )


class Reference:
    """The reference of a run. `logps(examples)` is all that anybody asks of it."""

    def __init__(
        self,
        mode: ReferenceMode,
        policy: Scorer,
        *,
        layout: Layout,
        device: torch.device,
        max_tokens: int,
        cache: LogpCache | None,
        compute_dtype: torch.dtype,
        autocast: Autocast = nullcontext,
        temperature: float = 1.0,
    ) -> None:
        self.temperature = temperature
        self.mode, self.layout, self.device, self.max_tokens = mode, layout, device, max_tokens
        self.cache, self._autocast = cache, autocast
        self.scored_examples = 0
        quantisation = "llm.int8" if mode == "int8" else "none"
        self._scorer, self._context = _frozen(mode, policy)
        self.fingerprint = ""
        if cache is not None:
            adapters = mode != "adapter-off"
            self.fingerprint = fingerprint(
                policy.model, quantisation=quantisation, dtype=compute_dtype, adapters=adapters
            )

    def prepare(self, examples: Sequence[Example], rank: int = 0, world: int = 1) -> None:
        """Fill the cache with what it lacks of these examples; an interrupted fill goes on where it was."""
        if self.cache is not None:
            fill(examples, self.cache, self.fingerprint, self._score, self.max_tokens, _said, rank=rank, world=world)

    def release(self) -> None:
        """Let go of the policy in mode "cached": from now on it is trained, and is the reference no more."""
        if self.mode == "cached":
            self._scorer = None

    def logps(self, examples: Sequence[Example]) -> Tensor:
        """Return float32 [C] nats on the CPU, from the cache where it knows them."""
        if self.cache is not None:
            return cached_logps(examples, self.cache, self.fingerprint, self._score)
        return self._score(examples)

    def attach(self, batch: Batch, keep: bool = True) -> Batch:
        """Return the batch with its `reference_logps`; keep=False for rows that no other run will ask about."""
        logps = self.logps(batch.examples) if keep else self._score(batch.examples)
        return batch.attach(per_token={"reference_logps": logps.to(batch.device)})

    def update(self, policy: nn.Module, alpha: float) -> None:
        """Move the weights: alpha * policy + (1 - alpha) * reference (TR-DPO, 2404.09656)."""
        assert self.mode == "full"
        assert self._scorer is not None
        with torch.no_grad():
            for mine, theirs in zip(self._scorer.parameters(), policy.parameters(), strict=True):
                mine.lerp_(theirs.to(mine.dtype), alpha)

    def model_and_context(self) -> tuple[nn.Module, Autocast]:
        """Return the reference as a language model, and what to enter while it is asked (its adapters off)."""
        assert self._scorer is not None
        return self._scorer.model, self._context

    def state(self) -> dict[str, Tensor]:
        """Return the weights of a reference that moves, for a checkpoint."""
        assert self._scorer is not None
        return dict(self._scorer.state_dict())

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        assert self._scorer is not None
        self._scorer.load_state_dict(tensors)

    def _score(self, examples: Sequence[Example]) -> Tensor:
        if self._scorer is None:
            raise ConfigError(
                "the reference was unloaded after its cache was filled, and a row is missing there now; "
                "was the cache cleared during the run? Start again with --resume"
            )
        self.scored_examples += len(examples)
        batch = batch_of(examples, self.layout, self.device)
        with torch.no_grad(), self._context(), self._autocast():
            return scored(self._scorer, batch, self.max_tokens, temperature=self.temperature).cpu()


def _frozen(mode: ReferenceMode, policy: Scorer) -> tuple[Scorer | None, Autocast]:
    if mode == "adapter-off":
        return policy, policy.model.disable_adapter  # type: ignore[return-value]
    if mode == "cached":
        return policy, nullcontext
    frozen = copy.deepcopy(policy).requires_grad_(False).eval()
    if mode == "int8":
        frozen.model = to_int8(frozen.model)
    return frozen, nullcontext


def _said(done: int, missing: int) -> None:
    if done == missing:
        logger.info("reference: %d rows scored and kept", done)


def scored(scorer: nn.Module, batch: Batch, max_tokens: int, temperature: float = 1.0) -> Tensor:
    """Score a batch of any size in parts of `max_tokens` tokens; float32 [C] in the batch's order."""
    (logps_C,) = in_parts(lambda part: (scorer(part.rows, part.targets, temperature),), batch, max_tokens)
    return logps_C


def in_parts(
    say: Callable[[Batch], tuple[Tensor, ...]], batch: Batch, max_tokens: int, most: Callable[[int], int] = _own
) -> tuple[Tensor, ...]:
    """Call `say` on parts of `max_tokens` tokens and put its tensors [c] together: float32 [C] in the batch's order.

    Where memory runs out the parts are halved, unless other ranks wait for as many of them.
    """
    numbered = batch.attach(per_token={"at": torch.arange(len(batch.targets), device=batch.device)})
    try:
        return _in_parts(say, numbered, max_tokens, most)
    except torch.OutOfMemoryError:
        if most is not _own or max_tokens // 2 < max(batch.cost(i) for i in range(len(batch))):
            raise
    logger.warning("out of memory: scoring parts of %d tokens, which changes no result", max_tokens // 2)
    return in_parts(say, batch, max_tokens // 2, most)


def _in_parts(
    say: Callable[[Batch], tuple[Tensor, ...]], numbered: Batch, max_tokens: int, most: Callable[[int], int]
) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = ()
    for part, _ in in_step(numbered.micro_batches(max_tokens), most):
        said = say(part)
        out = out or tuple(torch.empty(len(numbered.targets), device=numbered.device) for _ in said)
        for whole, numbers in zip(out, said, strict=True):
            whole[part["at"]] = numbers.float()
    return out


def in_step(parts: list[Batch], most: Callable[[int], int]) -> Iterator[tuple[Batch, float]]:
    """Yield (part, 1.0), and after them the last part with weight 0.0, until this rank made as many as the busiest.

    A forward pass of a sharded model and a backward pass under data parallelism are met by all ranks or by none.
    """
    for i in range(most(len(parts))):
        yield parts[min(i, len(parts) - 1)], float(i < len(parts))


def check_reference(config: RunConfig, method: Method[Any]) -> None:
    """Raise ConfigError where the form of the reference that was asked for cannot serve the method; loads nothing."""
    if "reference" not in method.roles():
        return
    need, mode = method.reference_need(), config.reference
    if need == "moving" and (config.fsdp or config.lora):
        # mixing two adapters factor by factor is not mixing the weights that they stand for
        raise ConfigError(f"'{method.name}' moves its reference, which needs all weights: leave out lora and fsdp")
    if need == "moving" and mode not in ("auto", "full"):
        raise ConfigError(f"'{method.name}' moves its reference, which needs reference: full; given: {mode}")
    if mode == "adapter-off" and config.lora is None:
        raise ConfigError("reference: adapter-off needs fresh adapters; add `lora`, or use reference: auto")
    if mode == "adapter-off" and not _switchable(config, method):
        raise ConfigError(f"reference: adapter-off cannot serve '{method.name}' under fsdp; use reference: full")
    if mode == "cached" and need != "rows":
        raise ConfigError(
            f"reference: cached cannot serve '{method.name}', which asks the reference about rows that are made "
            f"during the run; use reference: auto, full or int8"
        )
    if mode == "cached" and not config.reference_cache:
        raise ConfigError("reference: cached needs reference_cache: true")


def resolve_reference(
    config: RunConfig, method: Method[Any], device: torch.device, n_bytes: int
) -> ReferenceMode | None:
    """Decide the reference's form, None where the method has none; `check_reference` has passed.

    n_bytes: memory of a second copy of the policy.
    """
    if "reference" not in method.roles():
        return None
    if config.reference != "auto":
        return config.reference
    need = method.reference_need()
    if need == "moving":
        return "full"
    if _switchable(config, method):
        return "adapter-off"
    if need == "rows" and config.reference_cache:
        return "cached"
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 3 * n_bytes:
        return "int8"
    return "full"


def _switchable(config: RunConfig, method: Method[Any]) -> bool:
    """May the policy with its adapters off be the reference?"""
    if config.lora is None:
        return False
    # once the policy is sharded, ranks that ask it about different numbers of rows would wait for each other
    return not config.fsdp or (method.reference_need() == "rows" and config.reference_cache)
