"""The examples of each step: a pure function of seed and step, so a resumed run needs no saved position."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from alignkit.data.views import Selected, raws
from alignkit.errors import DataError
from alignkit.types import Example


class Stream:
    """Examples in a fresh random order each epoch, cut into steps of `batch_size`.

    A last part smaller than `min_batch` (which the method or the number of ranks requires) is left out of its epoch.
    Examples with an `order` are read from the smallest to the largest; equal ones in a fresh random order.
    weights: {source: weight}. An epoch still has as many rows as there are examples, each source its share of them
    (`quotas`), at random places. A source is read to its end before a row is repeated, also across epochs.
    Raises DataError where the data does not fill a single step of that size, or a source has no row.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        min_batch: int = 1,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self._examples, self._batch_size, self._seed = examples, batch_size, seed
        whole, tail = divmod(len(examples), batch_size)
        self.steps_per_epoch = whole + (tail >= max(min_batch, 1))
        if self.steps_per_epoch == 0:
            raise DataError(f"{len(examples)} usable rows are too few: a step needs at least {max(min_batch, 1)}")
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        orders = array("d")
        self._members: dict[str, array[int]] = {}
        for i, raw in enumerate(raws(examples)):
            orders.append(raw.order or 0.0)
            self._members.setdefault(raw.source, array("q")).append(i)
        self._keys = torch.tensor(orders, dtype=torch.float64)
        self.quotas = quotas(weights, len(examples), self._members) if weights else {}

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        """Return the optimiser steps of a run."""
        return max_steps or max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))

    def __getitem__(self, step: int) -> tuple[Example, ...]:
        epoch, part = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = self._mixed(epoch) if self.quotas else self._shuffled(None, seeded(self._seed, 0, epoch))
            self._epoch = epoch
        at = self._order[part * self._batch_size : (part + 1) * self._batch_size]
        return tuple(self._examples[i] for i in at.tolist())

    def _shuffled(self, members: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return all examples, or these, in random order, then by their `order`."""
        n = len(self._examples) if members is None else len(members)
        order = torch.randperm(n, generator=generator)
        order = order if members is None else members[order]
        return order[self._keys[order].argsort(stable=True)]

    def _mixed(self, epoch: int) -> Tensor:
        """Return the epoch's examples of a mixture: a random sequence of sources, and the next row of each."""
        counts = torch.tensor(list(self.quotas.values()))
        labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
        labels = labels[torch.randperm(len(labels), generator=seeded(self._seed, 0, epoch))]
        order = torch.empty(len(labels), dtype=torch.int64)
        for number, (name, quota) in enumerate(self.quotas.items()):
            members = torch.tensor(self._members[name])
            first, last = epoch * quota // len(members), ((epoch + 1) * quota - 1) // len(members)
            passes = [
                self._shuffled(members, seeded(self._seed, 9, one * len(counts) + number))
                for one in range(first, last + 1)
            ]
            begin = epoch * quota - first * len(members)
            order[labels == number] = torch.cat(passes)[begin : begin + quota]
        return order

    def metrics(self, step: int, examples: Sequence[Example]) -> dict[str, float]:
        """Return the epochs after this step and, with several sources, how many of its examples come from each."""
        found = Counter(e.source for e in examples)
        rows = {f"rows/{name}": found[name] for name in self._members if name}
        return {"epoch": (step + 1) / self.steps_per_epoch, **rows}

    def state_dict(self, step: int | None = None) -> dict[str, int]:
        """Return nothing: a step's examples follow from its number."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Do nothing; see `state_dict`."""

    def lines(self) -> list[str]:
        """Return a line for each source, where there are several: its rows, and how often an epoch reads them."""
        found = []
        for name, members in self._members.items():
            n = len(members)
            if self.quotas:
                share, times = self.quotas[name] / len(self._examples), self.quotas[name] / n
                found.append(f"{name}: {n} rows, {share:.1%} of the rows of a step, read {times:.2g} times an epoch")
            elif name:
                found.append(f"{name}: {n} of {len(self._examples)} rows")
        return found


def quotas(weights: Mapping[str, float], n: int, sources: Collection[str]) -> dict[str, int]:
    """Return the rows of each source in an epoch of n rows: n times its share of the weights, by largest remainders.

    Raises DataError where a source has no row, or its quota is 0.
    """
    total = sum(weights.values())
    exact = {name: n * weight / total for name, weight in weights.items()}
    found = {name: math.floor(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda one: found[one] - exact[one])[: n - sum(found.values())]:
        found[name] += 1
    for name, quota in found.items():
        if name not in sources:
            raise DataError(f"the source '{name}' has no row to train on; lower eval_fraction, or remove it from data")
        if quota == 0:
            raise DataError(
                f"the source '{name}' would have no row in an epoch of {n} rows, with the weight {weights[name]:g} of "
                f"{total:g}; raise it, or remove the source"
            )
    return found


def learning_rate(schedule: str, warmup_fraction: float, step: int, total: int, decay_fraction: float = 0.1) -> float:
    """Return the fraction of the peak rate at a step: a linear warm-up, then the schedule.

    linear, cosine: down to 0. wsd: 1, and linear down to 0 over the last `decay_fraction` (2404.06395). inverse-sqrt:
    the root of warm-up / steps done (1706.03762).
    """
    warmup = round(warmup_fraction * total)
    if step < warmup:
        return (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    decay = max(1, round(decay_fraction * total))
    return {
        "constant": 1.0,
        "linear": left,
        "cosine": 0.5 - 0.5 * math.cos(math.pi * left),
        "wsd": min(1.0, (total - step) / decay) if decay_fraction else 1.0,
        "inverse-sqrt": math.sqrt(max(1, warmup) / (step + 1)),
    }[schedule]


def chunks(examples: Sequence[Example], size: int, min_batch: int) -> list[tuple[Example, ...]]:
    """Cut examples into parts of `size` in order; a last part smaller than `min_batch` joins the one before it."""
    parts = [tuple(examples[i : i + size]) for i in range(0, len(examples), size)]
    if len(parts) > 1 and len(parts[-1]) < min_batch:
        parts[-2:] = [parts[-2] + parts[-1]]
    return parts


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    """Split into (train, held out) without a common prompt, each in its order. Raises DataError if train is empty."""
    if not fraction:
        return examples, []
    prompts = sorted({raw.prompt for raw in raws(examples)})
    order = torch.randperm(len(prompts), generator=seeded(seed, 1, 0)).tolist()
    n_held = max(1, round(fraction * len(prompts)))
    if n_held >= len(prompts):
        raise DataError(
            f"eval_fraction {fraction} of {len(prompts)} different prompts leaves no prompt to train on; lower it"
        )
    held = {prompts[i] for i in order[:n_held]}
    sides = array("q"), array("q")
    for i, raw in enumerate(raws(examples)):
        sides[raw.prompt in held].append(i)
    return Selected(examples, sides[0]), Selected(examples, sides[1])


def seeded(seed: int, purpose: int, number: int) -> torch.Generator:
    """Return a generator that depends on all three numbers; `purpose` separates the uses of a run's seed."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, number))


def seed_of(seed: int, purpose: int, number: int) -> int:
    """Return a seed that depends on all three numbers.

    purpose: 0 order, 1 held-out rows, 2 steps, 3 evaluations, 4 and 5 samples of a step, 6 and 7 of an evaluation,
    8 dropout, 9 order of a source in a mixture, 10 order of rows that are streamed, 11 further
    samples of a step or an evaluation.
    """
    return ((seed * 1_000_003 + number) * 16 + purpose) % 2**63
