"""The contenders of a benchmark, each in its own process: their figures, and why a contender has none."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import common

PREPARE = "prepare"  # the child that writes models and rows before the contenders run
Figures = dict[str, Any]


class Contest:
    """Runs the contenders of a script, each in a new process, and keeps their figures.

    With --tiny one process runs all contenders of an interpreter, so that the imports are paid for once. Whenever a
    process has ended, --json is written, so that a run that is stopped or killed leaves what it measured.
    runs: the figures of each round by contender. failed: the reason by contender that has none. about: of the script's
    settings, for the file.
    """

    def __init__(self, script: str, args: argparse.Namespace, work: Path, **about: Any) -> None:
        self.script, self.args, self.work, self.about = script, args, work, about
        self.runs: dict[str, list[Figures]] = {}
        self.failed: dict[str, str] = {}
        self._prepared = self._interrupted = False

    def run(self, names: Iterable[str], round_: int = 0, deadline: float = float("inf")) -> None:
        """Run the contenders in turn, after the script's `prepare`, until the deadline of time.monotonic().

        Exits when `prepare` fails.
        """
        waiting = [*names] if self._prepared else [PREPARE, *names]
        self._prepared = True
        for python, group in self._groups(waiting):
            for name, found in self._child(python, group, round_, deadline).items():
                if name == PREPARE and "failed" in found:
                    raise SystemExit(f"preparation failed: {found['failed']}")
                if name != PREPARE:
                    self._keep(name, found)
            common.save(self.args, {**self.about, "runs": self.runs, "failed": self.failed})

    def _keep(self, name: str, found: Figures) -> None:
        if "failed" in found:
            self.failed[name] = found["failed"]
            print(f"{name} failed: {found['failed']}", file=sys.stderr, flush=True)
        else:
            self.runs.setdefault(name, []).append(found)
            print(f"{name}: done, peak memory {found['peak_mib']:.0f} MiB", file=sys.stderr, flush=True)

    def _groups(self, names: list[str]) -> list[tuple[str, list[str]]]:
        def python(name: str) -> str:
            return str(self.args.trl_python) if common.is_trl(name) else sys.executable

        if self.args.tiny:
            return [(key, [*group]) for key, group in itertools.groupby(names, python)]
        return [(python(name), [name]) for name in names]

    def _child(self, python: str, names: list[str], round_: int, deadline: float) -> dict[str, Figures]:
        left = deadline - time.monotonic()
        if left < 10 or self._interrupted:
            return {name: {"failed": "interrupted" if self._interrupted else "out of time"} for name in names}
        command = [python, self.script, *sys.argv[1:], "--child", ",".join(names)]
        command += ["--work", str(self.work), "--round", str(round_)]
        env = {**os.environ, "OMP_NUM_THREADS": str(self.args.threads), "HF_HUB_OFFLINE": "1"}
        limit = None if left == float("inf") else left
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=limit)
            errors, why = done.stderr, f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            errors, why = "", f"not finished after {left:.0f} seconds"
        except OSError as error:
            errors, why = "", common.reason(error)
        except KeyboardInterrupt:  # the contenders before this one are still reported
            self._interrupted, errors, why = True, "", "interrupted"
        why = (errors.strip().splitlines() or [why])[-1]
        found = {name: taken(self.work / f"{name}.json") or {"failed": why} for name in names}
        if any("failed" in figures for figures in found.values()):
            print(errors[-4000:], file=sys.stderr)
        return found


def taken(path: Path) -> Figures | None:
    """Return what a child wrote, and delete the file; None when it wrote nothing."""
    if not path.is_file():
        return None
    found: Figures = json.loads(path.read_text())
    path.unlink()
    return found


def answer(
    args: argparse.Namespace,
    prepare: Callable[[argparse.Namespace, Path], None],
    contend: Callable[[str, argparse.Namespace, Path], Figures],
) -> int:
    """Be the child of a Contest: run the names of --child and write figures, or the reason of a failure, for each."""
    common.hide_scripts()
    work = Path(args.work)
    for name in args.child.split(","):
        try:
            if name == PREPARE:
                prepare(args, work)
                found: Figures = {"done": True}
            else:
                found = contend(name, args, work)
                found |= {"peak_mib": peak_mib(), "versions": common.versions("torch", "transformers", "trl")}
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            found = {"failed": common.reason(error)}
        (work / f"{name}.json").write_text(json.dumps(found))
    return 0


def peak_mib() -> float:
    """Return the peak memory of this process: torch's on a GPU, else the resident set's high-water mark."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:  # getrusage would count the parent's memory, which a child holds until it starts the new program
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
