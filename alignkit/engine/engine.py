"""`Engine(model=...).run(method=..., data=...)`, or `alignkit.run(...)` for both at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from alignkit.config import read_yaml
from alignkit.data.chat import pinned
from alignkit.engine.phases import Run
from alignkit.runs import config_file
from alignkit.runs.pipeline import PipelineResult, run_pipeline
from alignkit.runs.terminal import spoken

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A finished run: its last metrics, the model in memory, its tokenizer, and its folder."""

    metrics: dict[str, float]
    model: Any
    tokenizer: Any
    folder: Path


class Engine:
    """Runs methods with shared settings: Engine(model="path", lora=8).run(method="dpo", data="prefs.jsonl", beta=0.2).

    Settings are those of `RunConfig` and of the method; those of `run` override the engine's. One of `run` that the
    method cannot use is refused; one of the engine may serve its other runs. A run is shown on standard error, unless
    `quiet`, or where logging is configured. Raises AlignkitError.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def run(self, method: str, **settings: Any) -> Result:
        """Train and return the Result; the folder holds metrics.jsonl, config.yaml and model/."""
        shared = {name.partition(".")[0] for name in self.settings.keys() - settings.keys()}
        given = {**self.settings, **settings}
        with spoken(given.get("quiet") is True) as ours, Run(method, shared, **given) as one:
            with pinned(one.config.template_date):
                one.read()
                one.build()
                metrics = one.loop.train()
                one.told()
            result = Result(metrics, one.save(), one.tokenizer, one.state.folder)
            if ours:  # the command line says it itself
                logger.info("model: %s", result.folder / "model")
            return result

    def pipeline(self, stages: Sequence[Mapping[str, Any]], **settings: Any) -> PipelineResult:
        """Run a chain of methods (docs/pipeline.md). stages: flat settings. settings: shared, like the engine's."""
        given = {**self.settings, **settings}
        with spoken(given.get("quiet") is True):
            return run_pipeline(Engine, stages, given)


def run(method: str, **settings: Any) -> Result:
    """Short for `Engine().run(method, **settings)`."""
    return Engine().run(method, **settings)


def resume(folder: str | PathLike[str], **settings: Any) -> Result:
    """Continue the run in a folder, wherever that lies now, from its newest complete checkpoint.

    settings: those that may change, and objects that config.yaml cannot hold (rows, functions). Raises AlignkitError.
    """
    file = Path(folder) / config_file.FILE
    started = config_file.located(file, read_yaml(file))
    return Engine().run(**{**started, **settings, "resume": True})
