"""A process with limits in which templates run: they are programs that come with models, and may ask for anything.

It is a fork of this process, so that nothing has to be imported again, and it is kept from call to call, with the
template that it has compiled. Requests and answers are JSON, a line each: nothing that it sends can run code here.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import select
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from alignkit.errors import ModelError

ROOM = 1 << 30  # bytes that it may use beside what this process holds when it starts
LARGEST = 64 << 20  # bytes of an answer
_PART = 64  # rows of a request
_BUFFER = 1 << 16  # bytes of answers that are sent together: each time, the two processes take turns
_SMALL = 2 << 30  # bytes
_COUNT = struct.Struct("Q")
_DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG
_TRUST = "Read tokenizer.chat_template before you trust this model, or set another template"

Work = Callable[[list[Any]], Iterator[Any]]
"""Items of a request -> one answer for each."""


class Helper:
    """A process that does `work`. Raises OSError where it cannot be started.

    name: of the template, for messages. large: whether this process held so much memory at the start that it must not
    be kept: what is changed here afterwards would be there twice.
    """

    def __init__(self, work: Work, name: str) -> None:
        self._name, self._left = name, b""
        self._rows: Sequence[int] = ()
        self._done = mmap.mmap(-1, _COUNT.size)  # answers to the current request, also those that are still in a buffer
        if sys.platform != "linux":  # elsewhere the memory of a process cannot be limited, or a fork is not safe
            raise OSError(f"{sys.platform} cannot limit the memory of a process")
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        self.large = (resident - shared) * os.sysconf("SC_PAGE_SIZE") > _SMALL
        theirs, self._requests = os.pipe()
        self._answers, ours = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        with (
            warnings.catch_warnings()
        ):  # Python 3.12 warns where there are threads; this child takes none of their locks
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            _serve(work, theirs, ours, self._done)
        os.close(theirs)
        os.close(ours)

    def alive(self) -> bool:
        """Return whether the process still runs."""
        if self.pid and os.waitpid(self.pid, os.WNOHANG) != (0, 0):
            self.pid = 0
        return self.pid != 0

    def ask(self, items: Sequence[Any], rows: Sequence[int], seconds: float) -> Iterator[Any]:
        """Yield an answer for each item, each within `seconds`.

        rows: their numbers, for messages. Raises ModelError naming the row that takes longer, needs more memory than
        ROOM, has an answer of more than LARGEST bytes, or ends the process.
        """
        try:
            for start in range(0, len(items), _PART):
                self._rows, self._seconds = rows[start : start + _PART], seconds
                self._done[:] = bytes(_COUNT.size)
                self._send(json.dumps([seconds, items[start : start + _PART]], default=_inert).encode() + b"\n")
                for row in self._rows:
                    yield self._answer(row)
        except BaseException:  # what it has not answered yet would be taken for the answers to other rows
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        for end in (self._requests, self._answers):
            with suppress(OSError):
                os.close(end)
        if self.alive():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.pid = 0
        self._requests = self._answers = -1  # numbers of files are used again

    def _send(self, line: bytes) -> None:
        sent = memoryview(line)
        with suppress(BrokenPipeError):  # the missing answer tells what happened
            while sent:
                sent = sent[os.write(self._requests, sent) :]

    def _answer(self, row: int) -> Any:
        try:
            answer = json.loads(self._line())
        except (ValueError, RecursionError):
            raise self._refused(f"broke its process at row {row}") from None
        if answer is None:
            raise self._refused(
                f"needs more than {ROOM >> 20} MiB of memory for row {row}, or makes more than {LARGEST >> 20} MiB "
                "of text of it"
            )
        return answer

    def _line(self) -> bytes:
        parts, size = [self._left], len(self._left)
        while b"\n" not in parts[-1]:
            before = self._count()
            while not select.select([self._answers], [], [], self._seconds)[0]:
                if self._count() == before:
                    raise self._refused(f"did not finish row {self._current()} within {self._seconds:g} s")
                before = self._count()
            parts.append(os.read(self._answers, 1 << 18))
            size += len(parts[-1])
            if not parts[-1] or size > 2 * LARGEST:
                raise self._refused(f"ended its process at row {self._current()}")
        line, _, self._left = b"".join(parts).partition(b"\n")
        return line

    def _count(self) -> int:
        return int(_COUNT.unpack(self._done[:])[0])

    def _current(self) -> int:
        return self._rows[min(self._count(), len(self._rows) - 1)]

    def _refused(self, what: str) -> ModelError:
        return ModelError(f"the chat template of {self._name} {what}. {_TRUST}")


def _serve(work: Work, requests: int, answers: int, count: mmap.mmap) -> NoReturn:
    """Answer requests until there are no more; never returns into the code of the parent."""
    try:
        gc.freeze()  # a collection would copy the parent's pages
        _limit(requests, answers)
        with os.fdopen(requests, "rb") as asked, os.fdopen(answers, "wb", _BUFFER) as told:
            for line in asked:
                seconds, items = json.loads(line)
                _limit_cpu(len(items) * seconds)
                done = work(items)
                for n in range(len(items)):
                    told.write(_encoded(done) + b"\n")
                    count[:] = _COUNT.pack(n + 1)
                told.flush()
    except BaseException:
        os._exit(1)
    os._exit(0)


def _encoded(done: Iterator[Any]) -> bytes:
    """Return the next answer as JSON; null where it needs too much memory."""
    try:
        line = json.dumps(next(done)).encode()
    except MemoryError:
        return b"null"
    return line if len(line) <= LARGEST else b"null"


def _limit(requests: int, answers: int) -> None:
    import resource

    ctypes.CDLL(None).prctl(_DEATH_OF_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in os.listdir("/proc/self/fd"):  # files, sockets and GPUs of the parent
        if int(name) not in (2, requests, answers):
            with suppress(OSError):
                os.close(int(name))
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_cpu(seconds: float) -> None:
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 10
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _inert(value: Any) -> Any:
    """Return what a template sees of an object that is no JSON value, as transformers does."""
    return value.item() if getattr(value, "ndim", None) == 0 else f"<{type(value).__name__}>"
