"""Saving a run: checkpoints that resume it bit for bit, and the trained model."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from alignkit.config import RunConfig
from alignkit.data.chat import turn_end
from alignkit.engine.padding import pad_with, padding_tokenizer
from alignkit.engine.state import Parts, RunState
from alignkit.errors import AlignkitError, CheckpointError
from alignkit.models.adapters import save_adapter
from alignkit.models.loading import causal_lm
from alignkit.models.quantised import layers_4bit, merged
from alignkit.models.towers import save_processor
from alignkit.models.values import Valuer
from alignkit.runs import card, checkpoint

logger = logging.getLogger(__name__)


def save(state: RunState, step: int) -> None:
    """Write a checkpoint of everything that the steps after `step` depend on; every rank must call it."""
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
    if parts.ranks.is_main:
        path = checkpoint.save(state.folder / "checkpoints", step, tensors, kept, state.config.keep_checkpoints)
        logger.info("checkpoint %s", path)
    parts.ranks.wait()


def restore(state: RunState) -> int:
    """Load the newest complete checkpoint and return its step, 0 without one. Raises CheckpointError."""
    found = checkpoint.load(state.folder / "checkpoints", logger.warning)
    if found is None and (state.folder / "model").is_dir():
        raise CheckpointError(
            f"{state.folder} is finished: its model is in {state.folder / 'model'}. "
            f"To train it further, start a new run from that folder"
        )
    if found is None:
        logger.warning("no checkpoint in %s: starting at step 1", state.folder)
        return 0
    if found.state["rows"] != state.splits.digest:
        raise CheckpointError(f"the rows differ from those of {found.path}; resume with the same data")
    parts = state.parts
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(parts.policy, dict[str, Any](found.tensors["model"]), options=options)
    checkpoint.set_optimizer_state(
        parts.policy, parts.optimizer.optimizer, found.tensors["optimizer"], found.state["optimizer"]
    )
    if "reference" in found.tensors and parts.reference:
        parts.reference.load_state(found.tensors["reference"])
    state.method.load_state_dict(found.state["method"])
    state.skipped = found.state["skipped"]
    state.early.load_state_dict(found.state["early"])
    state.evaluated = found.state["evaluated"]
    parts.stream.load_state_dict(found.state.get("stream", {}))
    checkpoint.set_rng_state(found.tensors["rng"], found.state["rng"])
    logger.info("resumed from %s", found.path)
    return found.step


def save_model(parts: Parts, config: RunConfig, tokenizer: Any, folder: Path) -> Any:
    """Write the model (only the adapter, unless it is merged) and its tokenizer in the Hugging Face format.

    Written under a temporary name and renamed, so that `folder` is complete or absent. Returns the model.
    """
    model = parts.plain.model
    causal_lm(model).config.get_text_config().use_cache = True
    _name_turn_end(model, tokenizer)
    state = None
    if config.fsdp:
        state = get_model_state_dict(parts.policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        state = {k.removeprefix("model."): v for k, v in state.items()}
    if config.merge_adapter:
        model = merged(model) if layers_4bit(model) else model.merge_and_unload()  # type: ignore[operator]
    if isinstance(parts.plain, Valuer):
        tokenizer = padding_tokenizer(tokenizer)
        only_adapter = hasattr(model, "peft_config")
        pad_with(model, tokenizer, only_adapter=only_adapter, sharded=config.fsdp)
        if only_adapter:
            logger.warning(
                "the reward model is saved as an adapter: to score rows of a padded batch with it, set "
                "model.config.pad_token_id after loading, as its README.md does; merge_adapter: true saves a model "
                "that needs nothing"
            )
    if parts.ranks.is_main:
        temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
        _write(model, temporary, state)
        save_processor(causal_lm(model), temporary)
        tokenizer.save_pretrained(temporary)
        try:
            card.write(temporary, folder.parent)
        except (AlignkitError, OSError) as error:  # the model is saved without it
            logger.warning("the model card could not be written: %s", error)
        before = folder.with_name(f".{folder.name}-before-{os.getpid()}")
        if folder.exists():
            folder.rename(before)
        temporary.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    parts.ranks.wait()
    return model


def _write(model: Any, folder: Path, state: dict[str, Any] | None) -> None:
    if hasattr(model, "peft_config"):
        save_adapter(model, folder, state)
    else:
        model.save_pretrained(folder, state_dict=state)


def _name_turn_end(model: Any, tokenizer: Any) -> None:
    # `generate` has to stop where the chat template ends an answer
    settings, end = getattr(causal_lm(model), "generation_config", None), turn_end(tokenizer)
    if settings is not None and end is not None and end != tokenizer.eos_token_id:
        settings.eos_token_id = [tokenizer.eos_token_id, end]
