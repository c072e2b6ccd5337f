"""A run in Python says what the command line says, once, and nothing that no user can act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils import logging as transformers_log

import alignkit
from alignkit.cli.console import complain
from alignkit.runs.progress import PlainHandler
from alignkit.runs.results import unlearned
from alignkit.runs.terminal import NOISE, silence, spoken
from helpers import make_rows

LOGGER = logging.getLogger("alignkit")
LINES = ("12 rows to train on, 0 held out", "run: ", "reference: adapter-off", "step 6/6 | loss ", "model: ")


@pytest.fixture
def unconfigure(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what makes logging as it is when Python starts; pytest adds handlers of its own when a test begins."""

    def call() -> None:
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        monkeypatch.setattr(LOGGER, "handlers", [])

    return call


def run(settings: dict[str, Any], capsys: pytest.CaptureFixture[str], method: str = "dpo", **own: Any) -> str:
    capsys.readouterr()
    alignkit.run(method, data=make_rows("pairs", 12), **settings, **own)
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_a_python_run_is_shown_and_leaves_logging_as_it_was(
    settings: dict[str, Any], capsys: Any, unconfigure: Any
) -> None:
    unconfigure()
    before = LOGGER.level, LOGGER.propagate, transformers_log.is_progress_bar_enabled()
    said = run(settings, capsys, lora=2)
    assert [said.count(line) for line in LINES] == [1] * len(LINES), said
    for noise in ("Loading weights", "Writing model", "gemm_4bit", "is_gradient_checkpointing"):
        assert noise not in said
    assert (LOGGER.level, LOGGER.propagate, transformers_log.is_progress_bar_enabled()) == before
    assert LOGGER.handlers == []
    assert "LOAD REPORT" not in run(settings, capsys, "reward")


def test_a_quiet_run_shows_warnings_only(settings: dict[str, Any], capsys: Any, unconfigure: Any) -> None:
    unconfigure()
    said = run(settings | {"learning_rate": 1e-9}, capsys, quiet=True)
    assert said.startswith("warning: the loss is 0.6931, and was 0.6931 at the start"), said
    assert said.count("\n") == 1
    assert "in 6 steps at a learning_rate of 1e-09. Raise learning_rate" in said


@pytest.mark.parametrize("configured", ["alignkit", "root"])
def test_configured_logging_is_followed_and_nothing_is_said_twice(
    configured: str, capsys: Any, unconfigure: Any
) -> None:
    unconfigure()
    told: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    logger = LOGGER if configured == "alignkit" else logging.getLogger()
    logger.addHandler(Kept())
    with spoken() as ours:
        LOGGER.warning("once")
        LOGGER.info("below the level that is set")
    assert (ours, told, capsys.readouterr().err) == (False, ["once"], "")


def test_only_the_first_of_nested_runs_shows_the_log(capsys: Any, unconfigure: Any) -> None:
    unconfigure()
    with spoken() as outer, spoken() as inner:
        LOGGER.info("once")
    assert (outer, inner, capsys.readouterr().err) == (True, False, "once\n")


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch, unconfigure: Any) -> None:
    unconfigure()
    monkeypatch.setenv("RANK", "1")
    with spoken() as ours:
        assert not ours


@pytest.mark.parametrize("name", NOISE)
def test_noise_is_left_out_by_name_and_other_lines_are_not(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence()
    logger = logging.getLogger(name)
    caplog.set_level(logging.WARNING, name)  # other tests may have silenced it in their own way
    monkeypatch.setattr(logger, "disabled", False)
    logger.addHandler(caplog.handler)
    try:
        logger.warning("about it: %s", NOISE[name])
        logger.warning("something else")
    finally:
        logger.removeHandler(caplog.handler)
    assert {r.message for r in caplog.records} == {"something else"}


def test_warnings_are_left_out_by_name_too() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence()
        warnings.warn("`is_gradient_checkpointing` is deprecated and more.", FutureWarning, stacklevel=1)
        warnings.warn("another", FutureWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["another"]


def test_a_run_has_learned_nothing_where_its_loss_has_not_moved() -> None:
    def losses(*values: float, key: str = "loss") -> list[dict[str, float]]:
        return [{key: value} for value in values]

    assert unlearned(losses(0.7, 0.7, 0.7)) is None  # too short to tell
    assert unlearned(losses(0.7, 0.1, 0.1, 0.694)) == (0.7, 0.694)
    assert unlearned(losses(2, 2, 2, 1.98)) is None  # 1 % exactly
    assert unlearned(losses(0.7, 0.9, 5, 5, 5, 5, 0.8, 0.805)) == (pytest.approx(0.8), pytest.approx(0.8025))
    assert unlearned([*losses(0.7, 0.5, 0.3, 0.1), *losses(2, 2, key="eval/loss")]) == (2, 2)
    assert unlearned([*losses(0.7, 0.7, 0.7, 0.7), *losses(2, 1, key="eval/loss")]) is None
    assert unlearned([]) is None


@pytest.mark.parametrize(
    ("say", "said"),
    [
        (lambda: complain("no such file"), "error: no such file\n"),
        (lambda: PlainHandler().handle(LOGGER.makeRecord("", 30, "", 0, "slow", (), None)), "warning: slow\n"),
    ],
)
def test_a_line_is_one_call_so_that_lines_of_several_ranks_do_not_mix(
    say: Callable[[], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unbuffered standard error (PYTHONUNBUFFERED) makes a system call of every call."""
    calls: list[str] = []
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=calls.append, flush=lambda: None))
    say()
    assert calls == [said]
