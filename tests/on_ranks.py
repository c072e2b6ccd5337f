"""Runs on several gloo processes, each job in turn, so that a start of torchrun serves all of them.

torchrun ... tests/on_ranks.py jobs.json      a list of [method, settings]
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit import Environment, Step

Job = tuple[str, dict[str, Any]]
REDS, REDDER, ODD, ROUNDS = "on_ranks:reds", "on_ranks:redder", "on_ranks:odd", "on_ranks:Rounds"
CALLS: list[int] = []


def reds(completions: list[str], **_: Any) -> list[float]:
    """How often a completion says red, less a little for every character."""
    return [text.count("red") - 0.01 * len(text) for text in completions]


def redder(first: list[str], second: list[str], **_: Any) -> list[float]:
    """P(the first says red more often)."""
    return [0.5 + 0.5 * (a > b) - 0.5 * (a < b) for a, b in zip(reds(first), reds(second), strict=True)]


def odd(completions: list[str], **_: Any) -> list[float]:
    """As `reds`, but the call ODD_CALL fails on rank 1; the first ones are of the evaluation before the first step."""
    CALLS.append(1)
    if len(CALLS) == int(os.environ["ODD_CALL"]) and os.environ["RANK"] == "1":
        raise ValueError("planted by the test")
    return reds(completions)


class Rounds(Environment):
    """Goes on for as many turns as its text has characters, by threes: ranks have different numbers of turns."""

    def step(self, messages: Sequence[Any]) -> Step:
        """Pay for the letter e."""
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        done = len(said) >= 1 + len(said[0]) % 3
        return Step([{"role": "user", "content": "more"}], said[-1].count("e") - 0.01 * len(said[-1]), done)


def alone() -> None:
    """Say which threads of the communication still run: Python's end would abort them, now and then."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    print("left:", sorted({name for name in names if "gloo" in name or "alignkit" in name}), flush=True)


def started(n: int, jobs: list[Job], folder: Path) -> subprocess.Popen[str]:
    """Start the jobs on n processes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with (folder / "said").open("w") as said:
        command = [sys.executable, *launcher, __file__, str(folder / "jobs.json")]
        return subprocess.Popen(command, stdout=said, stderr=said, env=env, text=True)


def run_on(n: int, jobs: list[Job], folder: Path, timeout: float = 600) -> str:
    """Run the jobs on n processes; return what they said. Raises AssertionError with its end where they fail."""
    process = started(n, jobs, folder)
    try:
        code = process.wait(timeout)
    finally:
        process.kill()
    said = (folder / "said").read_text()
    assert code == 0, said[-4000:]
    return said


def main() -> None:
    atexit.register(alone)  # before the engine's: what is registered first runs last
    import alignkit

    for method, settings in json.loads(Path(sys.argv[1]).read_text()):
        alignkit.run(method, **settings)


if __name__ == "__main__":
    main()
