"""convert(): a file of TRL as settings of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignkit import registry
from alignkit.config import split
from alignkit.errors import ConfigError
from alignkit.insight.convert import learning, model, steps
from alignkit.insight.convert.source import Source, read_source
from alignkit.insight.convert.work import Work
from alignkit.trl_names import VERSION, trainers


@dataclass(frozen=True)
class Converted:
    """Settings of a run, and (name, why) of what of TRL's was not carried over as it is."""

    settings: dict[str, Any]
    left: tuple[tuple[str, str], ...]

    def text(self, source: str) -> str:
        """Return the settings as YAML, with what was left as comments."""
        head = f"# from {source}, with the defaults of TRL {VERSION} written out\n"
        body = yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)
        left = "".join(f"#   {name}: {why}\n" for name, why in self.left)
        return head + body + (f"\n# not carried over as it is:\n{left}" if left else "")


def convert(path: Path, method: str | None = None, processes: int = 1) -> Converted:
    """Convert a YAML file of TRL's command line or a script. method: ours, where the file does not tell.

    processes: of the run, a factor of batch_size. Raises ConfigError where the file cannot be read, does not name its
    trainer, or trains with a loss that is not offered.
    """
    source = read_source(path, method)
    trainer, given = trainers()[source.cls], dict(source.given)
    if method is not None and method != trainer["method"]:  # a method of its own here, a loss there
        given["loss_type"] = next(t for t, to in trainer["losses"].items() if to.get("method") == method)
    settings = learning.loss_of(given, trainer)
    cls = registry.get(settings["method"])
    work = Work(cls.name, cls.data == "prompts", given, trainer["defaults"], processes, settings=settings)
    try:
        for rule in (model.model, model.data, model.names, steps.batches, steps.steps, steps.rates, steps.logging):
            rule(work)
        learning.learning(work)
        learning.lengths(work)
        model.lora(work, source.adapters, allows_dropout=cls(cls.Config()).allows_dropout())
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:  # a list where TRL has a number
        raise ConfigError(f"{path} has a value of another type than TRL's: {error}") from None
    _remaining(work)
    _checked(work.settings, cls)
    return Converted(work.settings, (*_left(work, source), *_missing(work)))


def _remaining(work: Work) -> None:
    """Leave what no rule has dealt with, unless it is switched off."""
    for name, value in work.given.items():
        if name not in work.done and value not in (None, False, "no", "", [], {}):
            work.lose(name)


def _left(work: Work, source: Source) -> list[tuple[str, str]]:
    lines = {name: f" (line {line})" for name, line in source.lines.items()}
    left = [(f"{name}{lines.get(name, '')}", why) for name, why in work.left]
    known = {name for name, _ in work.left}  # a rule says more than that a script computes it
    return [*left, *(one for one in source.unread if one[0] not in known)]


def _missing(work: Work) -> list[tuple[str, str]]:
    return [(name, "give it") for name in ("model", "data") if name not in work.settings]


def _checked(settings: dict[str, Any], cls: Any) -> None:
    try:
        split({"model": "-", "data": "-", **settings}, cls.Config)
    except ConfigError as error:
        raise ConfigError(f"a value of the file is not possible here: {error}") from None
