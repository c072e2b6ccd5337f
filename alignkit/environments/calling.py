"""Calling a user's code from an event loop, so that it can be given up."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any


async def called(function: Callable[[], Any]) -> Any:
    """Return what a function returns, or what it returns is awaited to.

    It runs in a thread of its own, for which nothing waits after a time-out, not even the end of Python. A pool's
    threads are few, and a call that hangs would keep one of them. What is async is awaited here.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(value)
        else:
            done.set_exception(error)

    def run() -> None:
        value, problem = None, None
        try:
            value = function()
        except (Exception, SystemExit) as error:  # sys.exit in it ends no run
            problem = error if isinstance(error, Exception) else RuntimeError(f"sys.exit({error.code})")
        if not loop.is_closed():  # after a time-out nobody listens
            loop.call_soon_threadsafe(settle, value, problem)

    threading.Thread(target=run, daemon=True).start()
    found = await done
    return await found if inspect.isawaitable(found) else found
