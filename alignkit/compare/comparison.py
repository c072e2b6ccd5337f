"""All methods of a comparison, one after the other, each in its own process."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignkit import registry
from alignkit.compare.jobs import Job, Task, check_settings, demo_task, installed, jobs_of
from alignkit.config import RunConfig, gathered
from alignkit.runs.folder import find_or_make

logger = logging.getLogger(__name__)

FIGURES = ("win_rate", "accuracy", "kl", "distinct_2", "seconds", "peak_mib")


@dataclass(frozen=True)
class Row:
    """The figures of one method, by the names in FIGURES; or why it failed."""

    method: str
    figures: dict[str, float | None]
    failed: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The base and every method, the folder with their runs, and why each other method was left out.

    judged: whether a reward or a judge decides between answers, so that there is a win rate.
    """

    rows: tuple[Row, ...]
    left_out: dict[str, str]
    folder: Path
    judged: bool = True


def compare(
    given: Mapping[str, Any], settings: Mapping[str, Any], methods: Sequence[str] | None, output: Path, seed: int = 0
) -> Comparison:
    """Run every method that a task's rows can serve, in a new folder of `output` for their runs and logs.

    given: fields of `Task` besides its settings; without any the demo's task is created. settings: of a run, and of any
    method. methods: names, or None for all that are installed. A method that fails gets a row with the reason, and the
    others still run. Raises AlignkitError where the task itself is wrong.
    """
    found = installed() if methods is None else {name: registry.get(name) for name in methods}
    check_settings(settings, found)
    folder = find_or_make(RunConfig(method="compare", model="-", data="-", output=output))
    task = Task(**given) if given else demo_task(folder, seed, found)
    task = replace(task, settings=gathered({**task.settings, **settings}))
    jobs, left_out = jobs_of(task, found, folder, seed)
    rows = []
    for number, job in enumerate(jobs, 1):
        logger.info("%d of %d: %s", number, len(jobs), job.name)
        rows.append(_row(job, folder))
    return Comparison(tuple(rows), left_out, folder, task.reward is not None or task.judge is not None)


def _row(job: Job, folder: Path) -> Row:
    path = job.write(folder / f"{job.name}.json")
    log = folder / f"{job.name}.log"
    with log.open("w", encoding="utf-8") as out:
        command = [sys.executable, "-m", "alignkit.compare", str(path)]
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code == 0:
        return Row(job.name, json.loads(path.with_suffix(".figures.json").read_text(encoding="utf-8")))
    last = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()][-1:]
    reason = f"killed by signal {-code}" if code < 0 else last[0][:200] if last else f"exit code {code}"
    logger.warning("%s failed: %s; see %s", job.name, reason, log)
    return Row(job.name, dict.fromkeys(FIGURES), reason)
