"""Rewards and judges that hang, or end the process: named within their time, one signal ends the run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import chat_server

import alignkit
from alignkit.config import RunConfig
from alignkit.errors import RewardError
from alignkit.rewards import Answers, build_judge, build_rewards, limits
from alignkit.rewards.calls import TIMEOUT
from alignkit.runs.folder import read_metrics
from helpers import make_rows

ANSWERS = Answers(["what?"] * 3, ["this"] * 3, {}, [30, 31, 32], [1] * 3, [True] * 3)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    yield
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)) == before
    assert not [t for t in threading.enumerate() if t.name == "alignkit-limits"]
    limits.STOP.forget()


def sleeps(completions: Any) -> Any:
    time.sleep(30)


def computes(completions: Any) -> Any:
    while True:
        pass


def waits_for_a_lock(completions: Any) -> Any:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def matches(completions: Any) -> Any:
    re.fullmatch(r"(a+)+b", "a" * 60)


def waits_for_a_process(completions: Any) -> Any:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(30)"], check=False)


def catches_everything(completions: Any) -> Any:
    for _ in range(300):
        try:
            time.sleep(0.1)
        except BaseException as error:
            raise ValueError("mine") from error


def uses_the_signal_itself(completions: Any) -> Any:
    handler = signal.getsignal(signal.SIGALRM)
    signal.alarm(0)  # as math-verify does after each expression
    signal.signal(signal.SIGALRM, handler)
    time.sleep(30)


async def awaits(completions: Any) -> Any:
    await asyncio.sleep(30)


async def blocks_the_loop(completions: Any) -> Any:
    time.sleep(30)


async def waits_in_a_thread(completions: Any) -> Any:
    await asyncio.to_thread(time.sleep, 30)


@pytest.mark.parametrize(
    "hangs",
    [
        sleeps,
        computes,
        waits_for_a_lock,
        matches,
        waits_for_a_process,
        catches_everything,
        uses_the_signal_itself,
        awaits,
        blocks_the_loop,
        waits_in_a_thread,
    ],
)
def test_a_function_that_hangs_is_named_with_its_rows_and_its_time(hangs: Callable[..., Any]) -> None:
    rewards = build_rewards(hangs, timeout=0.3)
    started = time.monotonic()
    with pytest.raises(RewardError) as caught:
        rewards.score(ANSWERS)
    rewards.close()
    assert time.monotonic() - started < 6
    told = f"reward '{hangs.__name__}' failed on row 30, prompt 'what?' and 2 more: did not return within 0.3 s"
    assert str(caught.value).startswith(told)
    assert "reward_timeout" in str(caught.value)


def test_the_line_of_a_function_that_hangs_is_named() -> None:
    line = sleeps.__code__.co_firstlineno + 1
    with pytest.raises(RewardError, match=rf"\(in sleeps, .*test_reward_limits\.py line {line}\)"):
        build_rewards(sleeps, timeout=0.1).score(ANSWERS)


def test_of_async_functions_the_one_that_hangs_is_named() -> None:
    async def quick(completions: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    rewards = build_rewards([quick, awaits], timeout=0.2)
    for _ in range(2):  # the event loop is still in use
        with pytest.raises(RewardError, match="reward 'awaits' failed"):
            rewards.score(ANSWERS)
    rewards.close()
    assert build_rewards([quick], timeout=5).score(ANSWERS).total == [1.0] * 3


def test_a_loop_that_was_blocked_is_replaced() -> None:
    blocked = threading.Event()

    async def once(completions: Any) -> list[float]:
        if not blocked.is_set():
            blocked.set()
            time.sleep(4)
        return [1.0] * len(completions)

    rewards = build_rewards(once, timeout=0.2)
    with pytest.raises(RewardError, match="'once' failed"):
        rewards.score(ANSWERS)
    assert rewards.score(ANSWERS).total == [1.0] * 3


def test_where_the_loop_is_blocked_all_that_wait_are_named() -> None:
    with pytest.raises(RewardError, match=r"'awaits' failed.*within 0.2 s.*; nor did blocks_the_loop$"):
        build_rewards([awaits, blocks_the_loop], timeout=0.2).score(ANSWERS)


def test_a_judge_that_hangs_is_named() -> None:
    with pytest.raises(RewardError, match=r"judge 'computes' failed on row 30.*did not return within 0.2 s"):
        build_judge({"use": lambda first: computes(first), "name": "computes"}, timeout=0.2).wins(ANSWERS, ANSWERS)


def test_what_has_its_own_limit_has_no_other(tmp_path: Path) -> None:
    with chat_server() as chat:
        chat.respond = lambda request: (time.sleep(0.4), (200, {}, json.dumps(
            {"choices": [{"message": {"role": "assistant", "content": "Score: 5"}}]})))[1]  # fmt: skip
        spec = {"use": "llm", "url": chat.url, "model": "m", "cache_file": tmp_path / "c"}
        assert build_rewards(spec, timeout=0.1).score(ANSWERS).total == [0.5] * 3


def test_a_function_that_returns_after_its_time_as_if_nothing_had_happened_is_late() -> None:
    def swallows(completions: Any) -> list[float]:
        with contextlib.suppress(BaseException):
            time.sleep(30)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'swallows' failed on row 30.* did not return within 0\.3 s"):
        build_rewards(swallows, timeout=0.3).score(ANSWERS)


def test_no_limit_is_no_limit() -> None:
    def slow(completions: Any) -> list[float]:
        time.sleep(0.7)
        return [0.0] * 3

    assert build_rewards(slow, timeout=None).score(ANSWERS).total == [0.0] * 3


def test_the_default_is_that_of_the_setting() -> None:
    assert RunConfig.model_fields["reward_timeout"].default == TIMEOUT


def test_a_functions_own_time_out_is_its_own_error() -> None:
    def gives_up(completions: Any) -> Any:
        raise TimeoutError("the service is away")

    with pytest.raises(RewardError, match=r"failed on row 30.*TimeoutError: the service is away") as caught:
        build_rewards(gives_up).score(ANSWERS)
    assert "reward_timeout" not in str(caught.value)


@pytest.mark.parametrize("is_async", [True, False])
def test_a_function_that_ends_the_process_is_an_error(is_async: bool) -> None:
    async def later(completions: Any) -> Any:
        sys.exit(3)

    rewards = build_rewards({"use": later if is_async else lambda completions: sys.exit(3), "name": "quits"})
    with pytest.raises(RewardError, match=r"reward 'quits' failed on row 30.*SystemExit: 3"):
        rewards.score(ANSWERS)
    rewards.close()


def test_an_interruption_by_the_user_passes() -> None:
    def interrupted(completions: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_rewards(interrupted).score(ANSWERS)


def test_functions_run_where_the_run_does() -> None:
    seen: list[Any] = []

    def looks(completions: Any) -> list[float]:
        seen.extend((threading.current_thread(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return [0.0] * 3

    with torch.no_grad(), torch.autocast("cpu"):
        build_rewards(looks).score(ANSWERS)
    assert seen == [threading.main_thread(), False, True]


def test_a_timer_of_someone_else_rings_afterwards() -> None:
    rang: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rang.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        assert build_rewards(lambda completions: [0.0] * 3).score(ANSWERS).total == [0.0] * 3
        time.sleep(0.5)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert rang == [signal.SIGALRM]


def test_outside_the_main_thread_a_function_runs_without_a_limit() -> None:
    found: list[Any] = []
    work = lambda: found.extend(build_rewards(lambda completions: [1.0] * 3).score(ANSWERS).total)  # noqa: E731
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [1.0] * 3


# Runs

REWARDS = """
import asyncio, pathlib, re, time

