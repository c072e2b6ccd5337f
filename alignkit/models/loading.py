"""Loading tokenizers and models, and setting a model up for training."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignkit.config import RunConfig
from alignkit.errors import ConfigError, ModelError, first_line
from alignkit.hub import is_path
from alignkit.models.adapters import Kind, add_lora, check_mergeable, summary
from alignkit.models.branches import attend_by_branches
from alignkit.models.compiled import compile_parts
from alignkit.models.dropout import drop_dropout
from alignkit.models.embedding_noise import ALPHA
from alignkit.models.places import look, where
from alignkit.models.quantised import check_frozen, copy_marks, floating, layers_4bit, nf4, settle
from alignkit.models.refusals import cause, reason
from alignkit.models.towers import auto_class, freeze_towers, towers
from alignkit.models.unread import FILES, adapters_in_memory, has_only_matrices, is_unread, unread, whole_because, zero

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(config: RunConfig) -> Any:
    """Return the tokenizer of the run. Raises ModelError naming the folder where it has none."""
    given = config.tokenizer if config.tokenizer is not None else config.model
    if not isinstance(given, str | Path):
        if config.tokenizer is None:
            raise ModelError("a model object was given without its tokenizer; pass tokenizer=")
        return given
    from transformers import AutoTokenizer

    look(given)
    try:
        return AutoTokenizer.from_pretrained(str(given), trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers raises many types here
        why = reason(error, given)
        raise ModelError(f"cannot load a tokenizer from '{given}'{where(given)}: {why}") from cause(error)


def load_model(config: RunConfig, device: torch.device, kind: Kind = "causal") -> tuple[nn.Module, bool]:
    """Return the model on `device`, ready to train, adapters attached, and whether it came with a trained adapter.

    Dropout is off. Raises ModelError: nothing to load, or LoRA on top of an adapter.
    """
    model = config.model
    if isinstance(model, str | Path):
        model = from_pretrained(str(model), config, kind)
    else:
        settle(model, compute_dtype(config))
        if kind == "classifier" and not hasattr(causal_lm(model), "score"):
            model = classifier_like(model)
    came_with_adapter = hasattr(model, "peft_config")
    if config.lora and came_with_adapter:
        raise ModelError("the model already has an adapter, which is trained further; leave out `lora`")
    if config.lora:
        with adapters_in_memory():
            model = add_lora(model, config.lora, kind)
    check_frozen(model, config.quantize is not None)
    if config.lora is not None:
        logger.info("%s", summary(model))
    if config.merge_adapter:
        check_mergeable(model)
    return readied(model, config, device), came_with_adapter


def readied(model: nn.Module, config: RunConfig, device: torch.device) -> nn.Module:
    """Set up a model for training on `device`, and move it there."""
    set_up(model, config, device)
    if config.torch_compile:
        compile_parts(causal_lm(model), device)
    return model if is_unread(model) else model.to(device)


def set_up(model: nn.Module, config: RunConfig, device: torch.device) -> None:
    """Apply the settings of `config` to a model: dropout off, cache off, gradient checkpointing, attention.

    Of a multimodal model, only the language model is trained.
    """
    drop_dropout(model)
    lm = causal_lm(model)
    freeze_towers(lm)
    setattr(lm.get_input_embeddings(), ALPHA, config.neftune_alpha)
    if config.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lm.config.get_text_config().use_cache = False
    if config.attention == "flex_attention" and device.type == "cpu":
        raise ConfigError(
            "attention: flex_attention needs a GPU: PyTorch computes no gradient of it on a CPU; use auto"
        )
    if config.attention != "auto":
        lm.set_attn_implementation(config.attention)
    elif device.type == "cuda" and config.layout != "padded" and getattr(lm, "_supports_flex_attn", False):
        lm.set_attn_implementation("flex_attention")
    elif device.type == "cpu" and config.layout != "padded" and lm.config._attn_implementation == "sdpa":
        attend_by_branches(lm)


def from_pretrained(name: str, config: RunConfig, kind: Kind = "causal", weights: bool = True) -> nn.Module:
    """Load a folder or hub name as a causal language model, or as a classifier with one label, whose head may be new.

    weights: False reads configurations only; the model is on the meta device. Raises ModelError naming the problem.
    """
    from transformers import AutoConfig

    what = "causal language model" if kind == "causal" else "sequence classifier"
    look(name)
    adapter = Path(name) / "adapter_config.json"
    try:
        if adapter.is_file():
            from peft import PeftConfig, PeftModel, get_peft_model

            base = json.loads(adapter.read_text())["base_model_name_or_path"]
            if is_path(base) and not Path(base).expanduser().exists():
                raise ModelError(f"cannot load a {what} from '{name}': its base '{base}' is gone; name it in {adapter}")
            look(base)
            # peft reads only low-rank matrices into a model that is not read itself
            whole = config if has_only_matrices(Path(name)) else config.model_copy(update={"fsdp": False})
            model = _made(base, whole, kind, weights)
            if weights:
                with adapters_in_memory():
                    return PeftModel.from_pretrained(model, name, is_trainable=True)  # type: ignore[no-any-return]
            settings = PeftConfig.from_pretrained(name)
            settings.inference_mode = False
            return get_peft_model(model, settings)  # type: ignore[no-any-return]
        about = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
        if getattr(about, "is_encoder_decoder", False):  # its decoder alone would load, without some weights
            raise ModelError(f"'{name}' is an encoder-decoder model ({about.model_type}); give a causal language model")
        if kind == "classifier" and about.num_labels != 1 and "Classification" in str(about.architectures):
            raise ModelError(f"'{name}' is a classifier with {about.num_labels} labels; a reward model has 1")
        return _made(name, config, kind, weights)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many types here
        raise ModelError(f"cannot load a {what} from '{name}'{where(name)}: {reason(error, name)}") from cause(error)


def on_cpu(config: RunConfig) -> bool:
    """Return whether a run uses no GPU."""
    return config.device == "cpu" or not torch.cuda.is_available()


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Return the data type of matrix products."""
    if config.precision == "bf16" or (config.precision == "auto" and not on_cpu(config)):
        return torch.bfloat16
    return DTYPES[config.dtype]


