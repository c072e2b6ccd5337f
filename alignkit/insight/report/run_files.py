"""Reading the folders of runs: settings, metrics, alarms, sessions, held-out completions.

A last line that was cut off is left out, with a note; anything else that no run writes is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.config import RunConfig, read_yaml, validated
from alignkit.errors import ConfigError
from alignkit.runs import sessions
from alignkit.runs.folder import read_lines
from alignkit.runs.pipeline import FILE as PIPELINE

_REQUIRED = ("method", "model", "data")
_LONGEST = 2**20  # bytes read to find a line that was cut off


@dataclass(frozen=True)
class Run:
    """The contents of one run's folder.

    settings: config.yaml. lines: metrics.jsonl. alarms: alarms.jsonl. sessions: sessions.json, oldest first.
    notes: what is missing or was left out. answers: [before, after], the completions of held-out prompts in the first
    and in the last evaluation; empty where nothing was sampled.
    """

    folder: Path
    label: str
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    sessions: list[dict[str, Any]]
    answers: list[list[dict[str, Any]]]
    notes: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.settings["method"])

    @property
    def steps(self) -> int:
        """Optimiser steps done."""
        return max(int(line["step"]) for line in self.lines)


@dataclass(frozen=True)
class Chapter:
    """Runs shown together: those that were passed, or one stage of a pipeline."""

    title: str
    runs: list[Run]


def chapters(folders: Sequence[Path]) -> list[Chapter]:
    """Read all folders: the runs form one chapter, each stage of a pipeline its own, in order.

    Raises ConfigError: the folder is missing, is not a run's, or has a file that no run writes.
    """
    if not folders:
        raise ConfigError("no run given; type: alignkit report runs/NAME")
    single = [f for f in folders if not (f / PIPELINE).is_file()]
    found: list[Chapter] = []
    if single:
        names = labels(single)
        runs = [read(f, name) for f, name in zip(single, names, strict=True)]
        found.append(Chapter(names[0] if len(runs) == 1 else f"{len(runs)} runs", runs))
    for folder in folders:
        if folder not in single:
            found += [Chapter(f"{folder.name}: {f.name}", [read(f, f.name)]) for f in _stages(folder)]
    return found


def labels(folders: Sequence[Path]) -> list[str]:
    """Return the shortest endings that distinguish the paths. Raises ConfigError where a path is repeated."""
    resolved = [f.resolve() for f in folders]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise ConfigError(f"{folders[i]} is given twice; name each run once")
    depth = 1
    while len({p.parts[-depth:] for p in resolved}) < len(resolved):
        depth += 1
    return ["/".join(p.parts[-depth:]) for p in resolved]


def read(folder: Path, label: str) -> Run:
    """Read one run. Raises ConfigError as `chapters` does."""
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give the run's folder, such as {folder.parent}")
    if not folder.is_dir():
        runs = sorted(p.parent.name for p in folder.parent.glob("*/config.yaml"))[-8:] if folder.parent.is_dir() else []
        raise ConfigError(f"there is no folder {folder}; runs in {folder.parent}: {', '.join(runs) or 'none'}")
    settings = _settings(folder)
    notes: list[str] = []
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder} has no metrics.jsonl: the run has done no step yet, or the file was removed")
    lines = list(_lines(path, notes))
    if not lines:
        raise ConfigError(f"{path} is empty: the run has done no step yet. Try again when it has")
    alarms = list(_lines(folder / "alarms.jsonl", notes)) if (folder / "alarms.jsonl").is_file() else []
    found = sessions.read(folder)
    if not found:
        notes.append("No sessions.json: environment and cost were not recorded.")
    return Run(folder, label, settings, lines, alarms, found, _answers(folder, notes), notes)


def _lines(path: Path, notes: list[str], needs: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Yield what `read_lines` does, and add a note where the last line was cut off."""
    yield from read_lines(path, needs)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LONGEST))
        tail = file.read().rstrip(b"\n").rsplit(b"\n", 1)[-1].decode(errors="replace")
    try:
        json.loads(tail or "0")
    except (ValueError, RecursionError):
        notes.append(f"{path.name}: the last line was cut off while it was written, and is left out.")


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/config.yaml"))
        hint = f"; runs in it: {', '.join(inside[-8:])}; try: alignkit report {folder / inside[-1]}" if inside else ""
        raise ConfigError(f"{folder} is not the folder of a run: it has no config.yaml{hint}")
    settings = read_yaml(path)
    if missing := [name for name in _REQUIRED if settings.get(name) is None]:
        raise ConfigError(f"{path} is not a run's: it has no `{missing[0]}`. Give a folder that `alignkit run` created")
    try:
        validated(RunConfig, {k: v for k, v in settings.items() if k in RunConfig.model_fields})
    except ConfigError as error:
        raise ConfigError(f"{path} is not a run's: {error}") from None
    return settings


def _stages(folder: Path) -> list[Path]:
    """Return the folders of the stages that have started, in order."""
    started = [p.parent for p in folder.glob("*-*/metrics.jsonl") if p.parent.name.split("-")[0].isdigit()]
    if not started:
        raise ConfigError(f"no stage of the pipeline {folder} has done a step yet")
    return sorted(started, key=lambda p: int(p.name.split("-")[0]))


def _answers(folder: Path, notes: list[str]) -> list[list[dict[str, Any]]]:
    """Return the held-out completions of the first and of the last evaluation, of all ranks."""
    found: list[list[dict[str, Any]]] = [[], []]
    for path in sorted(folder.glob("completions*.jsonl")):
        first: list[dict[str, Any]] = []
        last: list[dict[str, Any]] = []
        for one in _lines(path, notes, ("prompt",)):
            if one.get("training") is not False or one.get("rollout"):
                continue
            if not first or one["step"] == first[0]["step"]:
                first.append(one)
            elif last and one["step"] != last[0]["step"]:
                last = [one]
            else:
                last.append(one)
        found[0] += first
        found[1] += last
    return found
