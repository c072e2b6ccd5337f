"""RunConfig: everything that is needed to repeat a run. Python, YAML and the command line all fill it.

Settings are flat: `learning_rate` belongs to the run, `beta` to the method, and both are keys of the same file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from alignkit.alarms import ALARMS, Health
from alignkit.data_spec import plain, sources_of
from alignkit.environment_settings import EnvironmentSettings
from alignkit.errors import ConfigError, nearest, without_passwords
from alignkit.files import replace_text
from alignkit.hints import hint, names_of
from alignkit.lora_settings import LoraSettings
from alignkit.method import MethodConfig
from alignkit.rollout_settings import Rollout, Sampling, moved_backend

Decay = Annotated[float, Field(ge=0, lt=1)]
TrainOn = Literal["all", "last"]
OnDropped = Literal["refuse", "report", "keep-by-hand"]
ReferenceMode = Literal["auto", "full", "int8", "adapter-off", "cached"]


class RunConfig(BaseModel):
    """Settings of a run, besides the method's own."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), arbitrary_types_allowed=True
    )

    method: str = Field(description="name of an installed method, see `alignkit methods`")
    model: Any = Field(description="folder or hub name of the model, or a loaded model")
    data: Any = Field(
        description="JSONL, Parquet or CSV file, folder, glob, hub name, datasets.Dataset, list of dicts, or a list of "
        "{path, name, split, weight, columns}, see docs/data.md"
    )
    tokenizer: Any = Field(None, description="folder, hub name or object; default: the model's")
    eval_data: Any = Field(None, description="held-out rows; default: none, or `eval_fraction` of the data")
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="fraction of the data held out for evaluation")
    columns: dict[str, str] | None = Field(
        None, description="our column name: your column name; 'form' overrides the detection"
    )
    order_by: str | None = Field(
        None, description="column of numbers in whose order rows are read, smallest first; -column: largest first"
    )

    streaming: bool = Field(False, description="read the rows while the run goes on, see docs/data.md")
    shuffle_buffer: int = Field(1000, ge=1, description="rows among which the order is random, with streaming")

    tools: list[dict[str, Any]] | None = Field(None, description="JSON schemas of tools, for rows without `tools`")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="variables of the chat template, such as enable_thinking; a row's own come first"
    )
    train_on: TrainOn = Field("all", description="turns of the assistant that are learned in an answer")
    on_dropped: OnDropped = Field(
        "refuse", description="where the chat template leaves out a part of a learned answer, see docs/chat.md"
    )
    special_tokens_in_text: bool = Field(
        False, description="special tokens spelled out in the rows are control tokens: text that is templated already"
    )
    template_date: date | None = Field(
        None, description="the date that chat templates write; default: the day on which the run starts"
    )

    output: Path = Field(Path("runs"), description="folder of the runs")
    name: str | None = Field(None, description="folder of this run in `output`; default: method and a number")
    quiet: bool = Field(False, description="show warnings and errors only")
    resume: bool = Field(False, description="continue from the newest complete checkpoint of the run `name`")
    rows_cache: bool = Field(True, description="keep tokenised rows in `output`/.rows for other runs, from 1 MiB on")

    reference: ReferenceMode = Field("auto", description="form of the reference; auto decides by method and model")
    reference_cache: bool = Field(True, description="keep the reference's log-probabilities on disk for other runs")
    cache_file: Path | None = Field(None, description="the cache's file; default: ~/.cache/alignkit/reference.sqlite")
    lora: LoraSettings | None = Field(None, description="train adapters instead of all weights")
    quantize: Literal["nf4"] | None = Field(None, description="nf4: the frozen base in 4 bits, for adapters (QLoRA)")
    sampling: Sampling = Field(Sampling(), description="how completions are sampled, for methods that sample")
    rollout: Rollout = Field(Rollout(), description="what samples them, see docs/rollout.md")
    environment: EnvironmentSettings | None = Field(
        None, description="tools or an environment, see docs/environments.md"
    )
    reward: Any = Field(None, description="reward that scores sampled completions, see docs/rewards.md")
    judge: Any = Field(None, description="judge that compares two sampled completions, see docs/rewards.md")
    reward_timeout: float | None = Field(600.0, gt=0, description="seconds for one call of a reward or judge function")
    critic: str = Field(
        "auto", description="starts from policy, reward (its model) or a folder; shared: on the policy's trunk"
    )
    critic_learning_rate: float | None = Field(None, gt=0, description="peak rate of the critic; default: the policy's")
    merge_adapter: bool = Field(False, description="merge the adapter into the saved model")
    push_to_hub: str | None = Field(None, description="repository to which the model is uploaded; a new one is private")
    neftune_alpha: float | None = Field(
        None, gt=0, description="scale of noise in the embeddings (NEFTune), for methods that compute no ratio"
    )

    epochs: float = Field(1.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="optimiser steps; overrides `epochs`")
    batch_size: int = Field(32, ge=1, description="examples in an optimiser step, over all ranks")
    epochs_per_batch: int | None = Field(None, ge=1, description="passes over a collected batch; default: the method's")
    minibatches: int = Field(1, ge=1, description="updates in each of those passes")
    learning_rate: float | None = Field(None, gt=0, description="peak rate; default: the method's")
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse-sqrt"] = Field(
        "cosine", description="after the warm-up; wsd: constant, then linear to 0 over `decay_fraction`"
    )
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="fraction of the steps over which the rate rises")
    decay_fraction: float = Field(0.1, ge=0, le=1, description="fraction of the steps over which the rate of wsd falls")
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit", "adafactor", "muon", "sgd"] = Field(
        "adamw", description="8bit: bitsandbytes; muon: for matrices, with adamw for the rest"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay (sgd: L2), applied to matrices only")
    adam_betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's decay rates of the moments")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon, added to the root of the second moment")
    momentum: Decay | None = Field(None, description="of muon (default 0.95) and sgd (default 0)")
    max_grad_norm: float = Field(1.0, ge=0, description="global norm to which gradients are clipped; 0: not clipped")
    max_skipped_steps: int = Field(10, ge=0, description="non-finite steps skipped before the run stops")

    max_prompt_tokens: int | None = Field(1024, ge=1, description="longer prompts are cut at their beginning")
    max_completion_tokens: int | None = Field(1024, ge=1, description="longer completions are cut and have no EOS")
    max_tokens: int = Field(8192, ge=1, description="tokens of a micro-batch; affects memory, never the result")
    layout: Literal["auto", "forest", "padded"] = Field("auto", description="auto: forest where the probe allows")
    row_tokens: int | None = Field(None, ge=1, description="largest width of a forest row; default: by device")
    attention: Literal["auto", "sdpa", "eager", "flex_attention"] = Field("auto", description="implementation")

    device: Literal["auto", "cpu"] = Field("auto", description="cpu: do not use a GPU")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="precision of matrix products")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="data type of the weights")
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more time")
    torch_compile: bool = Field(False, description="norms and feed-forward layers by torch.compile; pays in long runs")
    kept_logits_gib: float = Field(
        1.0, ge=0, description="logits kept for the backward of a trained head; others are computed twice"
    )
    fsdp: bool = Field(False, description="shard the models over the ranks (FSDP2)")
    fsdp_replicas: int = Field(1, ge=1, description="groups of ranks that each hold all shards (HSDP); one for a node")
    timeout_minutes: float = Field(
        30.0, gt=0, le=100_000, description="the run ends where a rank, or servers that sample, need longer to answer"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model; never from a YAML file")

    allow_changed_models: bool = Field(False, description="resume although a model changed; never from a YAML file")

    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of the data's order and of everything random")
    log_every: int = Field(1, ge=1, description="steps between log lines")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; default: start and end")
    patience: int | None = Field(None, ge=1, description="stop after this number of evaluations without improvement")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints, besides `save_minutes`")
    save_minutes: float = Field(30.0, gt=0, description="minutes between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept")
    trackers: list[str] = Field([], description="tensorboard, wandb, mlflow, trackio, ...: Accelerate's names")
    callbacks: list[Any] = Field(
        [], description="listeners of this run: functions or objects, module:name, file.py, see docs/health.md"
    )
    health: Health = Field(Health(), description="limits of the health alarms, see docs/health.md")
    stop_on: list[str] = Field([], description="names of alarms that end the run, after a checkpoint")

    @field_validator("name")
    @classmethod
    def _name_stays_inside(cls, name: str | None) -> str | None:
        if name is not None and (not re.fullmatch(r"[A-Za-z0-9_.+=-]{1,200}", name) or set(name) == {"."}):
            raise ValueError("must have only letters, digits and . _ + = -, so that it stays inside `output`")
        return name

    @field_validator("model", "tokenizer")
    @classmethod
    def _no_plain_value(cls, value: Any) -> Any:
        if value == "" or isinstance(value, bool | int | float | list | dict):
            raise ValueError("give a folder, a hub name, or a loaded object")
        return value

    @field_validator("data", "eval_data")
    @classmethod
    def _sources_that_can_be_read(cls, value: Any, info: ValidationInfo) -> Any:
        try:
            found = sources_of(value) or []
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if info.field_name == "eval_data" and any(source.weight is not None for source in found):
            raise ValueError("held-out rows are scored once each, so their sources have no weight; remove it")
        return value

    @field_validator("trackers", "stop_on", "callbacks", mode="before")
    @classmethod
    def _names_in_one_text(cls, value: Any) -> Any:
        if value is None:  # `--set stop_on=` has no value
            return []
        return [name for part in value.split(",") if (name := part.strip())] if isinstance(value, str) else value

    @field_validator("stop_on")
    @classmethod
    def _alarms_that_there_are(cls, names: list[str]) -> list[str]:
        unknown = next((n for n in names if n not in ALARMS), None)
        if unknown is not None:
            raise ValueError(f"no alarm is called '{unknown}'.{nearest(unknown, ALARMS)} Alarms: {', '.join(ALARMS)}")
        return names

    @field_validator("lora", mode="before")
    @classmethod
    def _lora_by_flag(cls, value: Any) -> Any:
        # `lora: true` uses the defaults, `lora: 8` sets the rank
        if value is True or value == "true":
            return {}
        if value is False or value == "false":
            return None
        return {"r": value} if isinstance(value, int | str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.resume and self.name is None:
            raise ValueError("resume needs the run's `name`")
        if off := [name for name in self.stop_on if not self.health.enabled or getattr(self.health, name) is None]:
            raise ValueError(
                f"stop_on names {off[0]}, which `health` switches off; set its limit, or remove it from stop_on"
            )
        if self.merge_adapter and self.lora is None:
            raise ValueError("merge_adapter needs `lora`")
        self.rollout.check_fit(self.sampling)
        self._check_optimizer()
        self._check_unused()
        if self.quantize and self.fsdp:
            raise ValueError("4-bit weights cannot be sharded; remove quantize or fsdp")
        if self.quantize and self.lora and self.lora.changes_base:
            raise ValueError(
                f"lora.init: {self.lora.init} changes the base, which would be rounded to 4 bits again; "
                "use init: default"
            )
        if self.lora and self.lora.changes_base and self.fsdp:
            raise ValueError(
                f"lora.init: {self.lora.init} saves the adapter as the difference to its beginning, which fsdp "
                "has sharded; use init: default"
            )
        if self.merge_adapter and self.fsdp:
            raise ValueError("merge_adapter cannot merge a sharded model; merge the saved adapter afterwards")
        if self.eval_data is not None and self.eval_fraction:
            raise ValueError("give eval_data or eval_fraction, not both")
        if self.streaming:
            self._can_stream()
        return self

    def _can_stream(self) -> None:
        if self.max_steps is None:
            raise ValueError("streaming needs max_steps, because the number of rows is not known; set it")
        if self.eval_fraction:
            raise ValueError("streaming cannot hold out a fraction of rows that it does not hold; give eval_data")
        if self.order_by is not None:
            raise ValueError("streaming cannot sort rows that it does not hold; remove order_by, or sort the file")
        if len(sources_of(self.data) or []) > 1:
            raise ValueError("streaming reads one source; give one folder or glob for several files")
        if None in (self.max_prompt_tokens, self.max_completion_tokens):
            raise ValueError(
                "streaming needs max_prompt_tokens and max_completion_tokens: the longest row is not known"
            )

    @property
    def caches_reference(self) -> bool:
        """Whether the reference's log-probabilities are kept on disk, which needs all rows before the first step."""
        return self.reference_cache and not self.streaming

    def _check_unused(self) -> None:
        """Refuse settings that would have no effect."""
        for name, used, needs in (
            ("shuffle_buffer", self.streaming, "streaming: true"),
            ("rows_cache", not self.streaming, "streaming: false"),
            ("decay_fraction", self.schedule == "wsd", "schedule: wsd"),
            ("fsdp_replicas", self.fsdp, "fsdp: true"),
            ("row_tokens", self.layout != "padded", "layout: auto or forest"),
            ("adam_betas", self.optimizer not in ("sgd", "adafactor"), "AdamW or Muon"),
            ("adam_epsilon", self.optimizer not in ("sgd", "adafactor"), "AdamW or Muon"),
        ):
            if not used and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has an effect with {needs} only; remove it")
        if self.lora is not None and self.lora.changes_base and self.dtype == "bfloat16":
            raise ValueError(
                f"lora.init: {self.lora.init} takes a part out of the weights, which bfloat16 rounds, so that the "
                "reference would be another model; use dtype: float32, or init: default"
            )

    def _check_optimizer(self) -> None:
        if self.optimizer in ("sgd", "adafactor") and self.learning_rate is None:
            raise ValueError(
                f"optimizer: {self.optimizer} needs learning_rate: the methods' defaults are for AdamW, whose steps "
                "have another size"
            )
        if self.momentum is not None and self.optimizer not in ("sgd", "muon"):
            raise ValueError(f"momentum is for optimizer: sgd or muon, not {self.optimizer}; remove it")
        if self.fsdp and self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer: {self.optimizer} needs whole matrices, which fsdp shards; use adamw or sgd")
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction and decay_fraction are more than 1 together; lower one of them")

    @property
    def longest_completion(self) -> int:
        """Tokens of the longest sampled completion, or of the longest trajectory after its prompt."""
        return self.environment.max_tokens if self.environment else self.sampling.max_new_tokens

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain YAML values; objects without a YAML form become their type's name."""
        values: dict[str, Any] = {}
        for name, value in self:
            if isinstance(value, Path | date):
                value = str(value)
            elif name in ("data", "eval_data") and (sources := plain(value)) is not None:
                value = sources
            elif name in ("model", "tokenizer", "data", "eval_data"):
                value = value if isinstance(value, str | None) else f"<{type(value).__name__}>"
            elif isinstance(value, BaseModel):
                value = value.model_dump(mode="python" if name == "environment" else "json")
            elif isinstance(value, tuple):
                value = list(value)
            values[name] = _named(value) if name in ("reward", "judge", "callbacks", "environment") else value
        return values


def _named(value: Any) -> Any:
    """Return a reward's or judge's spec with its functions as "module:function"."""
    if isinstance(value, Mapping):
        return {str(k): _named(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_named(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    return f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', type(value).__name__)}"


# what lets a stranger's file run code, or lose what a run was compared with
NEVER_IN_A_FILE = ("trust_remote_code", "allow_changed_models")

M = TypeVar("M", bound=BaseModel)


def split(settings: Mapping[str, Any], method_config: type[MethodConfig]) -> tuple[RunConfig, MethodConfig]:
    """Split flat settings into the run's and the method's, and validate both.

    Raises ConfigError: an unknown key with what it is called here, or all invalid values.
    """
    known_run, known_method = RunConfig.model_fields, method_config.model_fields
    settings = gathered(settings)
    # a setting whose name is a Python keyword, such as `lambda`, has a trailing underscore in its class only
    settings = {f"{k}_" if f"{k}_" in known_method else k: v for k, v in settings.items()}
    unknown = [k for k in settings if k not in known_run and k not in known_method]
    if unknown:
        method, names = settings.get("method"), ", ".join(known_method) or "none"
        raise ConfigError(
            f"unknown setting '{unknown[0]}'.{hint(unknown[0], {*known_run, *known_method}, method)} Settings of "
            f"{method}: {names}; settings of every run: see `alignkit settings {method}`"
        )
    run, wrong = _built(RunConfig, {k: v for k, v in settings.items() if k in known_run})
    own, also_wrong = _built(method_config, {k: v for k, v in settings.items() if k in known_method})
    if run is None or own is None:
        raise _refusal([*wrong, *also_wrong])
    return run, own


def gathered(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Move "sampling.temperature" into `sampling`, and `sampling.backend` into `rollout`. Raises ConfigError."""
    found = {k: v for k, v in settings.items() if "." not in k}
    for key, value in settings.items():
        name, dot, inner = key.partition(".")
        if not dot:
            continue
        group = found.get(name) or {}
        group = group.model_dump() if isinstance(group, BaseModel) else group
        if not isinstance(group, Mapping):
            raise ConfigError(f"'{key}' cannot be combined with '{name}: {group}'; give `{name}` as a mapping")
        found[name] = {**group, inner: value}
    return moved_backend(found)


def validated(cls: type[M], values: Mapping[str, Any]) -> M:
    """Build the pydantic model; all validation errors become one ConfigError that names every invalid setting."""
    built, wrong = _built(cls, values)
    if built is None:
        raise _refusal(wrong)
    return built


def _built(cls: type[M], values: Mapping[str, Any]) -> tuple[M | None, list[str]]:
    try:
        return cls(**values), []
    except ValidationError as error:
        wrong = []
        for e in error.errors():
            where = ".".join(str(p) for p in e["loc"]) or "settings"
            if e["type"] == "extra_forbidden":  # in a group: the names of a run are known before it is built
                wrong.append(f"unknown setting '{where}'.{hint(where, names_of(cls), values.get('method'))}".rstrip())
                continue
            # missing settings, and settings that are only invalid together, have no value to show
            shown = without_passwords(repr(e.get("input")))[:80]
            given = f" (given: {shown})" if e["loc"] and e["type"] != "missing" else ""
            wrong.append(f"{where}: {e['msg'].removeprefix('Value error, ')}{given}")
        return None, wrong


def _refusal(wrong: list[str]) -> ConfigError:
    return ConfigError("; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""))


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read flat settings from a YAML file. Raises ConfigError: missing, not a mapping, NEVER_IN_A_FILE."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must contain settings such as 'method: dpo', found {type(values).__name__}")
    check_file(path, values)
    return {str(k): v for k, v in values.items()}


def check_file(path: object, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError where settings from a file hold one of NEVER_IN_A_FILE."""
    for name in NEVER_IN_A_FILE:
        if settings.get(name):
            raise ConfigError(f"{path} sets {name}, which only the command line or a Python call may set; remove it")


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write settings for `read_yaml`, without NEVER_IN_A_FILE."""
    kept = {k: v for k, v in values.items() if k not in NEVER_IN_A_FILE}
    replace_text(path, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
