"""recommend(): the methods that can be served, in an order, and the settings to begin from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from alignkit import registry
from alignkit.data import load
from alignkit.data.rows import FaultyRowsError
from alignkit.errors import ConfigError, DataError
from alignkit.insight.model_paths import model_folder
from alignkit.insight.recommend.advice import ADVICE, Advice, Choice, unfit
from alignkit.insight.recommend.cautions import cautions
from alignkit.insight.recommend.facts import Facts, facts_of
from alignkit.insight.recommend.fit import Fit, fitted
from alignkit.insight.recommend.settings import of_run, rate_of
from alignkit.method import Method

_UNKNOWN = 10  # a method that nothing is known of stands behind those that are


@dataclass(frozen=True)
class Option:
    """A method that can be served, and why one would take it."""

    method: str
    reason: str
    rank: int


@dataclass(frozen=True)
class Recommendation:
    """What `recommend` found.

    first: None where no method can be served. also: the other ones, the best first. refused: why not, for each other
    method. settings: to begin from, with `first`. fit: what a plan says about memory, None where none was made.
    cautions: what no setting mends.
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
        facts = self.facts
        return {
            "data": {
                "source": facts.audit.source, "form": facts.audit.form, "rows": facts.rows, "flipped": facts.flipped,
                "noisy": facts.noisy, "lean": facts.lean, "labels": facts.audit.labels, "answers": facts.answers,
            },
            "cautions": self.cautions,
            "first": self.first and asdict(self.first),
            "also": [asdict(option) for option in self.also],
            "refused": self.refused,
            "settings": [choice._asdict() for choice in self.settings],
            "memory": self.fit and self.fit.said,
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
    """Say which installed methods can be served, which to start with, and with what settings.

    data, columns, eval_data, reward, judge: as of a run. model: folder or hub name; needed to plan for `memory`, the
    bytes of a GPU. method: the one to start with instead. lora: a rank. Raises DataError, ConfigError, ModelError,
    RewardError and PluginError for what cannot be used.
    """
    if memory is not None and model is None:
        raise ConfigError("memory depends on the model; give --model as well")
    if method is not None:
        registry.get(method)
    facts = facts_of(data, columns, model, reward, judge, eval_data)
    if lora is not None and facts.adapter:
        raise ConfigError(f"'{model}' is an adapter, which a run trains on as it is; leave out --lora")
    options, refused = _sorted_out(facts)
    if method is not None:
        if method in refused:
            raise ConfigError(f"'{method}' cannot be served: {refused[method]}")
        options.sort(key=lambda option: option.method != method)
    warned = cautions(facts)
    if not options:
        return Recommendation(facts, None, (), refused, (), None, warned)
    first = options[0].method
    if eval_data is not None:
        _check_held_out(eval_data, registry.get(first), columns)
    settings = _settings(facts, first, lora, eval_data)
    fit = None
    if memory is not None:
        run = {"model": model_folder(str(model)), "data": data, "columns": columns, "method": first}
        fit = fitted(run | _flat(settings), memory)
        settings = _joined(settings, fit.settings, registry.get(first))
    return Recommendation(facts, options[0], tuple(options[1:]), refused, settings, fit, warned)


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


def _sorted_out(facts: Facts) -> tuple[list[Option], dict[str, str]]:
    """Return the methods that can be served, the best first, and why the others cannot."""
    options, refused = [], {}
    for plugin in registry.plugins():
        if plugin.method is None:
            refused[plugin.name] = f"it is broken: {plugin.problem}"
        elif reason := _lacking(facts, plugin.method) or unfit(facts, plugin.name):
            refused[plugin.name] = reason
        else:
            advice = _advice(facts, plugin.name)
            options.append(Option(plugin.name, advice.reason, advice.rank))
    return sorted(options, key=lambda option: -option.rank), refused


def _lacking(facts: Facts, method: type[Method[Any]]) -> str | None:
    """Say what a method would need that is not there; None where nothing is lacking."""
    if method.data not in facts.rows:
        return facts.problems[method.data]
    if (n_rows := facts.rows[method.data]) < method.min_batch:
        return (
            f"a step of it needs {method.min_batch} rows at least, and there {'is' if n_rows == 1 else 'are'} {n_rows}"
        )
    if method.data != "prompts":
        return None
    given = {"reward": facts.reward if facts.reward is not None else facts.answers, "judge": facts.judge}
    lacks = [name for name, value in given.items() if name in roles_of(method) and value is None]
    return f"it samples, and needs a {lacks[0]}: give --{lacks[0]} (docs/rewards.md)" if lacks else None


def _advice(facts: Facts, name: str) -> Advice:
    return ADVICE[name](facts) if name in ADVICE else Advice(_UNKNOWN, "the rows can serve it; see its own page")


def roles_of(method: type[Method[Any]]) -> frozenset[str]:
    """Return the roles that a method needs with its default settings, where it has defaults."""
    try:
        return method(method.Config()).roles()
    except ValidationError:
        return method.uses


def _settings(facts: Facts, name: str, lora: int | None, eval_data: object) -> tuple[Choice, ...]:
    method = registry.get(name)
    own = [c for c in _advice(facts, name).settings if c.name in method.Config.model_fields]
    return (*own, *of_run(facts, method, roles_of(method), lora, eval_data))


def _joined(settings: tuple[Choice, ...], more: tuple[Choice, ...], method: type[Method[Any]]) -> tuple[Choice, ...]:
    """Put what memory asks for beside the rest; the rate follows adapters."""
    kept = {choice.name: choice for choice in settings}
    for choice in more:
        group, dot, inner = choice.name.partition(".")
        if dot and group in kept:
            old = kept[group]
            choice = Choice(group, {**old.value, inner: choice.value}, f"{old.why}; {choice.why}")
        kept[choice.name] = choice
        if choice.name == "lora":
            kept["learning_rate"] = rate_of(method, adapters=True)
    return tuple(kept.values())


def _flat(settings: tuple[Choice, ...]) -> dict[str, Any]:
    return {choice.name: choice.value for choice in settings}
