"""recommend(): the methods that can be used, the best first, and the settings to start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from alignkit import registry
from alignkit.advice import Advice, Choice
from alignkit.data import load
from alignkit.data.rows import FaultyRowsError
from alignkit.errors import ConfigError, DataError, PluginError
from alignkit.insight.model_paths import model_folder
from alignkit.insight.recommend.cautions import cautions
from alignkit.insight.recommend.data_facts import Facts, facts_of
from alignkit.insight.recommend.fit import Fit, fitted
from alignkit.insight.recommend.run_settings import of_run, rate_of
from alignkit.method import Method
from alignkit.plugin_checks import advice_of, roles_of


@dataclass(frozen=True)
class Option:
    """A method that can be used, and the reason to choose it."""

    method: str
    reason: str
    rank: int


@dataclass(frozen=True)
class Recommendation:
    """The result of `recommend`.

    first: None where no method can be used. also: the other methods, the best first. refused: method -> why it cannot
    be used. settings: to start from, with `first`. fit: a plan's result about memory, None without a plan. cautions:
    problems that no setting solves.
    """

    facts: Facts
    first: Option | None
    also: tuple[Option, ...]
    refused: dict[str, str]
    settings: tuple[Choice, ...]
    fit: Fit | None
    cautions: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """Return everything as it goes into JSON."""
        audit, data = self.facts.audit, self.facts.data
        return {
            "data": {
                "source": audit.source, "form": audit.form, "rows": data.rows, "flipped": data.flipped,
                "noisy": data.noisy, "lean": data.length_bias, "labels": data.labels, "answers": data.verifier,
            },
            "cautions": self.cautions,
            "first": self.first and asdict(self.first),
            "also": [asdict(option) for option in self.also],
            "refused": self.refused,
            "settings": [choice._asdict() for choice in self.settings],
            "memory": self.fit and self.fit.sentence,
        }  # fmt: skip


def recommend(
    data: object,
    *,
    model: str | None = None,
    method: str | None = None,
    columns: Mapping[str, str] | None = None,
    eval_data: object = None,
    reward: Any = None,
    judge: Any = None,
    lora: int | None = None,
    memory: int | None = None,
) -> Recommendation:
    """Return which installed methods the data can serve, which to start with, and with which settings.

    data, columns, eval_data, reward, judge: as in a run. model: folder or hub name; needed to plan for `memory`, the
    bytes of a GPU. method: the one to start with instead. lora: a rank. Raises DataError, ConfigError, ModelError,
    RewardError or PluginError where an input cannot be used.
    """
    if memory is not None and model is None:
        raise ConfigError("memory depends on the model; give --model as well")
    if method is not None:
        registry.get(method)
    facts = facts_of(data, columns, model, reward, judge, eval_data)
    if lora is not None and facts.data.adapter:
        raise ConfigError(f"'{model}' is an adapter, which a run trains as it is; leave out --lora")
    advised, refused = _advised(facts)
    if method in refused:
        raise ConfigError(f"'{method}' cannot be used: {refused[method]}")
    order = sorted(advised, key=lambda name: (name != method, -(advised[name].rank or 0)))
    options = [Option(name, advised[name].reason, advised[name].rank or 0) for name in order]
    found = cautions(facts)
    if not options:
        return Recommendation(facts, None, (), refused, (), None, found)
    first = registry.get(order[0])
    if eval_data is not None:
        _check_held_out(eval_data, first, columns)
    settings = _settings(facts, first, advised[first.name], lora, eval_data)
    fit = None
    if memory is not None:
        run = {"model": model_folder(str(model)), "data": data, "columns": columns, "method": first.name}
        fit = fitted(run | {choice.name: choice.value for choice in settings}, memory)
        settings = _merged(settings, fit.settings, first)
    return Recommendation(facts, options[0], tuple(options[1:]), refused, settings, fit, found)


def _check_held_out(eval_data: object, method: type[Method[Any]], columns: Mapping[str, str] | None) -> None:
    """Raise DataError where a run with the method would refuse the held-out rows."""
    try:
        n_rows = len(load(eval_data, method.data, columns))
    except FaultyRowsError:
        raise
    except DataError as error:
        raise DataError(f"held-out rows that '{method.name}' cannot read: {error}") from None
    if n_rows < method.min_batch:
        raise DataError(f"held-out rows: {n_rows} are too few, '{method.name}' needs at least {method.min_batch}")


def _advised(facts: Facts) -> tuple[dict[str, Advice], dict[str, str]]:
    """Return the advice of each method that can be used, and why each other one cannot."""
    advised: dict[str, Advice] = {}
    refused: dict[str, str] = {}
    for plugin in registry.plugins():
        if plugin.method is None:
            refused[plugin.name] = f"it is broken: {plugin.problem}"
            continue
        try:
            reason = _lacking(facts, plugin.method, roles_of(plugin.method))
            advice = advice_of(plugin.method, facts.data) if reason is None else Advice(None, reason)
        except PluginError as error:
            advice = Advice(None, f"it is broken: {error}")
        if advice.rank is None:
            refused[plugin.name] = advice.reason
        else:
            advised[plugin.name] = advice
    return advised, refused


def _lacking(facts: Facts, method: type[Method[Any]], roles: frozenset[str]) -> str | None:
    """Return what the method lacks, None where it lacks nothing."""
    if method.data not in facts.data.rows:
        return facts.problems[method.data]
    if (n_rows := facts.data.rows[method.data]) < method.min_batch:
        return f"its steps need at least {method.min_batch} rows, but the data has {n_rows}"
    if method.data != "prompts":
        return None
    given = {"reward": facts.data.reward or facts.data.verifier is not None, "judge": facts.data.judge}
    missing = [role for role, has in given.items() if role in roles and not has]
    return f"it samples, and needs a {missing[0]}: give --{missing[0]} (docs/rewards.md)" if missing else None


def _settings(
    facts: Facts, method: type[Method[Any]], advice: Advice, lora: int | None, eval_data: object
) -> tuple[Choice, ...]:
    """Return the method's own settings, then the run's."""
    own = {choice.name: choice for choice in advice.settings}
    of_the_run = of_run(facts, method, roles_of(method), lora, eval_data)
    return (*own.values(), *(choice for choice in of_the_run if choice.name not in own))


def _merged(settings: tuple[Choice, ...], more: tuple[Choice, ...], method: type[Method[Any]]) -> tuple[Choice, ...]:
    """Add the settings that save memory to the others; with adapters, use the adapters' learning rate."""
    merged = {choice.name: choice for choice in settings}
    for choice in more:
        group, dot, inner = choice.name.partition(".")
        if dot and group in merged:
            old = merged[group]
            choice = Choice(group, {**old.value, inner: choice.value}, f"{old.why}; {choice.why}")
        merged[choice.name] = choice
        if choice.name == "lora":
            merged["learning_rate"] = rate_of(method, adapters=True)
    return tuple(merged.values())
