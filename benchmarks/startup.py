"""How long the command line takes to answer: help, the list of methods, and a run until its first step.

    python benchmarks/startup.py --json startup.json
    python benchmarks/startup.py --tiny               one round: does everything run?

Each command is a new process with the files in the system's cache; rounds alternate, and the figures are medians. The
first step is that of DPO on a tiny model and 16 made-up pairs, until its line is printed. "import torch" alone is what
the commands that load methods cannot be faster than.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import dpo

IN_TIME = {"help": 0.3, "methods": 1.5, "first step": 6.0}  # seconds
ALIGNKIT = [sys.executable, "-m", "alignkit"]


def seconds(command: list[str], until: str | None, folder: Path) -> float:
    """Return the seconds until the command has printed a line that begins so, or has ended. Raises where it fails."""
    started, said = time.perf_counter(), list[str]()
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=env
    ) as process:
        assert process.stdout is not None
        taken = 0.0
        for line in process.stdout:
            said.append(line)
            if until and line.startswith(until) and not taken:
                taken = time.perf_counter() - started
        code = process.wait()
        taken = taken or (0.0 if until else time.perf_counter() - started)
    if code or not taken:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {code}: {''.join(said)[-800:]}")
    return taken


def commands(folder: Path) -> dict[str, tuple[list[str], str | None]]:
    """Write the model and the rows; return each command, and what its line begins with that ends the time."""
    rows = dpo.made_up_pairs(16, tiny=True)
    common.write_jsonl(folder / "rows.jsonl", rows)
    common.write_start(folder / "start", [row["prompt"] + row["chosen"] for row in rows], tiny=True)
    settings = {"method": "dpo", "model": "start", "data": "rows.jsonl", "max_steps": 2, "cache_file": "cache.sqlite"}
    (folder / "run.yaml").write_text(json.dumps(settings))
    return {
        "import torch": ([sys.executable, "-c", "import torch"], None),
        "help": ([*ALIGNKIT, "--help"], None),
        "methods": ([*ALIGNKIT, "methods"], None),
        "first step": ([*ALIGNKIT, "run", "run.yaml"], "step 1/"),
    }


def main() -> int:
    """Parse arguments, run the commands in turn, print and write."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--repeat", type=int, help="rounds; the medians are reported (default 7, tiny 1)")
    args = common.parsed(parser)
    taken: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        known = commands(Path(folder))
        for _ in range(args.repeat or (1 if args.tiny else 7)):
            for name, (command, until) in known.items():
                taken.setdefault(name, []).append(seconds(command, until, Path(folder)))
    medians = {name: statistics.median(some) for name, some in taken.items()}
    bars = {name: f"{IN_TIME[name]:g}" if name in IN_TIME else "-" for name in medians}
    cells = [[name, f"{value:.2f}", bars[name]] for name, value in medians.items()]
    lines = [common.table(["command", "seconds", "bar"], cells)]
    return common.finish(args, lines, {}, {"seconds": medians, "rounds": taken})


if __name__ == "__main__":
    sys.exit(main())
