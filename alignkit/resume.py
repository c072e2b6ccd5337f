"""A loop's state to a checkpoint and back, so that a resumed run equals the uninterrupted one bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from alignkit import checkpoint
from alignkit.errors import CheckpointError

if TYPE_CHECKING:
    from alignkit.engine import Loop

logger = logging.getLogger(__name__)


def save(loop: Loop, step: int) -> None:
    """Write a checkpoint of everything that the steps after `step` depend on; every rank must call it."""
    parts = loop.parts
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    model = get_model_state_dict(parts.policy, options=options)
    optimizer, layout = checkpoint.optimizer_state(parts.policy, parts.optimizer.optimizer)
    rng, rng_values = checkpoint.rng_state()
    tensors: dict[str, Mapping[str, Any]] = {"model": model, "optimizer": optimizer, "rng": rng}
    if loop.method.reference_need() == "moving" and parts.reference:
        tensors["reference"] = parts.reference.state()
    state = {
        "optimizer": layout,
        "rng": rng_values,
        "method": loop.method.state_dict(),
        "skipped": loop.skipped,
        "rows": loop.rows.digest,
        "early": loop.early.state(),
        "evaluated": loop.evaluated,
    }
    if parts.accelerator.is_main_process:
        path = checkpoint.save(loop.folder / "checkpoints", step, tensors, state, loop.config.keep_checkpoints)
        logger.info("checkpoint %s", path)
    parts.accelerator.wait_for_everyone()


def restore(loop: Loop) -> int:
    """Load the newest whole checkpoint and return its step, 0 where there is none. Raises CheckpointError."""
    found = checkpoint.load(loop.folder / "checkpoints", logger.warning)
    if found is None and (loop.folder / "model").is_dir():
        raise CheckpointError(
            f"{loop.folder} is finished: its model is in {loop.folder / 'model'}. "
            f"To train on, start a new run from there"
        )
    if found is None:
        logger.warning("no checkpoint in %s: starting at step 1", loop.folder)
        return 0
    if found.state["rows"] != loop.rows.digest:
        raise CheckpointError(f"the rows are not those that {found.path} was trained on; resume with the same data")
    parts = loop.parts
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(parts.policy, dict[str, Any](found.tensors["model"]), options=options)
    checkpoint.set_optimizer_state(
        parts.policy, parts.optimizer.optimizer, found.tensors["optimizer"], found.state["optimizer"]
    )
    if "reference" in found.tensors and parts.reference:
        parts.reference.load_state(found.tensors["reference"])
    loop.method.load_state_dict(found.state["method"])
    loop.skipped = found.state["skipped"]
    loop.early.load_state(found.state["early"])
    loop.evaluated = found.state["evaluated"]
    checkpoint.set_rng_state(found.tensors["rng"], found.state["rng"])
    logger.info("resumed from %s", found.path)
    return found.step
