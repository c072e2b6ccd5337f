"""Stopping where held-out rows say that training no longer helps, with the weights that were best."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from alignkit import checkpoint

if TYPE_CHECKING:
    from alignkit.engine import Loop

logger = logging.getLogger(__name__)


class EarlyStop:
    """Watches the held-out rows: the reward where there is one, else the loss.

    `patience` evaluations in a row that are no better than the best one end the run.
    """

    def __init__(self) -> None:
        self.best, self.best_step, self.waited = float("inf"), -1, 0

    def ended(self, loop: Loop) -> bool:
        """Say whether patience has ended."""
        return loop.config.patience is not None and self.waited >= loop.config.patience

    def watch(self, loop: Loop, step: int, values: Mapping[str, float]) -> None:
        """Look at an evaluation, and keep the weights where it is the best so far."""
        if loop.config.patience is None or not values:
            return
        # the loss of a method that samples says nothing: it begins at the best that it can be
        value = -values["eval/reward/mean"] if "eval/reward/mean" in values else values["eval/loss"]
        if value < self.best:
            self.best, self.best_step, self.waited = value, step, 0
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            weights: dict[str, Any] = dict(get_model_state_dict(loop.parts.policy, options=options))
            if loop.parts.accelerator.is_main_process:
                checkpoint.save(loop.folder / "best", step, {"model": weights}, {}, keep=1)
        else:
            self.waited += 1

    def take_best(self, loop: Loop, step: int) -> bool:
        """Go back to the best weights, and say so, where they are not the present ones."""
        loop.parts.accelerator.wait_for_everyone()
        if loop.config.patience is None or self.best_step in (-1, step):
            return False
        found = checkpoint.load(loop.folder / "best", logger.warning)
        if found is None:
            return False
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(loop.parts.policy, dict[str, Any](found.tensors["model"]), options=options)
        logger.info("back to the weights of step %d, whose evaluation was the best", found.step)
        return True

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""
        return {"best": None if self.best == float("inf") else self.best, "step": self.best_step, "waited": self.waited}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.best = float("inf") if state["best"] is None else state["best"]
        self.best_step, self.waited = state["step"], state["waited"]