def _place(config: RunConfig) -> torch.device:
    # bitsandbytes quantises on a device, a layer at a time
    return torch.device("cpu") if on_cpu(config) else torch.device("cuda", torch.cuda.current_device())


def _made(name: str, config: RunConfig, kind: Kind, weights: bool) -> nn.Module:
    from transformers import AutoConfig

    trusted = config.trust_remote_code
    options: dict[str, Any] = {"dtype": DTYPES[config.dtype], "trust_remote_code": trusted}
    labels = {"num_labels": 1} if kind == "classifier" else {}
    about = AutoConfig.from_pretrained(name, trust_remote_code=trusted, **labels)
    auto = auto_class(about, kind)
    if weights and config.fsdp and (model := unread(name, auto, about, options, whole_because(config))) is not None:
        return model
    if weights and config.quantize:
        with torch.device("meta"):
            outside = towers(auto.from_config(about, **options))
        options |= {"quantization_config": nf4(compute_dtype(config), outside), "device_map": {"": _place(config)}}
    if weights:
        with torch.random.fork_rng(devices=[]):  # a new head would draw numbers, which adapters then lack
            model = _whole(name, *auto.from_pretrained(name, **options, **labels, output_loading_info=True))
        settle(model, compute_dtype(config))
        return model
    with torch.device("meta"):
        return auto.from_config(about, **options)  # type: ignore[no-any-return]


def _whole(name: str, model: nn.Module, loading: Mapping[str, Any]) -> nn.Module:
    # transformers initialises missing weights at random and only warns (a classifier loaded as a language model)
    if missing := sorted(k for k in loading["missing_keys"] if k != "score.weight"):
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ModelError(
            f"the checkpoint in '{name}' lacks {len(missing)} weight{'s' * (len(missing) > 1)} of "
            f"{type(model).__name__}: {', '.join(missing[:4])}{more}"
        )
    if "score.weight" in loading["missing_keys"]:
        nn.init.zeros_(model.get_parameter("score.weight"))  # as in `classifier_like`
    return model


def causal_lm(model: Any) -> Any:
    """Return the transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def classifier_like(model: nn.Module) -> nn.Module:
    """Return a one-label classifier on a copy of a causal language model's trunk; its head begins at 0.

    Adapters are merged into the copy. Raises ModelError where transformers has no classifier for the architecture.
    """
    copied: Any = _without_adapters(copy.deepcopy(model))
    config, body = copied.config, copied.base_model
    auto = auto_class(config, "classifier")
    config.num_labels = 1
    try:
        with torch.device("meta"):
            made = auto.from_config(config)
    except ValueError as error:
        raise ModelError(
            f"{type(copied).__name__} cannot become a reward model or a critic: {first_line(error)}"
        ) from error
    made.config = config
    setattr(made, made.base_model_prefix, body)
    device = next(body.parameters()).device
    made.score = nn.Linear(made.score.in_features, 1, bias=False, device=device, dtype=floating(body))
    zero(made.score)
    setattr(made, FILES, getattr(copied, FILES, {}))
    copy_marks(copied, made)
    for parameter in made.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return made  # type: ignore[no-any-return]


def _without_adapters(model: Any) -> Any:
    if not hasattr(model, "merge_and_unload"):
        return model
    if is_unread(model) and _trained(model):
        raise ModelError("under fsdp a critic cannot start from a trained adapter: merge it first, or use a folder")
    if not layers_4bit(model) and not is_unread(model):
        return model.merge_and_unload()
    if _trained(model):
        raise ModelError(
            "a critic cannot start from a trained adapter on a 4-bit base: merging it would round its update away; use "
            "critic: shared, or a folder"
        )
    return model.unload()  # new adapters change nothing yet


def _trained(model: Any) -> bool:
    return any(bool(p.any()) for n, p in model.named_parameters() if ".lora_B." in n)
