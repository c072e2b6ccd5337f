"""The routing of mixture-of-experts models: what the load-balancing loss and the metrics of the load are made of.

The loss is that of transformers (Switch Transformer, 2101.03961, eq. 4 to 6), over all layers with experts and all
tokens of an update: E * sum over experts of (share of tokens sent to it) * (its mean probability).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import ModelError
from alignkit.types import PackedRows

logger = logging.getLogger(__name__)


class Router:
    """Adds up the routing of the passes inside `recording`. coef: of the auxiliary loss. top_k: experts of a token."""

    def __init__(self, coef: float, top_k: int) -> None:
        self.coef, self.top_k, self.on = coef, top_k, False
        self._sums: Tensor | None = None

    @contextmanager
    def recording(self, on: bool = True) -> Iterator[None]:
        """Record the passes inside the block."""
        before, self.on = self.on, on
        try:
            yield
        finally:
            self.on = before

    def read(self, logits: Sequence[Tensor], rows: PackedRows) -> None:
        """Add a pass's router logits, a tensor [R * T, experts] for each layer."""
        sums = torch.stack([_sums(layer, token_weights(rows), self.top_k) for layer in logits], 1)
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self) -> Tensor | None:
        """Return the sums since the last call, and forget them: float64 [2, layers, experts], None without a pass.

        [0]: of the probabilities, differentiable. [1]: tokens sent to each expert. A prompt's token counts once for
        each completion that continues it, and padding never, as in padded rows.
        """
        sums, self._sums = self._sums, None
        return sums


def _sums(logits: Tensor, weights: Tensor, top_k: int) -> Tensor:
    probabilities = logits.reshape(len(weights), -1).float().softmax(-1)
    chosen = torch.zeros_like(probabilities, dtype=torch.float64)
    chosen.scatter_(1, probabilities.topk(top_k, -1).indices, 1.0)
    return torch.stack([weights @ probabilities.double(), weights @ chosen])


def token_weights(rows: PackedRows) -> Tensor:
    """Return how many sequences each token belongs to, float64 [R * T]; 0 on padding."""
    trees, branches = rows.tree_ids.flatten(), rows.branch_ids.flatten()
    real = (trees >= 0).double()
    if rows.kind == "padded":
        return real
    n_trees = int(trees.max()) + 1
    of_tree = torch.zeros(n_trees, dtype=branches.dtype, device=trees.device)
    of_tree.scatter_reduce_(0, trees.clamp(min=0), branches * (trees >= 0), "amax")
    return torch.where(branches == 0, of_tree[trees.clamp(min=0)].double(), 1.0) * real


def router_of(lm: Any) -> Router | None:
    """Return the router of a transformers model whose configuration asks for the auxiliary loss, else None.

    Raises ModelError where the configuration asks for it and does not say how much, or how many experts a token has.
    """
    config = lm.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    names = ("router_aux_loss_coef", "num_experts_per_tok")
    found: dict[str, Any] = {n: getattr(lm, n, getattr(config, n, None)) for n in names}
    if missing := [n for n, value in found.items() if value is None]:
        raise ModelError(
            f"{type(lm).__name__} has output_router_logits: true, but no {' and no '.join(missing)} for the router's "
            "auxiliary loss; set output_router_logits: false in its config.json to train without that loss"
        )
    return Router(float(found["router_aux_loss_coef"]), int(found["num_experts_per_tok"]))


def check_router(lm: Any, router: Router, sequence: Tensor) -> bool:
    """Return whether transformers adds an auxiliary loss for this model, after a recorded pass over one sequence.

    Raises ModelError where its loss is another one.
    """
    sums = router.take()
    assert sums is not None
    own = float(balance_loss(sums, sums, router.top_k))
    with torch.no_grad():
        theirs = getattr(
            lm(input_ids=sequence[None].long(), use_cache=False, output_router_logits=True), "aux_loss", None
        )
    if not isinstance(theirs, Tensor):
        logger.warning("transformers adds no auxiliary loss of the router for %s, so none is added", type(lm).__name__)
        return False
    if abs(own - float(theirs)) > 0.02 * max(1.0, abs(own)):
        raise ModelError(
            f"the router's auxiliary loss of {type(lm).__name__} is {float(theirs):.4g} and not {own:.4g}: alignkit "
            "does not know its formula; set output_router_logits: false in its config.json to train without that loss"
        )
    return True


def balance_loss(sums: Tensor, total: Tensor, top_k: int) -> Tensor:
    """Return the part of the auxiliary loss of passes with `sums`, in an update with `total` (see `Router.take`)."""
    n = (total[1].sum() / top_k).clamp(min=1.0)  # tokens, once for each layer
    shares = total[1].sum(0).detach() / n
    return total.shape[-1] * (shares * sums[0].sum(0)).sum() / n
