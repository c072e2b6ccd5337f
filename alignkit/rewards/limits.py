"""When the call of a reward or a judge must end: its time-out, and a signal that has asked the run to stop.

A function runs in the main thread: autocast, no_grad and the current GPU belong to a thread, and libraries such as
math-verify set signals. So it is interrupted there, by SIGALRM, which Python handles in loops, in waits, and inside of
a regular expression that never ends. Code in C that does not look for signals cannot be interrupted.
"""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

GRACE = 5.0  # seconds that a call has after a signal has asked the run to stop: it may be slow, and not hang
_AGAIN = 1.0  # seconds until a function that caught the interruption is interrupted again


class Overrun(BaseException):
    """Raised inside of a call that must end; not an Exception, so that `except Exception` does not catch it."""


class LateError(Exception):
    """A call did not end in time; the message says what it did."""


class StopRequest:
    """When a signal asked the run of this process to stop, as time.monotonic(); None where it did not."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.interruptible = False  # a call runs in the main thread

    def now(self) -> None:
        """End the calls that run, after GRACE seconds. For handlers of signals."""
        self.at = time.monotonic()
        if self.interruptible:
            signal.setitimer(signal.ITIMER_REAL, GRACE + 0.01, _AGAIN)

    def forget(self) -> None:
        """Let calls run as long as they may."""
        self.at = None


STOP = StopRequest()


@dataclass(frozen=True)
class Deadline:
    """seconds: the time-out of a call that starts now; None: only a signal ends it. more: seconds beyond it."""

    seconds: float | None
    more: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float | None:
        """Return the seconds until the call must end, None where nothing asks it to."""
        ends = [self.started + self.seconds + self.more] if self.seconds is not None else []
        ends += [STOP.at + GRACE] if STOP.at is not None else []
        return min(ends) - time.monotonic() if ends else None

    def passed(self) -> str:
        """Return why the call must end now, empty where it need not."""
        left = self.left()
        if left is None or left > 0:
            return ""
        if STOP.at is not None and time.monotonic() > STOP.at + GRACE:
            return f"was still running {GRACE:g} s after a signal asked the run to stop"
        return f"did not return within {self.seconds:g} s, its time-out (reward_timeout)"


@contextmanager
def interrupted(deadline: Deadline) -> Iterator[None]:
    """Inside, Overrun is raised where the deadline has passed; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    running = threading.Lock()
    over = True  # until the call begins: a start may take longer than the call may

    def ring(number: int, frame: FrameType | None) -> None:
        if not over and (why := deadline.passed()):
            raise Overrun(why)

    def watch() -> None:  # a function may use SIGALRM itself, and cancel the timer
        while not running.acquire(timeout=0.5):
            if deadline.passed():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    running.acquire()
    watcher = threading.Thread(target=watch, name="alignkit-limits", daemon=True)
    handler = signal.signal(signal.SIGALRM, ring)
    STOP.interruptible = True
    left = deadline.left()  # a regular expression keeps other threads from running, but not this timer
    timer = signal.setitimer(signal.ITIMER_REAL, 0 if left is None else max(left, 0) + 0.01, _AGAIN)
    watcher.start()
    try:
        try:
            over = False
            yield
        finally:
            over = True
            running.release()
    finally:
        STOP.interruptible = False
        signal.setitimer(signal.ITIMER_REAL, *timer)
        watcher.join()  # no signal comes after this
        signal.signal(signal.SIGALRM, handler)


def place_of(error: BaseException) -> str:
    """Return where a call was when it was interrupted, such as " (in wait, rewards.py line 3)"; it may be empty."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    return f" (in {frames[-1].name}, {frames[-1].filename} line {frames[-1].lineno})" if len(frames) > 1 else ""
