"""Settings of low-rank adapters: a closed list, and for each other setting of peft why it cannot be set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# peft's LoraConfig has these too; the reason, or what to write instead
PEFT_SETTINGS = {
    "lora_alpha": "write alpha",
    "lora_dropout": "write dropout",
    "use_rslora": "write rslora",
    "use_dora": "write dora",
    "init_lora_weights": "write init",
    **dict.fromkeys(("task_type", "inference_mode", "peft_type", "auto_mapping"), "the method decides it"),
    **dict.fromkeys(
        ("base_model_name_or_path", "revision", "peft_version"), "it is recorded when the adapter is saved"
    ),
    "fan_in_fan_out": "it is found from the layer",
    "lora_bias": "a bias of the adapter cannot be merged into a layer without one; write bias: lora_only",
    "layers_pattern": "the list of layers is found from the model; write layers_to_transform",
    "trainable_token_indices": "write modules_to_save: [embed_tokens] to train the embeddings",
    "ensure_weight_tying": "tied weights stay tied where they are frozen; train a tied head without `lora`",
    "layer_replication": "the policy would have other layers than its reference",
    "alora_invocation_tokens": "the update would depend on the text, which packed rows do not allow",
    **dict.fromkeys(("megatron_config", "megatron_core"), "models of Megatron cannot be loaded here"),
    **dict.fromkeys(("use_qalora", "qalora_group_size"), "it needs a GPTQ model; write quantize: nf4"),
    **dict.fromkeys(
        ("eva_config", "corda_config", "lora_ga_config", "loftq_config"), "its initialisation is not offered"
    ),
    **dict.fromkeys(("monteclora_config", "kasa_config"), "it needs a loss of its own besides the method's"),
    "velora_config": "its gradient is an approximation; write gradient_checkpointing to save memory",
    "use_bdlora": "it is for serving many adapters on several GPUs",
    "arrow_config": "it routes between trained adapters and trains none",
    "runtime_config": "it is for DoRA on a CPU next to a GPU",
}
PEFT_INITS = {
    "eva": "needs activations of the data before the run",
    "corda": "needs activations of the data before the run",
    "lora_ga": "needs gradients of the loss before the run",
    "loftq": "quantises the model itself, so that the reference would not be the model that you gave",
    "mica": "freezes half of the adapter, which its authors tested on linear layers only",
}


def _alpha(given: Mapping[str, Any]) -> float:
    """Return the default of alpha: the scale is 2 at every rank, so that a sweep of ranks is no sweep of scales.

    rsLoRA's scale falls with the root of the rank, at the same alpha for all.
    """
    return 8.0 if given.get("rslora") else 2.0 * given.get("r", 16)


def _alphas(given: Mapping[str, Any]) -> dict[str, float]:
    """Return the default of alpha_pattern: where alpha has its default, the modules of rank_pattern have this scale."""
    if given.get("rslora") or given.get("alpha") != _alpha(given):
        return {}
    return {pattern: 2.0 * rank for pattern, rank in given.get("rank_pattern", {}).items()}


class LoraSettings(BaseModel):
    """Low-rank adapters on the policy (peft)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    r: int = Field(16, ge=1, description="rank")
    rslora: bool = Field(False, description="multiply the update by alpha / sqrt(r) instead (2312.03732)")
    alpha: float = Field(
        default_factory=_alpha,
        gt=0,
        description="scale; the update is multiplied by alpha / r; default: 2 r, with rslora 8, the same at r 16",
    )
    dora: bool = Field(False, description="also learn the length of each row of the weights (2402.09353)")
    target_modules: str | list[str] = Field("all-linear", description="module names, a pattern, or all-linear")
    target_parameters: list[str] | None = Field(
        None, description="matrices that are no modules, such as experts.gate_up_proj of fused experts"
    )
    exclude_modules: str | list[str] | None = Field(None, description="module names, or a pattern, without adapters")
    layers_to_transform: list[int] | None = Field(None, description="numbers of the layers with adapters; default: all")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field({}, description="module name or pattern: its rank")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=_alphas,
        description="module name or pattern: its alpha; default: so that rank_pattern does not change the scale",
    )
    modules_to_save: list[str] | None = Field(None, description="modules trained in full, such as lm_head")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="biases trained too: all, or of adapted layers"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the adapters' input, for methods without reference")
    init: str = Field("default", description="default, gaussian, orthogonal, olora, pissa or pissa_niter_N")

    @model_validator(mode="before")
    @classmethod
    def _names_of_peft(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and (known := next((k for k in values if k in PEFT_SETTINGS), None)):
            raise ValueError(f"'{known}', a setting of peft, cannot be set here: {PEFT_SETTINGS[known]}")
        return values

    @field_validator("init")
    @classmethod
    def _known_init(cls, init: str) -> str:
        if init in PEFT_INITS:
            raise ValueError(f"{init} {PEFT_INITS[init]}; use default, or pissa")
        if init not in ("default", "gaussian", "orthogonal", "olora", "pissa") and not re.fullmatch(
            r"pissa_niter_\d+", init
        ):
            raise ValueError(
                "must be default, gaussian, orthogonal, olora, pissa, or pissa_niter_16 for a faster pissa"
            )
        return init

    @model_validator(mode="after")
    def _fits_together(self) -> LoraSettings:
        ranks = [self.r, *self.rank_pattern.values()]
        if self.init == "orthogonal" and any(r % 2 for r in ranks):
            raise ValueError("init: orthogonal needs an even rank")
        if not self.changes_base:
            return self
        # the adapter is saved as the difference to its beginning, which peft can only express as a plain adapter
        for name, clash in (
            ("dora", self.dora),
            ("modules_to_save", bool(self.modules_to_save)),
            ("bias", self.bias != "none"),
            ("target_parameters", bool(self.target_parameters)),
            (
                "rslora with rank_pattern or alpha_pattern",
                self.rslora and bool(self.rank_pattern or self.alpha_pattern),
            ),
        ):
            if clash:
                raise ValueError(
                    f"init: {self.init} moves a part of the weights into the adapter, and cannot be combined "
                    f"with {name}; use init: default"
                )
        return self

    @field_validator("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
    @classmethod
    def _readable_patterns(cls, value: Any) -> Any:
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, Mapping) else ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
        return value

    @property
    def special(self) -> bool:
        """Whether the adapter starts otherwise than peft's default does."""
        return self.init not in ("default", "gaussian")

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation moves a part of the base weights into the adapter."""
        return self.init == "olora" or self.init.startswith("pissa")
