"""The stages of a pipeline: what each takes from earlier ones, and checks before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignkit import data, registry
from alignkit.config import RunConfig, gathered, split
from alignkit.data.rows import shown
from alignkit.errors import AlignkitError, ConfigError, ModelError, nearest
from alignkit.hints import hint
from alignkit.method import Method
from alignkit.models.loading import load_tokenizer
from alignkit.pairwise import PAIRWISE
from alignkit.reference.choice import check_reference
from alignkit.rewards.models import ModelOptions
from alignkit.rollout.checks import check_online
from alignkit.unused import check_used, serving

_EARLIER = re.compile(r"@([A-Za-z0-9_.+=-]+)")
_OF_THE_PIPELINE = ("output", "resume")


@dataclass(frozen=True)
class Stage:
    """One stage. config: the run's validated settings. settings: all of its settings, earlier models as "@name".

    shared: names of settings that serve another stage too, so that this one need not use them.
    """

    name: str
    method: Method[Any]
    config: RunConfig
    settings: dict[str, Any]
    shared: frozenset[str] = frozenset()

    def written(self) -> dict[str, Any]:
        """Return name and settings as plain YAML values."""
        every = {**self.config.describe(), **self.method.config.model_dump(mode="json")}
        given = {k: v for k, v in every.items() if k in self.settings or k.removesuffix("_") in self.settings}
        return {"name": self.name, **{k: v for k, v in given.items() if k != "name"}}

    def filled(self, by: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings with every "@name" replaced, except in rows of data. Raises ConfigError."""
        filled = {}
        for key, value in self.settings.items():
            with named(self.name, key):
                filled[key] = value if key in ("data", "eval_data") else replaced(value, by)
        return filled

    @property
    def judges(self) -> bool:
        """True if its model compares two answers instead of scoring one."""
        return bool(self.method.model_settings().get(PAIRWISE))


def resolve(stages: Any, shared: Mapping[str, Any]) -> list[Stage]:
    """Add the shared settings and the models of earlier stages to every stage. Raises ConfigError naming the stage.

    A method's own settings cannot be shared. `reward` and `judge` are passed to stages whose method needs them.
    """
    if not isinstance(stages, Sequence) or isinstance(stages, str) or not stages:
        raise ConfigError(f"`stages` must be a list of settings, each with its `method`, got {shown(stages)}")
    shared = gathered(shared)
    common = [k for k in RunConfig.model_fields if k != "method"]
    if unknown := [k for k in shared if k not in common]:
        raise ConfigError(
            f"unknown setting '{unknown[0]}' next to `stages`.{hint(unknown[0], [*common, 'stages'])} "
            f"Settings of a method belong in its stage"
        )
    resolved: list[Stage] = []
    for number, one in enumerate(stages, 1):
        if not isinstance(one, Mapping) or not isinstance(one.get("method"), str):
            raise ConfigError(f"stage {number} has no `method`; installed: {', '.join(registry.names())}")
        name = str(one.get("name", one["method"]))
        if name in [s.name for s in resolved]:
            raise ConfigError(f"two stages are called '{name}'; give each its own `name`")
        with named(name):
            stage = _resolved(name, number, {str(k): v for k, v in one.items()}, dict(shared), resolved)
        stage.filled({s.name: "" for s in resolved})  # refuses names that are not earlier stages
        resolved.append(stage)
    others = {s.name: [(o.config, o.method) for o in resolved if o is not s] for s in resolved}
    return [replace(s, shared=serving(s.config, s.method, others[s.name])) for s in resolved]


def check(stages: Sequence[Stage]) -> None:
    """Check rewards, data and models of all stages without loading any model. Raises AlignkitError."""
    by_name = {s.name: s for s in stages}
    placeholders = {s.name: type(s.settings["name"], (_Untrained,), {}) for s in stages}
    for stage in stages:
        with named(stage.name):
            check_used(stage.config, stage.method, stage.shared)
            roles = {role: replaced(getattr(stage.config, role), placeholders) for role in ("reward", "judge")}
            check_online(stage.config.model_copy(update=roles), stage.method)
            check_reference(stage.config, stage.method)
        for role in ("reward", "judge"):
            with named(stage.name, role):
                for name, compares in _scorers_in(getattr(stage.config, role), role == "judge"):
                    _check_scorer(by_name[name], compares)
        for key in ("data", "eval_data"):
            with named(stage.name, key):
                streamed = key == "data" and stage.config.streaming
                if (source := getattr(stage.config, key)) is not None and not streamed:
                    data.load(source, stage.method.data, stage.config.columns, wanted=stage.method.columns)
        with named(stage.name, "model"):
            _check_model(stage, by_name)


