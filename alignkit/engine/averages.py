"""Reduction of terms to numbers: the denominators of a step, its loss, and the averages that are logged.

A Term's mean is its sum over all micro-batches and ranks, divided by the count over all of them. The counts are known
before the first forward pass, so each micro-batch's backward computes its exact share of the step's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import PluginError
from alignkit.method import Method, Models
from alignkit.types import Batch, Term

EXTENTS = ("examples", "completions", "tokens")
Reduce = Callable[[Tensor], Tensor]
"""Sum a tensor over the ranks."""


@dataclass(frozen=True)
class TermSums:
    """The terms of one micro-batch, and each term's sum over it, a scalar, by name."""

    terms: Mapping[str, Term]
    sums: Mapping[str, Tensor]

    def loss_share(self, denominators: Mapping[str, float]) -> Tensor:
        """Return this micro-batch's share of the step's loss, a scalar that can be differentiated.

        Raises PluginError where no term has a coefficient.
        """
        parts = [t.coef * self.sums[n] / max(denominators[t.over], 1.0) for n, t in self.terms.items() if t.coef]
        if not parts:
            raise PluginError("the method's loss returned no term with a coefficient; there is nothing to train on")
        return torch.stack([p.float() for p in parts]).sum()


def term_sums(method: Method[Any], batch: Batch, models: Models) -> TermSums:
    """Call the method's loss on a micro-batch and sum its terms. Raises as `sum_terms`."""
    return sum_terms(method.loss(batch, models), batch, method.name)


def counts(batch: Batch, reduce: Reduce, weight: float = 1.0) -> dict[str, float]:
    """Return the denominator of each possible `over` of a Term: its count in this step over all ranks.

    weight: 0 where this rank's batch is a placeholder that does not count.
    """
    names = [*EXTENTS, *_masks(batch)]
    local = torch.tensor([batch.count(n) for n in names], dtype=torch.float64)
    return dict(zip(names, reduce(local * weight).tolist(), strict=True))


def sum_terms(terms: Mapping[str, Term], batch: Batch, method: str) -> TermSums:
    """Sum each term over this micro-batch; a mask that `over` names is applied. method: its name, for messages.

    Raises PluginError where a value's shape does not match its extent `over`, or `over` names no mask.
    """
    out = {}
    for name, term in terms.items():
        mask = _mask(batch, name, term, method) if term.over not in EXTENTS else None
        wanted = len(mask) if mask is not None else batch.count(term.over)
        if term.value.shape != (wanted,):
            raise PluginError(
                f"method '{method}' returned the term '{name}' of shape {list(term.value.shape)} over "
                f"'{term.over}'; this micro-batch has {wanted} of them, so it must be [{wanted}]"
            )
        # where(), not a product: a masked-out inf times 0 would be nan
        value = term.value if mask is None else torch.where(mask, term.value, 0.0)
        out[name] = value.sum()
    return TermSums(terms, out)


def _masks(batch: Batch) -> list[str]:
    numbers = {**batch.per_example, **batch.per_completion, **batch.per_token}
    return sorted(n for n, value in numbers.items() if value.dtype == torch.bool)


def _mask(batch: Batch, name: str, term: Term, method: str) -> Tensor:
    if term.over in batch and batch[term.over].dtype == torch.bool:
        return batch[term.over]
    raise PluginError(
        f"method '{method}' averages the term '{name}' over '{term.over}', which is not a mask of the batch; choose "
        f"from {', '.join([*EXTENTS, *_masks(batch)])}. A mask is a bool number that `collect` attaches"
    )


class Averages:
    """Adds up the terms of micro-batches, then averages them over ranks: the numbers that are logged."""

    def __init__(self) -> None:
        self._denominators: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}
        self._terms: dict[str, tuple[str, float]] = {}

    def expect(self, denominators: Mapping[str, float]) -> None:
        """Add the counts (see `counts`) of a batch whose terms will be added."""
        for name, count in denominators.items():
            self._denominators[name] = self._denominators.get(name, 0.0) + count

    def add(self, summed: TermSums, weight: float = 1.0) -> None:
        """Add one micro-batch; weight 0 for one that only keeps the ranks in step."""
        for name, term in summed.terms.items():
            if term.largest:
                value = term.value.detach().max().double()
                value = value if weight else torch.full_like(value, -math.inf)
                self._largest[name] = torch.maximum(self._largest.get(name, value), value)
                continue
            self._terms[name] = (term.over, term.coef)
            value = summed.sums[name].detach().double() * weight
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def means(self, reduce: Reduce, largest: Reduce = lambda t: t) -> dict[str, float]:
        """Return the mean (or the largest value) of every term, and "loss": their sum weighted by the coefficients.

        A term over a mask that is False in the whole step has no mean and is left out. largest: maximum over the ranks.
        """
        names = sorted(self._sums)
        totals = reduce(torch.stack([self._sums[n] for n in names])).tolist()
        counted = {n: self._denominators[self._terms[n][0]] for n in names}
        means = {n: t / counted[n] for n, t in zip(names, totals, strict=True) if counted[n]}
        loss = sum(coef * means[n] for n, (_, coef) in self._terms.items() if coef and n in means)
        if self._largest:
            tops = sorted(self._largest)
            means |= zip(tops, largest(torch.stack([self._largest[n] for n in tops])).tolist(), strict=True)
        return {"loss": loss, **{n: v for n, v in means.items() if n != "loss"}}
