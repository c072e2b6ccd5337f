"""The state of a run as plain data, which the loop and its helpers share."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from alignkit.config import RunConfig
from alignkit.data.stream import Stream
from alignkit.data.streaming import Streamed
from alignkit.data.views import Joined
from alignkit.engine.roles import Roles
from alignkit.engine.rollouts import Online
from alignkit.method import Method
from alignkit.models.ranks import Ranks
from alignkit.models.scoring import Scorer
from alignkit.models.values import Valuer
from alignkit.reference.reference import Reference
from alignkit.types import Example, Layout


@dataclass(frozen=True)
class Splits:
    """The examples of a run: to train on, held out, and a digest of both; the weights of a mixture's sources.

    streamed: with `streaming`, the stream of the run; `train` then holds its first examples only.
    """

    train: Sequence[Example]
    held_out: Sequence[Example]
    digest: str
    weights: Mapping[str, float] = field(default_factory=dict)
    streamed: Streamed | None = None

    @property
    def both(self) -> Sequence[Example]:
        """The examples to train on, then those held out."""
        return Joined(self.train, self.held_out)


@dataclass
class Parts:
    """The objects that are built once for a run.

    plain: the trained and saved module, without wrappers. policy: the same (with the critic, if any), wrapped for
    training. online: for methods that sample. peak_rate: the learning rate after the warm-up. eos: a token id.
    """

    accelerator: Accelerator
    ranks: Ranks
    plain: Scorer | Valuer
    policy: nn.Module
    optimizer: Any
    roles: Roles
    reference: Reference | None
    online: Online | None
    layout: Layout
    stream: Stream | Streamed
    peak_rate: float
    eos: int

    @property
    def model(self) -> Any:
        """The trained model itself: transformers', or peft's around it."""
        return self.plain.model


@dataclass
class EarlyStop:
    """The best evaluation so far (lower is better), and the number of evaluations since then."""

    best: float = math.inf
    best_step: int = -1
    waited: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""
        return {"best": None if self.best == math.inf else self.best, "step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.best = math.inf if state["best"] is None else state["best"]
        self.best_step, self.waited = state["step"], state["waited"]


@dataclass
class RunState:
    """One run: its settings, what was built for it, and its progress.

    written: the settings as in config.yaml. skipped: updates that were not finite. evaluated: the step of the last
    evaluation, -1 before the first. saved, saved_at: step and time.monotonic() of the last checkpoint, -1 without one.
    only_for_model: that checkpoint was written in case that saving the model fails, and goes once it is saved.
    callbacks: the run's own listeners.
    """

    config: RunConfig
    method: Method[Any]
    splits: Splits
    parts: Parts
    folder: Path
    written: Mapping[str, Any]
    skipped: int = 0
    evaluated: int = -1
    early: EarlyStop = field(default_factory=EarlyStop)
    saved: int = -1
    only_for_model: bool = False
    saved_at: float = field(default_factory=time.monotonic)
    callbacks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dropout(self) -> bool:
        """Whether the trained model has dropout."""
        return bool(self.method.dropout() or (self.config.lora and self.config.lora.dropout))

    @property
    def total_steps(self) -> int:
        """The optimiser steps of the whole run."""
        return self.parts.stream.total_steps(self.config.epochs, self.config.max_steps)
