"""The trained model in the folder of its run: complete or absent, in the Hugging Face format."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from alignkit.data.chat import turn_end
from alignkit.engine.gathering import gathered_weights
from alignkit.engine.padding import pad_with, padding_tokenizer
from alignkit.engine.state import RunState
from alignkit.errors import AlignkitError
from alignkit.files import leftovers, remove, share, sync
from alignkit.models.adapters import has_start, save_adapter
from alignkit.models.loading import causal_lm
from alignkit.models.quantised import layers_4bit, merged
from alignkit.models.towers import save_processor
from alignkit.models.values import Valuer
from alignkit.runs import card, checkpoint
from alignkit.runs.space import ROOM, and_resume, saving

SHARD = "5GB"  # largest file of a saved model, which transformers holds in memory while it writes it
logger = logging.getLogger(__name__)


def save_model(state: RunState, tokenizer: Any) -> Any:
    """Write model/ (only the adapter, unless it is merged) and its tokenizer; every rank must call it.

    Written under a temporary name and renamed, so that the folder is complete or absent. Returns the model. Raises
    CheckpointError where the disk is full; the checkpoint of the last step then stays.
    """
    parts, config = state.parts, state.config
    model = parts.plain.model
    causal_lm(model).config.get_text_config().use_cache = True
    _name_turn_end(model, tokenizer)
    left = "The checkpoint of the last step is whole" if state.saved >= 0 else "No checkpoint could be written"
    then = f"{left}. {and_resume(state.folder)}, which saves the model and repeats no step that a checkpoint holds"
    weights = gathered_weights(model, state.folder, parts.ranks, then) if config.fsdp else None
    if config.merge_adapter:
        model = merged(model) if layers_4bit(model) else model.merge_and_unload()  # type: ignore[operator]
    if isinstance(parts.plain, Valuer):
        tokenizer = _padded(model, tokenizer, weights)
    if parts.ranks.is_main:
        with saving("the model", state.folder, model_bytes(model) + ROOM, then):
            _replace(model, tokenizer, state.folder / "model", weights)
        if state.only_for_model:  # it was written in case this had failed
            checkpoint.remove_step(state.folder / "checkpoints", state.saved)
    parts.ranks.wait()
    return model


def clear_leftovers(run: Path) -> None:
    """Remove what killed saves of model/ left in a run's folder; a model that one had put aside gets its name back."""
    model = run / "model"
    for path in [*leftovers(run, r"\.model-before-(\d+)"), *leftovers(run, r"\.(?:model|weights)-(\d+)")]:
        if "before" in path.name and not model.exists():
            path.rename(model)
        else:
            remove(path)


def model_bytes(model: Any) -> int:
    """Return the bytes of the weights that saving a model writes: of a model with adapters, those of the adapters."""
    adapter = hasattr(model, "peft_config")
    trained = _bytes(p for p in model.parameters() if p.requires_grad or not adapter)
    return 2 * trained if adapter and has_start(model) else trained


def check_space(state: RunState) -> None:
    """Check, before the first step, that the disk has space for the files of the run. Raises CheckpointError.

    They are the model, the weights in a checkpoint and, with `patience`, the best ones; a resumed run has these two.
    """
    config, parts = state.config, state.parts
    of_checkpoint = _bytes(p for p in parts.policy.parameters() if p.requires_grad)
    copies = 0 if config.resume else 2 if config.patience is not None else 1
    # a sharded model is gathered into a file before it is written
    models = model_bytes(parts.plain.model) * (2 if config.fsdp else 1)
    needed = models + copies * of_checkpoint + ROOM
    what = "the model" if config.resume else "the run's checkpoint and model"
    then = and_resume(state.folder) if config.resume else "Free some space there, or choose another --output"
    with saving(what, state.folder, needed, then):
        pass


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    # of a sharded weight, numel is that of the whole
    return sum(int(p.numel()) * p.element_size() for p in parameters)


def _padded(model: Any, tokenizer: Any, weights: dict[str, Any] | None) -> Any:
    """Give a reward model the padding that it is used with; return its tokenizer."""
    tokenizer = padding_tokenizer(tokenizer)
    only_adapter = hasattr(model, "peft_config")
    pad_with(model, tokenizer, only_adapter=only_adapter, weights=weights)
    if only_adapter:
        logger.warning(
            "the reward model is saved as an adapter: to score rows of a padded batch with it, set "
            "model.config.pad_token_id after loading, as its README.md does; merge_adapter: true saves a model "
            "that needs nothing"
        )
    return tokenizer


def _replace(model: Any, tokenizer: Any, folder: Path, weights: dict[str, Any] | None) -> None:
    """Write the model under a temporary name and put it in the place of `folder`; nothing is left where that fails."""
    clear_leftovers(folder.parent)
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        _write(model, temporary, weights)
        save_processor(causal_lm(model), temporary)
        tokenizer.save_pretrained(temporary)
        try:
            card.write(temporary, folder.parent)
        except (AlignkitError, OSError) as error:  # the model is saved without it
            logger.warning("the model card could not be written: %s", error)
        share(temporary)
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
    except BaseException:
        remove(temporary)
        raise
    before = folder.with_name(f".{folder.name}-before-{os.getpid()}")
    if folder.exists():
        folder.rename(before)
    temporary.rename(folder)
    sync(folder.parent)
    remove(before)


def _write(model: Any, folder: Path, weights: dict[str, Any] | None) -> None:
    if hasattr(model, "peft_config"):
        save_adapter(model, folder, weights)
    else:
        model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD)


def _name_turn_end(model: Any, tokenizer: Any) -> None:
    # `generate` has to stop where the chat template ends an answer
    settings, end = getattr(causal_lm(model), "generation_config", None), turn_end(tokenizer)
    if settings is not None and end is not None and end != tokenizer.eos_token_id:
        settings.eos_token_id = [tokenizer.eos_token_id, end]
