"""A chain of methods, such as SFT -> reward model -> PPO: later stages start from, or score with, earlier models.

    runs/rlhf/
      pipeline.yaml                every stage with its settings
      1-sft/  2-reward/  3-ppo/    runs, as `alignkit run` leaves them
      summary.json                 a row for each finished stage, and the settings at the pipeline's start

A stage's default model is that of the latest earlier stage that trained a policy; its default reward or judge, where it
needs one, is the latest earlier reward model. The value "@name" is the model folder of the earlier stage `name`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkit.config import RunConfig, check_file, read_yaml, write_yaml
from alignkit.errors import ConfigError
from alignkit.files import replace_text
from alignkit.runs import folder as run_folder
from alignkit.runs.config_file import FREE, check_same
from alignkit.runs.lock import FolderLock
from alignkit.runs.results import HEADLINE
from alignkit.runs.stages import Stage, check, named, resolve

logger = logging.getLogger(__name__)

FILE = "pipeline.yaml"


@dataclass(frozen=True)
class StageResult:
    """A finished stage. seconds: of the call that finished it, None where unknown.

    metrics: the last value of each logged HEADLINE metric, on held-out rows ("eval/...") where the run has them.
    """

    stage: str
    method: str
    steps: int
    seconds: float | None
    metrics: dict[str, float]
    folder: str


@dataclass(frozen=True)
class PipelineResult:
    """A finished pipeline: its folder, and a row for each stage."""

    folder: Path
    stages: tuple[StageResult, ...]


def read_pipeline(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read settings and stages from a YAML file. Raises ConfigError as `read_yaml` does, for every stage too."""
    settings = read_yaml(path)
    stages = settings.get("stages")
    for stage in stages if isinstance(stages, list) else ():
        if isinstance(stage, Mapping):
            check_file(path, stage)
    return settings


def run_pipeline(engine: Callable[..., Any], stages: Any, settings: Mapping[str, Any]) -> PipelineResult:
    """Run all stages that are not finished yet, in order.

    engine: the class Engine. stages: flat settings, each with `method` and, optionally, a `name`. settings: shared by
    all stages; `name` and `output` set the pipeline's folder, `resume` continues it. All settings are checked before
    anything is trained. Raises AlignkitError naming the stage.
    """
    shared = dict(settings)
    given: dict[str, Any] = {k: shared.pop(k) for k in ("name", "output", "resume") if k in shared}
    resolved = resolve(stages, shared)
    check(resolved)
    folder, lock = _folder(resolved, given)
    seconds = _known_seconds(folder)
    finished: list[StageResult] = []
    with closing(lock), _how_to_resume(folder):
        for number, stage in enumerate(resolved, 1):
            place = folder / f"{number}-{stage.name}"
            if not (place / "model").is_dir():
                logger.info("stage %d of %d: %s", number, len(resolved), stage.name)
                folders = {s.name: str(folder / f"{i}-{s.name}" / "model") for i, s in enumerate(resolved, 1)}
                seconds[stage.name] = _run(engine, stage, place, folders)
            finished.append(_result(stage, place, seconds.get(stage.name)))
            if not int(os.environ.get("RANK", "0")):
                _write_summary(folder, _summary(folder) | {"stages": [asdict(s) for s in finished]})
    return PipelineResult(folder, tuple(finished))


def table(result: PipelineResult) -> Any:
    """Return a rich table with a row for each stage; folders are relative to the pipeline's."""
    from rich.table import Table

    shown = [m for m in HEADLINE if any({m, f"eval/{m}"} & s.metrics.keys() for s in result.stages)]
    made = Table("stage", "method", "steps", "seconds", *shown, "folder", box=None)
    for s in result.stages:
        numbers = [s.metrics.get(f"eval/{m}", s.metrics.get(m)) for m in shown]
        seconds = "-" if s.seconds is None else f"{s.seconds:.0f}"
        cells = ["-" if n is None else f"{n:.4g}" for n in numbers]
        made.add_row(s.stage, s.method, str(s.steps), seconds, *cells, Path(s.folder).name)
    return made


def _run(engine: Callable[..., Any], stage: Stage, place: Path, folders: Mapping[str, str]) -> float:
    begun = (place / "config.yaml").is_file()
    settings = {**stage.filled(folders), "output": place.parent, "name": place.name, "resume": begun}
    shared = {name: settings.pop(name) for name in stage.shared & settings.keys()}
    started = time.perf_counter()
    with named(stage.name):
        engine(**shared).run(**settings)
    return time.perf_counter() - started


def _folder(stages: Sequence[Stage], given: Mapping[str, Any]) -> tuple[Path, FolderLock]:
    """Return the pipeline's folder, a new one or the existing one with the same stages, and its lock."""
    config = RunConfig(**{"method": "pipeline", "model": "-", "data": "-", **given})
    if config.name is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("several processes need one folder: set the pipeline's `name`")
    if int(os.environ.get("RANK", "0")):
        # the first process creates it; a stage starts when all processes are there
        folder = config.output / str(config.name)
        return folder, FolderLock(folder)
    folder = run_folder.find_or_make(config, FILE)
    lock = FolderLock(folder)
    lock.take()
    try:
        _begin(folder, config, [s.written() for s in stages])
    except BaseException:
        lock.close()
        raise
    return folder, lock


def _begin(folder: Path, config: RunConfig, written: list[dict[str, Any]]) -> None:
    """Write pipeline.yaml; where the pipeline is resumed, compare its stages instead. Raises ConfigError."""
    if config.resume:  # pipeline.yaml itself may have been edited
        check_same(folder, *_comparable(_summary(folder)["begun_with"], written))
    else:
        _write_summary(folder, {"begun_with": written, "stages": []})
        write_yaml(folder / FILE, {"output": str(config.output), "name": folder.name, "stages": written})


def _comparable(before: Any, now: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both lists of stages as flat settings: their names where these differ, else the settings of each."""
    names = [[stage["name"] for stage in stages] for stages in (before, now)]
    if names[0] != names[1]:
        return {"stages": ", ".join(names[0])}, {"stages": ", ".join(names[1])}
    flat = [
        {f"{s['name']}: {k}": v for s in stages for k, v in _flat(s).items() if k not in FREE}
        for stages in (before, now)
    ]
    return flat[0], flat[1]


def _flat(stage: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's settings with those of `rollout`, of which some are free, one by one."""
    rollout = stage.get("rollout") or {}
    return {k: v for k, v in stage.items() if k != "rollout"} | {f"rollout.{k}": v for k, v in rollout.items()}


@contextmanager
def _how_to_resume(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        logger.warning("the pipeline is not finished; continue with: alignkit pipeline %s --resume", folder / FILE)
        raise


def _result(stage: Stage, place: Path, seconds: float | None) -> StageResult:
    lines = run_folder.read_metrics(place)
    last = {k: v for line in lines for k, v in line.items() if v is not None}
    shown = {m if f"eval/{m}" not in last else f"eval/{m}" for m in HEADLINE}
    metrics = {k: last[k] for k in sorted(shown & last.keys())}
    return StageResult(stage.name, stage.method.name, int(last["step"]), seconds, metrics, str(place))


def _known_seconds(folder: Path) -> dict[str, float]:
    rows = _summary(folder)["stages"] if (folder / "summary.json").is_file() else []
    return {row["stage"]: row["seconds"] for row in rows if row["seconds"] is not None}


def _summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _write_summary(folder: Path, values: Mapping[str, Any]) -> None:
    replace_text(folder / "summary.json", json.dumps(values, indent=2) + "\n")
