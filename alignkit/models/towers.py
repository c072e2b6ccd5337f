"""Models that read more than text: their language model is trained on text rows, and their towers stay as they are.

The towers are all other modules: the encoders of images, video and sound, and the projectors to the language model.
transformers' forward pass of text never enters them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from alignkit.errors import ModelError

_OF_PROCESSORS = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json",
)  # fmt: skip


def auto_class(about: Any, kind: str) -> Any:
    """Return transformers' class that loads the whole checkpoint with this configuration, as `kind` (see `Kind`).

    Raises ModelError where transformers has no classifier on the language model.
    """
    import transformers
    from transformers.models.auto import modeling_auto as known

    multimodal = type(about) in known.MODEL_FOR_MULTIMODAL_LM_MAPPING
    if kind == "causal":
        # AutoModelForCausalLM would load some of them without their towers, and save them so
        return transformers.AutoModelForMultimodalLM if multimodal else transformers.AutoModelForCausalLM
    if multimodal and type(about) not in known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"transformers has no sequence classifier for {about.model_type}, a multimodal model, so it cannot become "
            "a reward model or a separate critic; use a text model, or critic: shared"
        )
    return transformers.AutoModelForSequenceClassification


def is_multimodal(lm: Any) -> bool:
    """Return whether a transformers model has a language model and other parts."""
    return lm.config.get_text_config() is not lm.config


def trunk_of(lm: Any) -> Any:
    """Return the module that computes the last hidden states of text.

    Raises ModelError where a multimodal model does not name its language model.
    """
    found = lm.get_decoder() if is_multimodal(lm) else lm.base_model
    if found is lm or getattr(found, "lm_head", None) is not None:
        # Llama 4 names a prefix that it does not have, so transformers finds the model with its head
        found = getattr(found, "model", lm)
    if found is lm:
        raise ModelError(f"{type(lm).__name__} does not say which of its parts is the language model")
    return found


def towers(lm: Any) -> list[str]:
    """Return the paths of the outermost modules outside the language model; none for a text model."""
    if not is_multimodal(lm):
        return []
    own = {id(m) for part in _language(lm) for m in part.modules()}
    return list(_outermost(lm, "", own))


def in_towers(lm: Any) -> set[int]:
    """Return the ids of all modules of the towers."""
    return {id(m) for name in towers(lm) for m in lm.get_submodule(name).modules()}


def freeze_towers(lm: Any) -> None:
    """Let a multimodal model train its language model only, adapters on it included."""
    if not is_multimodal(lm):
        return
    own = {id(p) for part in _language(lm) for p in part.parameters()}
    for parameter in lm.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)


def save_processor(lm: Any, folder: Path) -> None:
    """Copy the settings that images are prepared with, where the checkpoint of the model has such files."""
    from transformers.utils import cached_file

    for name in _OF_PROCESSORS if is_multimodal(lm) and lm.name_or_path else ():
        found = cached_file(
            lm.name_or_path, name, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if found is not None:
            shutil.copyfile(found, folder / name)


def _language(lm: Any) -> list[nn.Module]:
    parts = (trunk_of(lm), lm.get_output_embeddings(), getattr(lm, "score", None))
    return [part for part in parts if isinstance(part, nn.Module)]


def _outermost(module: nn.Module, path: str, own: set[int]) -> Iterator[str]:
    for name, child in module.named_children():
        if id(child) in own:
            continue
        if any(id(m) in own for m in child.modules()):
            yield from _outermost(child, f"{path}{name}.", own)
        else:
            yield path + name
