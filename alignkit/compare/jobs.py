"""The methods that a task's rows can serve, and the settings of each run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from alignkit import data, registry
from alignkit.config import RunConfig, gathered, split, validated
from alignkit.data import tokenise
from alignkit.data.dataset import of_forms
from alignkit.data.rows import RawRows
from alignkit.data.sources import read_rows
from alignkit.data.stream import hold_out
from alignkit.demo import recipes, world
from alignkit.engine import Engine
from alignkit.errors import ConfigError, DataError, PluginError
from alignkit.files import replace_text
from alignkit.hints import hint
from alignkit.method import Method
from alignkit.rewards import check_columns, check_judge, check_rewards
from alignkit.rollout.checks import check_online
from alignkit.unused import check_shared

HELD_OUT = 0.1
_EVALUATION = {"sampling", "max_completion_tokens"}  # the samples and the pairs that every method is compared by
_OWN = ("method", "name", "output", "resume", "reward", "judge", "eval_data", "model", "data")


@dataclass(frozen=True)
class Task:
    """The task that methods are compared on.

    model: the base's folder or hub name. data, eval_data: sources of rows; without eval_data HELD_OUT of the data is
    held out, by prompt. settings: of a run, and of any method. recipes: settings of single methods. faulty: method ->
    why it has no recipe. reward, judge: specs (docs/rewards.md), for the methods that learn from them and for the win
    rate; the judge takes precedence.
    """

    model: str
    data: str
    eval_data: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    faulty: Mapping[str, str] = field(default_factory=dict)
    reward: Any = None
    judge: Any = None


@dataclass(frozen=True)
class Job:
    """The work of one process. method: None for the base alone. verdict: {"judge": spec}, {"reward": spec} or {}."""

    method: str | None
    folder: str
    settings: Mapping[str, Any]
    eval_data: str | None
    verdict: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The method's name, or "base"."""
        return self.method or "base"

    def write(self, path: Path) -> Path:
        """Write the job as JSON and return the path."""
        replace_text(path, json.dumps(asdict(self), indent=2))
        return path

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read a job that `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def config(self) -> RunConfig:
        """Return the run's part of the settings."""
        known = {k: v for k, v in self.settings.items() if k in RunConfig.model_fields}
        return validated(RunConfig, {**known, "method": self.name})


def demo_task(folder: Path, seed: int, methods: Iterable[str]) -> Task:
    """Create the demo's task for these methods, and its base in `folder`."""
    settings: dict[str, dict[str, Any]] = {}
    faulty = {}
    for name in methods:
        try:
            settings[name] = recipes.recipe(name)
        except PluginError as error:
            faulty[name] = str(error)
    train, test = world.questions(seed)
    base = recipes.train_base(Engine(output=folder / "data", seed=seed), folder / "data", train, seed)
    return Task(
        model=str(base.folder),
        data=str(world.write_jsonl(folder / "data/pairs.jsonl", world.judged_rows(train))),
        eval_data=str(world.write_jsonl(folder / "data/held-out.jsonl", world.judged_rows(test))),
        settings={"cache_file": str(folder / "reference.sqlite"), "sampling": recipes.LENGTH.model_dump()},
        recipes=settings,
        faulty=faulty,
        **recipes.VERDICTS,
    )


def jobs_of(
    task: Task, methods: Mapping[str, type[Method[Any]]], folder: Path, seed: int
) -> tuple[list[Job], dict[str, str]]:
    """Return a job for the base and for each method that can be compared, and why the others cannot.

    Raises ConfigError where no method can be compared, or a value is wrong; RewardError where the rows lack a column of
    the reward or the judge; DataError where they have no prompts.
    """
    for spec, check in ((task.reward, check_rewards), (task.judge, check_judge)):
        if spec is not None:
            check(spec)
    rows = read_rows(task.data)
    verdict = {"judge": task.judge} if task.judge is not None else {"reward": task.reward}
    verdict = {k: v for k, v in verdict.items() if v is not None}
    jobs, left_out = [], {}
    for name, cls in methods.items():
        settings = _settings(task, name, cls, seed)
        if reason := task.faulty.get(name) or _reason(cls, settings, rows):
            left_out[name] = reason
        else:
            jobs.append(Job(name, str(folder), settings, task.eval_data, verdict))
    if not jobs:
        raise ConfigError("no method can be compared: " + "; ".join(f"{k}: {v}" for k, v in left_out.items()))
    _check_columns(task, rows)
    base = {
        k: v for k, v in jobs[0].settings.items() if k in {"model", "data", "columns", "sampling", "seed", "device"}
    }
    return [Job(None, str(folder), base, task.eval_data, verdict), *jobs], left_out


def _check_columns(task: Task, rows: RawRows) -> None:
    """Raise RewardError where the rows that answers are sampled to, for training or the win rate, lack a column."""
    names = gathered(task.settings).get("columns")
    for some in (rows, *([] if task.eval_data is None else [read_rows(task.eval_data)])):
        prompts = data.load(some, "prompts", names)
        check_columns(task.reward, task.judge, {name for row in prompts for name in row.extra})


def rows_of(job: Job, tokenizer: Any) -> tuple[RawRows, RawRows]:
    """Return the job's rows: (training, held out), without a common prompt. Raises DataError."""
    config = job.config()
    rows = read_rows(config.data)
    if job.eval_data is not None:
        return rows, read_rows(job.eval_data)
    loaded = data.load(rows, "prompts", of_forms(config.columns))
    prompts, _ = tokenise.tokenise_as(config, loaded, tokenizer)
    _, held_out = hold_out(prompts, config.eval_fraction or HELD_OUT, config.seed)
    numbers = {e.row for e in held_out}
    trained = {n for n, _ in rows} - numbers
    return replace(rows.only(trained), faults=rows.faults), rows.only(numbers)


def installed() -> dict[str, type[Method[Any]]]:
    """Return all methods that can be loaded."""
    return {p.name: p.method for p in registry.plugins() if p.method is not None}


def check_settings(settings: Mapping[str, Any], methods: Mapping[str, type[Method[Any]]]) -> None:
    """Raise ConfigError for a setting that no method has or can use, or that compare itself sets."""
    known = {k for cls in methods.values() for k in cls.Config.model_fields} | set(RunConfig.model_fields)
    for key in gathered(settings):
        if key in _OWN:
            raise ConfigError(f"--set {key}: compare sets this itself; see `alignkit compare --help`")
        if key not in known and f"{key}_" not in known:
            raise ConfigError(f"unknown setting '{key}'.{hint(key, known)} None of {', '.join(methods)} has it")
    check_shared(list(_runs(settings, methods)), gathered(settings).keys() - _EVALUATION)


def _runs(
    settings: Mapping[str, Any], methods: Mapping[str, type[Method[Any]]]
) -> Iterator[tuple[RunConfig, Method[Any]]]:
    for name, cls in methods.items():
        own = _known(settings, cls)
        try:
            config, method_config = split({**own, "method": name, "model": "-", "data": "-"}, cls.Config)
        except ConfigError:
            continue  # `jobs_of` says why
        yield config, cls(method_config)


def _known(settings: Mapping[str, Any], cls: type[Method[Any]]) -> dict[str, Any]:
    """Return the settings that a run with the method has."""
    own = {*RunConfig.model_fields, *cls.Config.model_fields}
    return {k: v for k, v in gathered(settings).items() if k in own or f"{k}_" in own}


def _settings(task: Task, name: str, cls: type[Method[Any]], seed: int) -> dict[str, Any]:
    """Return the run's settings, the method's own among the shared ones, and its reward or judge."""
    shared = _known(task.settings, cls)
    settings = {"model": task.model, "data": task.data, "seed": seed, **task.recipes.get(name, {}), **shared}
    if cls.data != "prompts":
        return settings
    judge = task.judge if task.judge is not None or task.reward is None else {"bradley_terry": task.reward}
    given = {"reward": task.reward, "judge": judge}
    return {**settings, **{k: v for k, v in given.items() if k in cls.uses and v is not None}}


def _reason(cls: type[Method[Any]], settings: Mapping[str, Any], rows: RawRows) -> str | None:
    """Return why a method cannot be compared, None where it can. Raises ConfigError for a wrong value."""
    if "policy" not in cls.trains:
        return f"trains {', '.join(cls.trains)} and no policy: it has no answers to compare"
    config, method_config = split({**settings, "method": cls.name}, cls.Config)
    method = cls(method_config)
    if cls.data == "prompts" and (missing := [r for r in ("reward", "judge") if r in cls.uses and r not in settings]):
        return f"needs a {missing[0]}: give --{missing[0]}"
    check_online(config, method)
    try:
        data.load(rows, cls.data, config.columns, wanted=cls.columns)
    except DataError as error:
        return str(error).split("\n")[0]
    return None
