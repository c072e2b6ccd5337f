"""Which rank does not answer: each one tells the others that it lives, how far it is, and why it ended.

A thread of every rank writes a line into the store that torchrun keeps (else the first rank). Where communication
fails, a rank reads the lines twice: those that do not change are of frozen or dead processes, those that lag behind of
slow ones. No clocks are compared.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from alignkit.errors import AlignkitError, PluginError, TrainingError

_OF_COMMUNICATION = re.compile(
    r"gloo|nccl|timed? ?out|connection (closed|reset|refused)|broken pipe|process group", re.I
)
_ENDED = "ended: "


class Heartbeat:
    """The lines of all ranks; `progress` returns this one's number of communications and its step."""

    def __init__(self, own: int, ranks: int, minutes: float, progress: Callable[[], tuple[int, int]]) -> None:
        self.own, self.ranks, self.minutes, self._progress = own, ranks, minutes, progress
        self._every = min(max(60 * minutes / 20, 0.2), 5.0)  # torchrun kills ranks 30 s after the first one failed
        self._patience = max(2 * self._every, 2)
        self._ended = threading.Event()
        self._beats = 0
        self._writer, self._reader = self._store(), self._store()  # a store answers one thread at a time
        self._write()
        self._thread = threading.Thread(target=self._beat, name="alignkit-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop telling the others."""
        self._ended.set()
        self._thread.join(self._patience)  # Python must not end within a call of the store: that aborts the process

    def explained(self, error: Exception) -> Exception:
        """Return a TrainingError naming the ranks that do not answer, or `error` where it is another one."""
        cause = error.__cause__ if isinstance(error, PluginError) else error  # a method may meet it first
        if not isinstance(cause, RuntimeError) or isinstance(cause, AlignkitError):
            return error
        if not isinstance(cause, torch.distributed.DistError) and not _OF_COMMUNICATION.search(str(cause)):
            return error
        with suppress(ValueError):  # torchrun ends the other ranks when one fails, before they have told why
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        who = self._missing() or "a rank does not answer, but all of them seem to be alive"
        self._ended.set()
        with suppress(RuntimeError):  # so that ranks that lose this one name the first cause
            self._reader.set(f"{self.own}", f"{_ENDED}{who}")
        return TrainingError(
            f"{who} (timeout_minutes {self.minutes:g}). Look at that rank's machine and log; continue with --resume"
        )

    def _missing(self) -> str:
        """Return which ranks are frozen, dead or slow, in one line; empty where none is."""
        first = self._lines()
        if not _told(first):
            time.sleep(3 * self._every)
        second = self._lines()
        if told := _told(second):
            return told
        if not any(second.values()):
            keeper = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
            return f"{keeper}, which keeps the ranks' store, does not answer"
        dead = [r for r in second if second[r] == first[r]]
        if dead:
            known = [f"rank {r} (last seen in step {_numbers(second[r])[2]})" for r in dead]
            return f"{' and '.join(known)} does not answer: its process is dead or frozen"
        calls, step = self._progress()
        behind = [r for r, line in second.items() if _numbers(line)[1] < calls]
        if not behind:
            return ""
        return f"rank {' and '.join(map(str, behind))} is alive, but too slow: the others wait for it in step {step}"

    def _lines(self) -> dict[int, str]:
        """Return the lines of the other ranks; empty ones where the store does not answer."""
        lines = {}
        for rank in range(self.ranks):
            if rank != self.own:
                lines[rank] = ""
                with suppress(RuntimeError):
                    lines[rank] = self._reader.get(f"{rank}").decode()
        return lines

    def _store(self) -> PrefixStore:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=self._patience))
        return PrefixStore("alignkit/heartbeat", store)

    def _write(self) -> None:
        self._beats += 1
        calls, step = self._progress()
        self._writer.set(f"{self.own}", f"{self._beats} {calls} {step}")

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store ends with the run
            while not self._ended.wait(self._every):
                self._write()


def _told(lines: dict[int, str]) -> str:
    """Return what another rank has found out."""
    return next((line.removeprefix(_ENDED) for line in lines.values() if line.startswith(_ENDED)), "")


def _numbers(line: str) -> tuple[int, int, int]:
    beats, calls, step = (line or "0 0 0").split()
    return int(beats), int(calls), int(step)
