"""Low-rank adapters (peft): adding them, and the model as it was before they were trained."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import nn

from alignkit.errors import ModelError, first_line, nearest
from alignkit.lora_settings import LoraSettings
from alignkit.models.adapters.experts import check_parameters, fused, own_linears
from alignkit.models.towers import in_towers, is_multimodal, towers

Kind = Literal["causal", "classifier"]
TRAINED, START = "default", "start"  # names of adapters in peft; START is frozen


def add_lora(model: nn.Module, settings: LoraSettings, kind: Kind = "causal") -> nn.Module:
    """Wrap the model with new adapters (peft); a classifier's head is trained in full.

    Where the initialisation changes the base weights, a frozen copy of the new adapters is kept for `before_training`.
    Raises ModelError where a setting matches no module.
    """
    from peft import get_peft_model

    # without data there is nothing to start from
    new = (
        settings if next(model.parameters()).device.type != "meta" else settings.model_copy(update={"init": "default"})
    )
    _check_possible(model, settings, kind)
    try:
        made: Any = get_peft_model(model, _lora_config(model, new, kind))
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        outside = in_towers(model)
        found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in outside]
        linear = {n.rsplit(".", 1)[-1] for n in found}
        raise ModelError(f"LoRA: {first_line(error)} The linear modules are {', '.join(sorted(linear))}") from error
    _check_matched(made, settings)
    check_parameters(made, settings.target_parameters or [])
    if settings.changes_base:
        _keep_start(made, settings, kind)
    return made  # type: ignore[no-any-return]


def _check_possible(model: nn.Module, settings: LoraSettings, kind: Kind) -> None:
    """Raise ModelError for settings that peft cannot apply to this model, or would save in part."""
    if kind == "classifier" and settings.changes_base:
        raise ModelError(
            f"lora.init: {settings.init} cannot be used for a reward model or a critic: its head would not be saved "
            "with the adapter; use init: default"
        )
    experts = [name for name in fused(model) if settings.target_modules == "all-linear" or settings.target_parameters]
    start = f"init: {settings.init}"
    for name, given in (("dora", settings.dora), ("dropout", settings.dropout > 0), (start, settings.special)):
        if given and experts:
            raise ModelError(
                f"lora.{name} cannot be used on fused experts ({', '.join(experts)}), which all-linear may adapt; "
                "name the modules, such as target_modules: [q_proj, v_proj]"
            )


def _lora_config(model: nn.Module, settings: LoraSettings, kind: Kind) -> Any:
    from peft import LoraConfig

    targets, layers = settings.target_modules, settings.layers_to_transform
    if targets == "all-linear" and layers is not None:  # peft combines `layers_to_transform` with a list only
        targets = _linear_in_layers(model)
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        target_modules=targets,
        target_parameters=settings.target_parameters,
        exclude_modules=_excluded(model, settings),
        layers_to_transform=layers,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        modules_to_save=None if settings.modules_to_save is None else [*settings.modules_to_save],  # peft adds to it
        bias=settings.bias,
        lora_dropout=settings.dropout,
        init_lora_weights=True if settings.init == "default" else settings.init,  # type: ignore[arg-type]
        task_type=_task(model, kind),  # type: ignore[arg-type]
    )


def _task(model: nn.Module, kind: Kind) -> str | None:
    """Return peft's task; None for a multimodal model, so that the saved adapter names the class of its base."""
    if kind == "classifier":
        return "SEQ_CLS"
    return None if is_multimodal(model) else "CAUSAL_LM"


def check_mergeable(model: Any) -> None:
    """Raise ModelError where merging would change two things: an adapter on one end of tied embeddings."""
    base = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    weights = [getattr(getattr(end, "base_layer", end), "weight", None) for end in ends]
    adapted = [len(getattr(end, name, ())) for end in ends for name in ("lora_A", "lora_embedding_A")]
    if weights[0] is not weights[1] or not any(adapted):
        return
    raise ModelError(
        "merge_adapter: the embeddings and the head share their weights, and an adapter is on one of them: merging it "
        "would change both. Leave them out of lora.target_modules, put them into lora.modules_to_save, or remove "
        "merge_adapter"
    )


def _excluded(model: nn.Module, settings: LoraSettings) -> str | list[str] | None:
    """Return the modules without adapters: those of the settings, the towers, and those that LoRA cannot wrap."""
    given, own, outside = settings.exclude_modules, own_linears(model), towers(model)
    if not outside and not isinstance(given, str):
        return [*(given or []), *own] or None
    wanted = [f"(?:{given})"] if isinstance(given, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in given or []]
    return "|".join([*wanted, *map(re.escape, own), *(rf"{re.escape(name)}(?:\..*)?" for name in outside)])