@contextmanager
def named(stage: str, key: str | None = None) -> Iterator[None]:
    """Prefix an error's message with the names of the stage and the setting."""
    try:
        yield
    except AlignkitError as error:
        error.args = (f"stage '{stage}': {f'{key}: ' if key else ''}{error}",)
        raise


def replaced(value: Any, by: Mapping[str, Any]) -> Any:
    """Return a setting with every "@name" replaced. Raises ConfigError where `by` has no such name."""
    if isinstance(value, Mapping):
        return {k: replaced(v, by) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replaced(v, by) for v in value]
    if isinstance(value, str) and (match := _EARLIER.fullmatch(value)):
        if match[1] not in by:
            there = ", ".join(f"@{name}" for name in by) or "none"
            raise ConfigError(f"'{value}' is not an earlier stage.{nearest(match[1], by)} Earlier stages: {there}")
        return by[match[1]]
    return value


def _resolved(name: str, number: int, own: dict[str, Any], shared: dict[str, Any], earlier: list[Stage]) -> Stage:
    if clash := [k for k in _OF_THE_PIPELINE if k in own]:
        raise ConfigError(f"`{clash[0]}` belongs to the whole pipeline; move it next to `stages`")
    cls = registry.get(own["method"])
    asked = {role: shared.pop(role) for role in ("reward", "judge") if role in shared}
    policies = [s for s in earlier if "policy" in s.method.trains]
    settings = gathered({**shared, **({"model": f"@{policies[-1].name}"} if policies else {}), **own})
    settings["name"] = f"{number}-{name}"
    config, method_config = split(settings, cls.Config)
    method = cls(method_config)
    needs = method.roles() if method.data == "prompts" else frozenset[str]()
    for role in ("reward", "judge"):
        if role in needs and role not in settings and (found := asked.get(role, _trained(role, earlier))) is not None:
            settings[role] = found
    if config.lora and not config.fsdp:  # the next stage starts from weights, not from an adapter on its base
        settings.setdefault("merge_adapter", True)
    config, _ = split(settings, cls.Config)
    return Stage(name, method, config, settings)


def _trained(role: str, earlier: Sequence[Stage]) -> Any:
    """Return the spec of the latest earlier reward model for `role`."""
    models = [s for s in earlier if "reward" in s.method.trains and (role == "judge" or not s.judges)]
    if not models:
        return None
    name = f"@{models[-1].name}"
    return name if role == "reward" or models[-1].judges else {"bradley_terry": name}


class _Untrained(ModelOptions):
    """Placeholder of a reward model that is not trained yet, so that the spec that contains it can be checked."""

    def __call__(self, **_: Any) -> list[float]:
        return []


def _scorers_in(spec: Any, compares: bool) -> Iterator[tuple[str, bool]]:
    """Yield the stages whose models a reward or judge uses, and whether each must compare two answers."""
    if isinstance(spec, Mapping):
        for key in spec.keys() & {"use", "ensemble", "bradley_terry"}:
            yield from _scorers_in(spec[key], compares and key != "bradley_terry")
    elif isinstance(spec, list | tuple):
        for one in spec:
            yield from _scorers_in(one, compares)
    elif isinstance(spec, str) and (match := _EARLIER.fullmatch(spec)):
        yield match[1], compares


def _check_scorer(stage: Stage, compares: bool) -> None:
    """Raise ConfigError where the stage's model cannot score answers, or cannot compare two of them."""
    name = f"'@{stage.name}'"
    if "reward" not in stage.method.trains:
        raise ConfigError(
            f"{name} is trained by '{stage.method.name}', which does not train a reward model; name a stage that does"
        )
    if compares and not stage.judges:
        raise ConfigError(
            f'{name} scores single answers; use it as a judge by {{bradley_terry: "@{stage.name}"}}, or train it with '
            f"`pairwise: true`"
        )
    if stage.judges and not compares:
        raise ConfigError(f"{name} compares two answers; train it without `pairwise`, or use it only as a `judge`")
    if stage.config.lora and not stage.config.merge_adapter:
        raise ConfigError(f"{name} saves an adapter only; set `merge_adapter: true` in that stage")


def _check_model(stage: Stage, by_name: Mapping[str, Stage]) -> None:
    model = stage.config.model
    if not isinstance(model, str | Path):
        return
    if match := _EARLIER.fullmatch(str(model)):
        if "policy" in stage.method.trains and "policy" not in by_name[match[1]].method.trains:
            raise ConfigError(
                f"'{model}' is a reward model, but '{stage.method.name}' trains a policy; name a stage that trains a "
                f"policy, or a model's folder"
            )
        return
    load_tokenizer(stage.config)
    folder = Path(model)
    if folder.is_dir() and not any((folder / f).is_file() for f in ("config.json", "adapter_config.json")):
        raise ModelError(f"the folder '{model}' holds no model: it has neither config.json nor adapter_config.json")
