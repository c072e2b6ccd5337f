"""A rank killed in the middle of a step or of a save, tried and counted.

python tests/faults.py FOLDER TRIES      prints N tried, N resumed to the state of a run that nothing interrupted
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from on_ranks import Job, run_on, started
from safetensors.torch import load_file

from alignkit.runs.checkpoint import load
from alignkit.runs.folder import read_metrics

STEPS, WAIT = 30, 120.0
PLACES = ("step", "save")


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """The weights of a finished run."""
    return load_file(run / "model" / "model.safetensors")


def killed(job: Job, run: Path, where: str, seed: int) -> str:
    """Start a job on 2 processes and kill one of them there; return what they said."""
    draw = random.Random(seed)
    after, rank = draw.randrange(2, STEPS // 2), draw.randrange(2)
    process = started(2, [job], run.parent / f"killed-{run.name}")
    try:
        _until(lambda: _lines(run) >= after, process)
        if where == "save":
            _until(lambda: bool([*(run / "checkpoints").glob(".tmp-*/shard-*")]), process)
        else:
            time.sleep(draw.random() * 0.05)
        os.kill(_ranks(process)[rank], signal.SIGKILL)
        assert process.wait(WAIT) != 0, "the run had ended before"
    finally:
        process.kill()
    return (run.parent / f"killed-{run.name}" / "said").read_text()


def resumed(job: Job, run: Path, whole: Path) -> bool:
    """Resume a killed run; return whether its metrics and weights are those of the run that nothing interrupted."""
    method, settings = job
    found = load(run / "checkpoints", log=lambda text: None)
    assert found is not None
    run_on(2, [(method, settings | {"resume": True})], run.parent / f"resumed-{run.name}")
    assert [*(run / "checkpoints").glob(".tmp-*")] == []
    ours, theirs = weights_of(run), weights_of(whole)
    close = all(torch.allclose(ours[name], t, rtol=0, atol=1e-6) for name, t in theirs.items())
    losses = [[line["loss"] for line in read_metrics(folder)] for folder in (run, whole)]
    return close and len(losses[0]) == len(losses[1]) and max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-6


def job_of(base: Path, rows: Path, run: Path) -> Job:
    """A run of 30 steps with a checkpoint after each."""
    return "dpo", {
        "model": str(base), "data": str(rows), "output": str(run.parent), "name": run.name, "max_steps": STEPS,
        "batch_size": 4, "learning_rate": 1e-4, "fsdp": True, "save_every": 1, "device": "cpu", "timeout_minutes": 1,
        "cache_file": str(run.parent / f"{run.name}.sqlite"),
    }  # fmt: skip


def _lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def _until(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + WAIT
    while not there():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < end
        time.sleep(0.0005)


def _ranks(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()][:2]


def main() -> None:
    import json

    from helpers import make_rows, write_tiny

    folder, tries = Path(sys.argv[1]).absolute(), int(sys.argv[2])
    write_tiny(folder / "base")
    rows = folder / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows("pairs", 20)))
    run_on(2, [job_of(folder / "base", rows, folder / "whole")], folder / "start")
    for where in PLACES:
        good = 0
        for i in range(tries):
            run = folder / f"{where}-{i}"
            job = job_of(folder / "base", rows, run)
            killed(job, run, where, seed=i)
            good += resumed(job, run, folder / "whole")
            print(f"a rank killed in a {where}: {i + 1} tried, {good} resumed to the same state", flush=True)


if __name__ == "__main__":
    main()