def _linear_in_layers(model: nn.Module) -> list[str]:
    """Return the names, inside a layer, of the layers' linear modules; Conv1D is GPT-2's."""
    kinds = (nn.Linear,)
    names = [n for n, m in model.named_modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"]
    return sorted({m[1] for n in names if (m := re.search(r"\.\d+\.(.+)$", n))})


def _check_matched(model: Any, settings: LoraSettings) -> None:
    """Raise ModelError where a name or pattern of the settings matches nothing, which peft ignores."""
    adapted: list[str] = model.base_model.targeted_module_names
    everything = [n for n, _ in model.get_base_model().named_modules()]
    outside = tuple(f"{name}." for name in towers(model.get_base_model()))
    trainable = [n for n in everything if not f"{n}.".startswith(outside)] if outside else everything
    targets, without = settings.target_modules, settings.exclude_modules
    if isinstance(without, str) and not any(re.fullmatch(without, n) for n in everything):
        raise _unmatched("exclude_modules", without, everything)
    names: tuple[tuple[str, Sequence[str], list[str]], ...] = (
        ("target_modules", targets if isinstance(targets, list) else [], adapted),
        ("exclude_modules", without if isinstance(without, list) else [], everything),
        ("modules_to_save", settings.modules_to_save or [], trainable),
    )
    for setting, given, there in names:
        for name in given:
            if not any(n == name or n.endswith(f".{name}") for n in there):
                raise _unmatched(setting, name, everything if setting == "exclude_modules" else trainable)
    for setting, patterns in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        for pattern in patterns:
            if not any(re.match(rf"(.*\.)?({pattern})$", n) for n in adapted):
                raise _unmatched(setting, pattern, adapted)
    for layer in settings.layers_to_transform or []:
        if not any(f".{layer}." in n for n in adapted):
            numbers = {int(m[1]) for n in trainable if (m := re.search(r"\.(\d+)\.", n))}
            raise ModelError(
                f"lora.layers_to_transform: layer {layer} has no module to adapt; the model's layers are 0 to "
                f"{max(numbers, default=0)}"
            )


def _unmatched(setting: str, name: str, names: Sequence[str]) -> ModelError:
    last = sorted({n.rsplit(".", 1)[-1] for n in names if n and not n.rsplit(".", 1)[-1].isdigit()})
    return ModelError(
        f"lora.{setting}: '{name}' matches no module that can have it.{nearest(name, last)} Modules: {', '.join(last)}"
    )


def _keep_start(model: Any, settings: LoraSettings, kind: Kind) -> None:
    # the base holds what is left; together with the adapters as they are now it is the original model
    plain = settings.model_copy(update={"init": "default", "dropout": 0.0})
    model.add_adapter(START, _lora_config(model.get_base_model(), plain, kind))
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        own = parameters[name.replace(f".{START}", f".{TRAINED}")]
        if own is not parameter and own.device.type != "meta":
            parameter.data.copy_(own.data)
    model.set_adapter(TRAINED)


def set_adapter_dropout(model: nn.Module, probability: float) -> None:
    """Set the dropout of the adapters' input; they have none where they were added without."""
    for module in model.modules():
        held = getattr(module, "lora_dropout", None)
        for dropout in held.values() if isinstance(held, nn.ModuleDict) else ():
            if isinstance(dropout, nn.Dropout):
                dropout.p = probability


def has_start(model: Any) -> bool:
    """Return whether the base weights were changed, and the model before training is the one with START."""
    return START in getattr(model, "peft_config", {})


@contextmanager
def before_training(model: Any) -> Iterator[None]:
    """Inside the block, the model computes what it computed before its new adapters were trained."""
    if not has_start(model):
        with model.disable_adapter():
            yield
        return
    model.set_adapter(START, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(TRAINED)


def save_adapter(model: Any, folder: Path, state: dict[str, Any] | None) -> None:
    """Save the trained adapter so that it applies to the original base weights.

    An adapter whose beginning was taken out of the base is saved as the difference to it: a plain adapter of twice the
    rank (peft's conversion).
    """
    if not has_start(model):
        model.save_pretrained(folder, state_dict=state)
        return
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, selected_adapters=[START])
        model.save_pretrained(
            folder, selected_adapters=[TRAINED], path_initial_model_for_weight_conversion=f"{temporary}/{START}"
        )
    model.set_adapter(TRAINED)
