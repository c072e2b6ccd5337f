"""SIGTERM and Ctrl-C on real processes: the step is finished and saved, and the run goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import alignkit
from alignkit.runs.folder import read_metrics
from alignkit.runs.log import RunLog
from alignkit.runs.progress import StopSignals
from helpers import make_rows

STEPS = 80
SLOW = """
import sys, time
from pathlib import Path
from alignkit.cli import main
from alignkit.engine.loop import Loop

def step(self, number, total):
    (self.state.folder / "in-a-step").touch()
    time.sleep(60)

Loop.step = step
main()
"""


def command(start: list[str], tiny: str, data: str, folder: Path) -> list[str]:
    """A small run of SFT by the command line, its runs in `folder`."""
    more = ["device=cpu", f"cache_file={folder / 'cache.sqlite'}", "learning_rate=0.01", "save_every=1000"]
    sets = [word for pair in more for word in ("--set", pair)]
    given = ["--model", tiny, "--data", data, "--output", str(folder), "--name", "mine"]
    return [sys.executable, *start, "run", "sft", *given, "--max-steps", str(STEPS), "--batch-size", "4", *sets]


@contextmanager
def running(arguments: list[str], ready: Callable[[], bool]) -> Iterator[subprocess.Popen[str]]:
    """Start the process, wait until it is ready, and leave none behind."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the run did not start"
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(folder)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows("text", 24)))
    return str(path)


@pytest.fixture(scope="module")
def uninterrupted(tiny: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    ran = subprocess.run(command(["-m", "alignkit"], tiny, data, folder), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return metrics(folder / "mine")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop_saves_and_resumes_as_if_it_had_not_been(
    number: int, code: int, tiny: str, data: str, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    mine = tmp_path / "mine"
    started = lambda: (mine / "metrics.jsonl").exists() and len(read_metrics(mine)) >= 2  # noqa: E731
    with running(command(["-m", "alignkit"], tiny, data, tmp_path), started) as process:
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said
    done = len(metrics(mine))
    assert 2 <= done < STEPS
    assert f"stopped after step {done}; continue with: alignkit run {mine / 'config.yaml'} --resume" in said
    assert not (mine / "model").exists()
    assert metrics(mine) == uninterrupted[:done]

    resumed = [sys.executable, "-m", "alignkit", "run", str(mine / "config.yaml"), "--resume"]
    ran = subprocess.run(resumed, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert metrics(mine) == uninterrupted
    assert (mine / "model" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "code"), [(signal.SIGTERM, signal.SIGINT, 130), (signal.SIGINT, signal.SIGTERM, 143)]
)
def test_a_second_signal_leaves_at_once_in_the_middle_of_a_step(
    first: int, second: int, code: int, tiny: str, data: str, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    with running(command(["-c", SLOW], tiny, data, tmp_path), (mine / "in-a-step").exists) as process:
        process.send_signal(first)
        time.sleep(0.5)
        assert process.poll() is None  # the first one waits for the step to end
        process.send_signal(second)
        process.communicate(timeout=10)
    assert process.returncode == code
    assert not list(mine.glob("checkpoints/*"))


def test_the_first_signal_is_noted_and_afterwards_signals_do_what_they_did_before() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        assert stop.received == signal.SIGTERM
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_handlers_are_put_back_after_an_error_too() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), StopSignals():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_signal_exits_with_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        assert codes == []
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
    assert codes == [130]
    assert stop.received is not None


def test_a_run_in_a_thread_leaves_the_handlers_alone_and_works(settings: dict[str, Any]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    results: list[Any] = []

    def target() -> None:
        results.append(alignkit.run("sft", data=make_rows("text", 8), **settings | {"max_steps": 1}))
        results.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert results[1] is before
    assert (results[0].folder / "model").is_dir()


def test_a_signal_while_the_log_closes_is_not_swallowed(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trackers may take minutes to close: the program's own handlers are in force again by then."""
    before, during = signal.getsignal(signal.SIGTERM), []
    close = RunLog.__exit__

    def closes(self: RunLog, *error: Any) -> None:
        during.append(signal.getsignal(signal.SIGTERM))
        close(self, *error)

    monkeypatch.setattr(RunLog, "__exit__", closes)
    alignkit.run("dpo", data=make_rows("pairs", 8), **settings | {"max_steps": 1})
    assert during == [before]
