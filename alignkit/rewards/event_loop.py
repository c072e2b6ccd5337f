"""An event loop for a user's async code, in a thread that the process does not wait for when it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from alignkit.rewards.limits import LateError

T = TypeVar("T")
_THREADS = 32  # of `asyncio.to_thread`, as in the standard library
_LAST = 1.0  # seconds for what is cancelled to end


class EventLoop:
    """An event loop in a thread of its own: a notebook already runs one in the main thread.

    It is kept from call to call, because clients and semaphores belong to the loop that first used them.
    """

    def __init__(self) -> None:
        self._ready, self._hangs = threading.Event(), False
        self._thread = threading.Thread(target=self._serve, name="alignkit-async", daemon=True)
        self._thread.start()
        self._ready.wait()

    def run(self, calls: Coroutine[Any, Any, T], ended: Callable[[], str]) -> T:
        """Return the result of `calls`, which are cancelled as soon as `ended` returns why.

        Raises LateError saying why, and what the calls raise.
        """
        future = asyncio.run_coroutine_threadsafe(calls, self._loop)
        while not future.done():
            with suppress(TimeoutError):
                future.exception(0.2)
            if not future.done() and (why := ended()):
                self._cancel()
                raise LateError(why)
        return future.result()

    def close(self) -> None:
        """Cancel what still runs, and close the loop, unless something blocks it."""
        if not self._hangs:
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(_LAST)

    def _cancel(self) -> None:
        self._hangs = True  # a function that blocks the loop can only be abandoned
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(_LAST)

    def _serve(self) -> None:
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            self._loop.set_default_executor(_Daemons())
            self._closing = asyncio.Event()
            self._loop.call_soon(self._ready.set)
            runner.run(self._wait())

    async def _wait(self) -> None:
        await self._closing.wait()


class _Daemons(ThreadPoolExecutor):
    """Threads of `asyncio.to_thread` that the process does not wait for, unlike those of the standard library."""

    def __init__(self) -> None:
        super().__init__(1)  # its own thread is never started
        self._free = threading.Semaphore(_THREADS)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Call `fn` in a thread."""
        future: Future[T] = Future()

        def work() -> None:
            with self._free:
                if not future.set_running_or_notify_cancel():
                    return
                try:
                    future.set_result(fn(*args, **kwargs))
                except BaseException as error:
                    future.set_exception(error)

        threading.Thread(target=work, name="alignkit-to-thread", daemon=True).start()
        return future
