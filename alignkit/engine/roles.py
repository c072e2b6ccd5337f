"""The models that a method may call in a run, by role."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import PluginError
from alignkit.method import Method
from alignkit.models.passes import Autocast, in_parts, weighted
from alignkit.models.ranks import SINGLE, Ranks
from alignkit.models.scoring import Scorer
from alignkit.models.truncation import Truncation
from alignkit.models.values import ActorCritic, Valuer
from alignkit.reference.reference import Reference
from alignkit.types import Batch, Outputs


class Roles:
    """The models that a method may call; a role that it did not declare in `uses` is refused (PluginError).

    trained: the trained module, wrapped or not. plain: the same module unwrapped, for passes without a gradient.
    max_tokens: of a micro-batch; the loop lowers it where memory runs out. temperature: of sampling and of scoring.
    autocast: entered around passes without a gradient.
    """

    def __init__(
        self,
        method: Method[Any],
        trained: nn.Module,
        plain: Scorer | ActorCritic | Valuer,
        reference: Reference | None,
        max_tokens: int,
        temperature: float = 1.0,
        ranks: Ranks = SINGLE,
        autocast: Autocast = nullcontext,
    ) -> None:
        self._method, self._trained, self._plain, self._reference = method, trained, plain, reference
        self.max_tokens, self.temperature, self.ranks, self.autocast = max_tokens, temperature, ranks, autocast

    def policy(
        self,
        batch: Batch,
        entropy: bool = False,
        values: bool = False,
        frozen: bool = False,
        truncated: Callable[[Batch], Truncation | None] | None = None,
    ) -> Outputs:
        """Score the batch's targets with the policy; without a gradient in parts of `max_tokens` tokens.

        truncated: what sampling left out of a part; with it `drawn` is returned too.
        """
        self._check_declared("policy")
        if values:
            self._check_declared("critic")
        if frozen and not values:
            raise PluginError(
                "policy(frozen=True) scores the policy without a gradient for its critic: add values=True"
            )
        module = self._trained if torch.is_grad_enabled() else self._plain
        options = {"frozen": True} if frozen else {}
        temperature = self.temperature if batch.temperature is None else batch.temperature

        def score(part: Batch) -> Outputs:
            truncation = truncated(part) if truncated else None
            return module(part.rows, part.targets, temperature, entropy, truncation, **options)  # type: ignore[no-any-return]

        with self._routing(not frozen):
            outputs = weighted(score(batch), batch) if torch.is_grad_enabled() else self._without_gradient(score, batch)
        return outputs if values else outputs._replace(values=None)

    def reference(self, batch: Batch) -> Outputs:
        """Score the batch's targets with the reference, without a gradient."""
        self._check_declared("reference")
        assert self._reference is not None
        return Outputs(self._reference.logps(batch.examples, batch.temperature).to(batch.device))

    def reward(self, batch: Batch) -> Tensor:
        """Score each completion as a whole with the reward model that is trained."""
        self._check_declared("reward")
        if "reward" not in self._method.trains:
            raise PluginError(
                f"'{self._method.name}' does not train a reward model; read the rewards that `ctx.rollouts` returns"
            )
        module = self._trained if torch.is_grad_enabled() else self._plain
        with nullcontext() if torch.is_grad_enabled() else self.autocast(), self._routing():
            return module(batch.rows, batch.rows.last_at)  # type: ignore[no-any-return]

    def _routing(self, on: bool = True) -> AbstractContextManager[None]:
        # passes of the reference are not recorded, even where it is the policy without its adapters
        return nullcontext() if self._plain.router is None else self._plain.router.recording(on)

    def _without_gradient(self, score: Any, batch: Batch) -> Outputs:
        with self.autocast():
            return in_parts(score, batch, self.max_tokens, self.ranks)

    def _check_declared(self, role: str) -> None:
        if role not in self._method.roles():
            raise PluginError(
                f"method '{self._method.name}' used the role '{role}' without declaring it; "
                f"add it: uses = frozenset({sorted({*self._method.uses, role})})"
            )
