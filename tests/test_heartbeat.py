"""Ranks that are frozen, dead or slow are named by every other rank, within the time-out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore

from alignkit.errors import ConfigError, PluginError
from alignkit.models.heartbeat import Heartbeat
from helpers import make_rows

SECONDS = 12.0
# alignkit, but rank 1 writes its process into a file before its third step and then does something odd
SCRIPT = """
import os, sys, time
from pathlib import Path
from alignkit.cli import main
from alignkit.engine.loop import Loop

step, odd = Loop.step, sys.argv.pop(1)

def stepping(self, number, total):
    if number == 2 and os.environ["RANK"] == "1":
        (Path(sys.argv[-1]) / "process").write_text(str(os.getpid()))
        if odd == "slow":
            time.sleep(25)
        else:
            time.sleep(1)
    return step(self, number, total)

Loop.step = stepping
main()
"""


@contextmanager
def started(odd: str, ranks: int, settings: dict[str, Any], data: str, place: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of several ranks; rank 1 waits before its third step."""
    script = place / "script.py"
    script.write_text(SCRIPT)
    given = {"output": place, "model": settings["model"], "cache_file": settings["cache_file"], "data": data}
    given |= {"device": "cpu", "timeout_minutes": SECONDS / 60, "name": "r", "batch_size": 6, "max_steps": 50}
    words = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    process = subprocess.Popen(
        [*torchrun, str(script), odd, "run", "sft", *words, "--output", str(place)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def rank_1(place: Path, process: subprocess.Popen[str]) -> int:
    """The process of rank 1, in its third step."""
    deadline = time.monotonic() + 120
    while not (place / "process").exists() or not (place / "process").read_text():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.05)
    return int((place / "process").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("odd", "ranks"), [("frozen", 3), ("killed", 3), ("slow", 2)])
def test_a_rank_that_does_not_answer_is_named_by_every_other_one(
    odd: str, ranks: int, settings: dict[str, Any], write_rows: Any, tmp_path: Path
) -> None:
    with started(odd, ranks, settings, write_rows(make_rows("text", 24)), tmp_path) as process:
        one = rank_1(tmp_path, process)
        if odd != "slow":
            os.kill(one, signal.SIGSTOP if odd == "frozen" else signal.SIGKILL)
        began = time.monotonic()
        # torchrun waits 30 s for a frozen process before it kills it, so the ranks' own words are read here
        said: list[str] = []
        heard: list[str] = []
        assert process.stderr is not None
        while len(said) < ranks - 1 and (line := process.stderr.readline()):
            heard.append(line)
            if "error: " in line and "timeout_minutes" in line:
                said.append(line)
        took = time.monotonic() - began
        if odd == "frozen":
            with suppress(ProcessLookupError):  # torchrun has killed it by now
                os.kill(one, signal.SIGKILL)
    words = "is alive, but too slow" if odd == "slow" else "does not answer: its process is dead or frozen"
    assert len(said) == ranks - 1, "".join(heard)
    assert all("rank 1" in line and words in line for line in said)
    assert sorted("rank 2: error" in line for line in said) == [False, True][: ranks - 1]
    assert took < 2 * SECONDS + 10


def test_a_store_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Heartbeat.__new__(Heartbeat)
    alone._every = 0.0
    monkeypatch.setattr(Heartbeat, "_lines", lambda self: {1: "", 2: ""})
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert alone._missing() == "rank 0, which keeps the ranks' store, does not answer"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert alone._missing().startswith("torchrun, ")


def test_other_errors_stay_what_they_are() -> None:
    silent = Heartbeat.__new__(Heartbeat)  # without a store
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ConfigError("timed out"), OSError("gloo")):
        assert silent.explained(error) is error


def test_a_method_that_meets_it_first_is_not_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    lonely = Heartbeat.__new__(Heartbeat)
    lonely.minutes, lonely.own, lonely._ended = 1.0, 0, threading.Event()
    lonely._reader = PrefixStore("", HashStore())
    monkeypatch.setattr(Heartbeat, "_missing", lambda self: "rank 1 does not answer")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    blamed = PluginError("method 'mine' failed in collect")
    blamed.__cause__ = RuntimeError("gloo: connection closed by peer")
    assert str(lonely.explained(blamed)).startswith("rank 1 does not answer (timeout_minutes 1)")
    blamed.__cause__ = KeyError("x")
    assert lonely.explained(blamed) is blamed
