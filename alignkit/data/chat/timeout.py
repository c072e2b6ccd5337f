"""A time limit for templates, which are programs that come with models."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence

from alignkit.errors import ModelError


class _Stop(BaseException):
    """Raised in a rendering thread from outside, to stop a template that does not end."""


def within(seconds: float, steps: Iterator[None], rows: Sequence[int]) -> None:
    """Run `steps`, one for each row, each within `seconds`. Raises ModelError naming the row that took longer.

    They run in a thread, so that a step that never ends can be abandoned: signals reach the main thread only.
    """
    done = 0
    failures: list[Exception] = []

    def work() -> None:
        nonlocal done
        try:
            for _ in steps:
                done += 1
        except _Stop:
            pass
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        before = done
        thread.join(seconds)
        if thread.is_alive() and done == before:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stop))
            raise ModelError(
                f"the chat template did not finish row {rows[done]} within {seconds:g} s. "
                "Read tokenizer.chat_template before you trust this model, or set another template"
            )
    if failures:
        raise failures[0]
