"""Settings of a run that its method cannot use: they are refused, because what is ignored looks as if it worked.

Only a setting that was given, and is not its default, is refused. Places (`output`, `cache_file`) may be shared by all
runs. Settings that need another setting of the run, whatever the method, are checked by `RunConfig` itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import BaseModel

from alignkit.config import RunConfig
from alignkit.errors import ConfigError
from alignkit.method import Method

_OBJECTS = ("model", "data", "eval_data", "tokenizer")


def check_used(config: RunConfig, method: Method[Any], shared: Collection[str] = ()) -> None:
    """Raise ConfigError for a setting without effect. shared: names of settings that may serve other runs only.

    A resumed run keeps the settings that it was started with.
    """
    reasons = unused(config, method)
    found = [n for n in given(config) if n.partition(".")[0] not in shared and _reason(n, reasons)]
    if found and not config.resume:
        raise ConfigError(f"'{method.name}' {_reason(found[0], reasons)}; remove `{found[0]}`")


def check_shared(runs: Collection[tuple[RunConfig, Method[Any]]], shared: Collection[str]) -> None:
    """Raise ConfigError for a setting that several runs share and none of them can use."""
    for name in sorted(shared):
        reasons = [f"'{m.name}' {reason}" for c, m in runs if (reason := _of_group(name, c, m))]
        if runs and len(reasons) == len(runs):
            raise ConfigError(f"`{name}` has no effect: {', '.join(dict.fromkeys(reasons))}; remove it")


def serving(
    config: RunConfig, method: Method[Any], others: Collection[tuple[RunConfig, Method[Any]]]
) -> frozenset[str]:
    """Return the names of settings that a run cannot use, and another run with the same value can."""
    return frozenset(
        name
        for name in unused(config, method)
        for other, its_method in others
        if name not in unused(other, its_method) and getattr(other, name) == getattr(config, name)
    )


def given(config: RunConfig) -> list[str]:
    """Return the settings that were given and are not the defaults, those of a group as "group.name"."""
    return list(_given(config))


def unused(config: RunConfig, method: Method[Any]) -> dict[str, str]:
    """Return the settings that have no effect, a group by its name, each with the reason after the method's name."""
    samples, roles = method.data == "prompts", method.roles()
    held_out = config.eval_data is not None or config.eval_fraction > 0
    compared = "reference" in roles and not samples and method.reference_need() != "moving"
    rules: tuple[tuple[tuple[str, ...], bool, str], ...] = (
        (("sampling", "rollout", "environment"), samples, "does not sample completions"),
        (("reward",), samples and "reward" in roles, "does not use a reward"),
        (("judge",), samples and "judge" in roles, "does not use a judge"),
        (("reward_timeout",), samples and not roles.isdisjoint(("reward", "judge")), "calls no reward and no judge"),
        (("critic", "critic_learning_rate"), "critic" in roles, "does not train a critic"),
        (("reference",), "reference" in roles, "does not use a reference with these settings"),
        (("reference_cache",), compared, "has no log-probabilities of a reference to keep"),
        (
            ("max_completion_tokens",),
            not samples,
            "samples its completions, whose limit is `sampling.max_new_tokens`",
        ),
        (("train_on", "on_dropped"), not samples, "learns from sampled completions, not from answers in the rows"),
        (("kept_logits_gib",), "reward" not in method.trains, "has a head with one output, and no logits"),
        (
            ("schedule", "warmup_fraction", "decay_fraction"),
            method.schedule(0, 1) is None,
            "has a schedule of its own for the learning rate",
        ),
        (
            ("eval_every", "patience"),
            held_out,
            "has no held-out rows, which eval_data or eval_fraction would set",
        ),
    )
    return {name: reason for names, used, reason in rules if not used for name in names}


def _reason(name: str, reasons: dict[str, str]) -> str | None:
    return reasons.get(name.partition(".")[0])


def _of_group(name: str, config: RunConfig, method: Method[Any]) -> str | None:
    is_given = any(n.partition(".")[0] == name for n in _given(config))
    return unused(config, method).get(name) if is_given else None


def _given(cls: BaseModel, prefix: str = "") -> Iterator[str]:
    for name in type(cls).model_fields:
        if name in _OBJECTS:  # not compared: rows and models may be objects
            continue
        value, default = getattr(cls, name), type(cls).model_fields[name].get_default(call_default_factory=True)
        if name not in cls.model_fields_set or value is default:
            continue
        if isinstance(value, BaseModel) and isinstance(default, BaseModel):
            yield from _given(value, f"{prefix}{name}.")
        elif isinstance(value, BaseModel) or value != default:
            yield f"{prefix}{name}"
