"""The load-balancing loss of mixture-of-experts models over one update, and the metrics of the experts' load.

The loss is a product of two means over the tokens: an expert's share of them, and its mean probability. Both are over
all micro-batches and ranks of the update, so the loss does not depend on how it was cut. The gradient needs the shares
before the first backward pass: where an update has several passes, they are made once without a gradient before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alignkit.engine.averages import TermSums
from alignkit.models.ranks import Ranks
from alignkit.models.router import Router, balance_loss
from alignkit.types import Batch

Summed = Callable[[Batch], TermSums]
"""Call the method's loss on a micro-batch."""


class Balance:
    """The routing of one update, or of an evaluation. router: None for a model without the loss; then nothing is done.

    summed: calls the method's loss, whose passes of the trained model are recorded.
    """

    def __init__(self, router: Router | None, summed: Summed, ranks: Ranks) -> None:
        self.router, self._summed, self._ranks = router, summed, ranks
        self._total: Tensor | None = None
        self._known = False

    def look_ahead(self, passes: Sequence[tuple[Batch, float]], weight: float = 1.0) -> None:
        """Learn the shares of an update with several passes; one pass learns them itself."""
        if self.router is None or self.router.coef == 0 or len(passes) == 1:
            return
        with torch.no_grad():
            for micro, counted in passes:
                self.measured(micro, counted * weight)
        self._total = self._over_ranks()
        self._known = True

    def measured(self, micro: Batch, weight: float = 1.0) -> tuple[TermSums, Tensor | None]:
        """Call the method's loss, and add the routing of its passes; weight: 0 for a placeholder.

        Returns its sums, and the routing [2, layers, experts] (`Router.take`), None without one.
        """
        if self.router is not None:
            self.router.take()
        summed = self._summed(micro)
        sums = self.router.take() if self.router is not None else None
        if sums is not None and not self._known:
            self._total = (0.0 if self._total is None else self._total) + sums.detach() * weight
        return summed, sums

    def share(self, sums: Tensor | None, only: bool) -> Tensor | float:
        """Return a micro-batch's part of the loss, a scalar with a gradient. only: the update has no other pass."""
        if sums is None or self.router is None or self.router.coef == 0:
            return 0.0
        if only:
            self._total = self._over_ranks()
            self._known = True
        assert self._total is not None
        return self.router.coef * balance_loss(sums, self._total, self.router.top_k).float()

    def added(self, values: dict[str, float]) -> dict[str, float]:
        """Return the metrics with the auxiliary loss added to "loss", and the experts' load."""
        total = self._total if self._known else self._over_ranks()
        if total is None or self.router is None:
            return values
        loss = float(balance_loss(total, total, self.router.top_k))
        even = total[1].sum(-1, keepdim=True) / total.shape[-1]
        return {
            **values,
            "loss": values["loss"] + self.router.coef * loss,
            "router/aux_loss": loss,
            "router/max_load": float((total[1] / even.clamp(min=1e-9)).max()),
            "router/unused": float((total[1] == 0).double().mean()),
        }

    def _over_ranks(self) -> Tensor | None:
        return None if self._total is None else self._ranks.sum(self._total)
