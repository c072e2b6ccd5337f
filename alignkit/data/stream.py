"""The examples of each step: a pure function of seed and step, so a resumed run needs no saved position."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from alignkit.errors import DataError
from alignkit.types import Example


class Stream:
    """Examples in a fresh random order each epoch, cut into steps of `batch_size`.

    A last part smaller than `min_batch` (which the method or the number of ranks requires) is left out of its epoch.
    Raises DataError where the data does not fill a single step of that size.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int, min_batch: int = 1) -> None:
        self._examples, self._batch_size, self._seed = examples, batch_size, seed
        whole, tail = divmod(len(examples), batch_size)
        self.steps_per_epoch = whole + (tail >= max(min_batch, 1))
        if self.steps_per_epoch == 0:
            raise DataError(f"{len(examples)} usable rows are too few: a step needs at least {max(min_batch, 1)}")
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        """Return the optimiser steps of a run."""
        return max_steps or max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))

    def __getitem__(self, step: int) -> tuple[Example, ...]:
        epoch, part = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = seeded(self._seed, 0, epoch)
            self._order = torch.randperm(len(self._examples), generator=generator)
            self._epoch = epoch
        at = self._order[part * self._batch_size : (part + 1) * self._batch_size]
        return tuple(self._examples[i] for i in at.tolist())


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


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into (train, held out) without a common prompt, each in its order. Raises DataError if train is empty."""
    if not fraction:
        return list(examples), []
    prompts = sorted({e.prompt.numpy().tobytes() for e in examples})
    order = torch.randperm(len(prompts), generator=seeded(seed, 1, 0)).tolist()
    n_held = max(1, round(fraction * len(prompts)))
    if n_held >= len(prompts):
        raise DataError(
            f"eval_fraction {fraction} of {len(prompts)} different prompts leaves no prompt to train on; lower it"
        )
    held = {prompts[i] for i in order[:n_held]}
    sides = ([], [])  # type: tuple[list[Example], list[Example]]
    for e in examples:
        sides[e.prompt.numpy().tobytes() in held].append(e)
    return sides


def seeded(seed: int, purpose: int, number: int) -> torch.Generator:
    """Return a generator that depends on all three numbers; `purpose` separates the uses of a run's seed."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, number))


def seed_of(seed: int, purpose: int, number: int) -> int:
    """Return a seed that depends on all three numbers.

    purpose: 0 order, 1 held-out rows, 2 steps, 3 evaluations, 4 and 5 samples of a step, 6 and 7 of an evaluation,
    8 dropout.
    """
    return ((seed * 1_000_003 + number) * 16 + purpose) % 2**63
