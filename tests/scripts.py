"""Running the scripts of benchmarks/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
needs_timeout = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs GNU timeout")


def run(script: str | Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with one thread."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments), "--threads", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def rows(printed: str, *names: str) -> dict[str, list[str]]:
    """Return the columns of the table's rows that begin with the names. Fails when one is missing."""
    found = {name: line[len(name) :].split() for line in printed.splitlines() for name in names if is_row(line, name)}
    assert set(found) == set(names), printed
    return found


def is_row(line: str, name: str) -> bool:
    return line.startswith(f"{name} ") and "failed:" not in line


def executable(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path