def _begun():
    pathlib.Path("begun").touch()

def score(completions):
    calls = pathlib.Path("calls")
    calls.write_text(calls.read_text() + "." if calls.exists() else ".")
    return len(calls.read_text()) > 3

def waits(completions):
    if score(completions):
        _begun()
        time.sleep(600)
    return [float(len(c)) for c in completions]

def matches(completions):
    if score(completions):
        _begun()
        re.fullmatch(r"(a+)+b", "a" * 80)
    return [float(len(c)) for c in completions]

async def threads(completions):
    if score(completions):
        _begun()
        await asyncio.to_thread(time.sleep, 600)
    return [float(len(c)) for c in completions]
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["waits", "matches", "threads"])
def test_one_signal_ends_a_run_whose_reward_hangs(name: str, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(REWARDS)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows("prompts", 8)))
    sets = ["sampling={max_new_tokens: 4}", f"reward=hanging:{name}", "device=cpu", "eval_fraction=0"]
    command = [sys.executable, "-m", "alignkit", "run", "rloo", "--model", tiny, "--data", str(rows), "--name", "mine"]
    command += ["--output", str(tmp_path), "--max-steps", "6", "--batch-size", "2"]
    command += [word for setting in sets for word in ("--set", setting)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "begun").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        _, said = process.communicate(timeout=25)
    finally:
        process.kill()
    assert process.returncode == 143, said
    assert time.monotonic() - started > limits.GRACE - 0.5
    assert "Traceback" not in said
    assert f"reward '{name}' failed on row" in said
    assert "was still running 5 s after a signal asked the run to stop" in said
    assert "stopped after step 3; continue with: alignkit run" in said
    assert list((tmp_path / "mine").rglob("*3/*.safetensors"))
    assert len(read_metrics(tmp_path / "mine")) == 3


def test_a_run_whose_reward_hangs_ends_in_its_time_and_can_be_resumed(tiny: str, tmp_path: Path) -> None:
    hang, calls = [True], []

    def slow(completions: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3 and hang[0]:
            time.sleep(60)
        return [float(len(c)) for c in completions]

    settings: dict[str, Any] = {"model": tiny, "data": make_rows("prompts", 8), "max_steps": 4, "batch_size": 2}
    settings |= {"eval_fraction": 0, "device": "cpu", "sampling": {"max_new_tokens": 4}, "reward": slow}
    settings |= {"output": tmp_path, "name": "mine", "reward_timeout": 1.0}
    with pytest.raises(RewardError, match=r"(?s)'slow' failed.*within 1 s.*Stopped after step 2; continue with"):
        alignkit.run("rloo", **settings)
    hang[0] = False
    resumed = alignkit.run("rloo", **settings | {"resume": True})
    whole = alignkit.run("rloo", **settings | {"name": "whole"})
    assert [m["loss"] for m in read_metrics(resumed.folder)] == [m["loss"] for m in read_metrics(whole.folder)]


def test_a_call_whose_time_is_over_before_it_begins_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that stalls, the alarm rings while the watching thread starts."""
    start = threading.Thread.start

    def slowly(thread: threading.Thread) -> None:
        start(thread)
        time.sleep(0.3)

    monkeypatch.setattr(threading.Thread, "start", slowly)
    with pytest.raises(limits.Overrun), limits.interrupted(limits.Deadline(0.05)):
        time.sleep(30)
