"""The display of a run: a live bar on a terminal, plain lines elsewhere. And the signals that stop it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from alignkit.runs.results import HEADLINE

_FIRST = ("loss", *(m for m in HEADLINE if m != "loss"))
SHOWN = (*_FIRST, "lr", "tokens_per_second")


def line(step: int, total: int, values: Mapping[str, Any], left: float | None = None) -> str:
    """Return one line about a step: its number, the headline metrics, and alarms."""
    shown = [f"{_short(k)} {values[k]:.4g}" for k in SHOWN if k in values]
    shown += [f"{k} {v:.4g}" for k, v in values.items() if k.startswith("eval/") and k[5:] in _FIRST]
    shown += [f"ALARM {k[6:]}" for k in values if k.startswith("alarm/")]
    tail = f" | {_clock(left)} left" if left is not None else ""
    return f"step {step}/{total} | " + " | ".join(shown) + tail


def _short(name: str) -> str:
    return {"rewards/accuracy": "accuracy", "rewards/margin": "margin", "tokens_per_second": "tokens/s"}.get(name, name)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class Progress:
    """Shows steps as they finish; use `Progress.of_run`."""

    def __init__(self, total: int, done: int, bar: Any = None, task: Any = None) -> None:
        self._total, self._first, self._started = total, done, time.perf_counter()
        self._bar, self._task = bar, task
        self._last_line = 0.0
        self._alarms: dict[str, Any] = {}

    @staticmethod
    @contextmanager
    def of_run(total: int, done: int, shown: bool) -> Iterator[Progress | None]:
        """Open the display of a run of `total` steps of which `done` are finished; yields None where shown is False."""
        if not shown:
            yield None
            return
        if not sys.stderr.isatty():
            yield Progress(total, done)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        from rich.console import Console

        with Bar(*columns, console=Console(stderr=True)) as bar:
            yield Progress(total, done, bar, bar.add_task("", total=total, completed=done))

    def step(self, step: int, values: Mapping[str, Any], always: bool = False) -> None:
        """Show a finished step. Plain lines are printed at most once a second; always for the last step and alarms."""
        alarms = {k: v for k, v in values.items() if k.startswith("alarm/")}
        self._alarms |= alarms
        if self._bar is not None:
            # lines stay on the screen, but the bar is a single line, so alarms are repeated in it
            shown = line(step, self._total, {**values, **self._alarms}).split(" | ", 1)[1]
            self._bar.update(self._task, completed=step, description=shown)
            return
        now = time.perf_counter()
        if always or alarms or step == self._total or now - self._last_line >= 1.0:
            self._last_line = now
            done = step - self._first
            left = (now - self._started) / done * (self._total - step) if done else None
            _say(line(step, self._total, values, left))


class PlainHandler(logging.Handler):
    """Log records as plain lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message, after its level where that is a warning or higher."""
        start = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        _say(start + record.getMessage())


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")  # in one call: `print` makes two, between which other ranks' lines may come
    sys.stderr.flush()


class StopSignals:
    """Context in which the first SIGTERM or SIGINT is recorded in `received`, and the second exits.

    first: called in the handler of the first one.
    """

    def __init__(self, first: Callable[[], object] = lambda: None) -> None:
        self._first = first
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:  # a run that fails with its ranks ignores signals from then on
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        self._first()
        os.write(2, b"\nfinishing this step and saving; send it again to exit at once\n")
