"""Checkpoints of a run, which resume it bit for bit."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.engine.ahead_state import OF_AHEAD, ahead_state, restore_ahead
from alignkit.engine.model_folder import clear_leftovers
from alignkit.engine.state import RunState, Splits
from alignkit.errors import CheckpointError
from alignkit.runs import checkpoint

logger = logging.getLogger(__name__)


def save(state: RunState, step: int, more: int = 0) -> None:
    """Write a checkpoint of everything that the steps after `step` depend on; every rank must call it.

    more: older checkpoints that are kept besides `keep_checkpoints`. Raises CheckpointError where the disk is full.
    """
    parts = state.parts
    model = checkpoint.model_state(parts.policy)
    optimizer, layout = checkpoint.optimizer_state(parts.policy, parts.optimizer.optimizer)
    rng, rng_values = checkpoint.rng_state()
    tensors: dict[str, Mapping[str, Any]] = {"model": model, "optimizer": optimizer, "rng": rng}
    if state.method.reference_need() == "moving" and parts.reference:
        tensors["reference"] = parts.reference.state()
    kept = {
        "optimizer": layout,
        "rng": rng_values,
        "method": state.method.state_dict(),
        "skipped": state.skipped,
        "rows": state.splits.digest,
        "early": state.early.state_dict(),
        "evaluated": state.evaluated,
        "stream": parts.stream.state_dict(step),
    }
    if parts.online:
        early, about = ahead_state(parts.online.ahead, parts.ranks, step, lambda: checkpoint.model_state(parts.policy))
        tensors |= early
        kept["ahead"] = about
    keep = state.config.keep_checkpoints + more
    path = checkpoint.save(state.folder / "checkpoints", step, tensors, kept, keep, parts.ranks)
    logger.info("checkpoint %s", path)
    state.saved, state.saved_at, state.only_for_model = step, time.monotonic(), False


def save_last(state: RunState, step: int) -> None:
    """Write the state after the last step, so that a save of the model that fails loses nothing.

    Where the disk has no space for it, the model, which is smaller, may still fit.
    """
    try:
        save(state, step, more=1)
        state.only_for_model = True
    except CheckpointError as error:
        state.saved = -1
        logger.warning("%s", error)


def restore(state: RunState) -> int:
    """Load the newest checkpoint that is whole and fits, and return its step, 0 without one. Raises CheckpointError."""
    if state.parts.ranks.is_main:
        clear_leftovers(state.folder)
    found = checkpoint.load(
        state.folder / "checkpoints", logger.warning, lambda one: _take(state, one), state.parts.ranks
    )
    if found is None and (state.folder / "model").is_dir():
        raise CheckpointError(
            f"{state.folder} is finished: its model is in {state.folder / 'model'}. "
            f"To train it further, start a new run from that folder"
        )
    if found is None:
        logger.warning("no checkpoint in %s: starting at step 1", state.folder)
        return 0
    state.saved = found.step
    logger.info("resumed from %s", found.path)
    return found.step


def check_rows(run: Path, splits: Splits) -> None:
    """Compare the rows of a resumed run with its newest checkpoint's, before models score them. Raises OtherRows."""
    newest = checkpoint.newest_state(run / "checkpoints")
    if newest is not None and newest[1].get("rows", splits.digest) != splits.digest:
        raise _other_rows(newest[0])


def _other_rows(path: Path) -> checkpoint.OtherRows:
    return checkpoint.OtherRows(f"the rows differ from those of {path}; resume with the same data")


def _take(state: RunState, found: checkpoint.Loaded) -> None:
    """Give a run the state in a checkpoint. Raises CheckpointError naming what does not fit."""
    parts, kept = state.parts, found.state
    if kept["rows"] != state.splits.digest:
        raise _other_rows(found.path)
    if found.step > state.total_steps:
        raise CheckpointError(f"its step is {found.step}, but the run has {state.total_steps} steps")
    like = checkpoint.weight_like(parts.policy)
    checkpoint.set_model_state(parts.policy, found.group("model", like))
    checkpoint.set_optimizer_state(
        parts.policy, parts.optimizer.optimizer, found.group("optimizer", like), kept["optimizer"]
    )
    if "reference" in found.groups and parts.reference:
        own = parts.reference.state()
        moved = found.group("reference", lambda name, shape: own.get(name))
        checkpoint.check_finite(moved)
        parts.reference.load_state(moved)
    if parts.online and kept.get("ahead"):
        restore_ahead(
            parts.online.ahead, parts.ranks, found.step, {name: found.group(name, like) for name in OF_AHEAD},
            kept["ahead"], lambda weights: checkpoint.set_model_state(parts.policy, weights),
        )  # fmt: skip
    state.method.load_state_dict(kept["method"])
    state.skipped, state.evaluated = int(kept["skipped"]), int(kept["evaluated"])
    state.early.load_state_dict(kept["early"])
    parts.stream.load_state_dict(kept.get("stream", {}))
    checkpoint.set_rng_state(found.tensors["rng"], kept["rng"])
