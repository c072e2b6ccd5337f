"""What a run says on the terminal: alignkit's log as plain lines, without what no user can act on.

The command line and runs in Python say the same. Lines of other libraries are left out by name, in NOISE and WARNED.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from alignkit.runs.progress import PlainHandler

# logger -> the words in its line, of transformers 5.23 and bitsandbytes 0.50
NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # a path that alignkit does not use
    "transformers.generation.stopping_criteria": "exceeded the model's predefined",  # `check_fit` says it with the row
    "transformers.utils.loading_report": "LOAD REPORT",  # missing weights are an error here
    "transformers.modeling_utils": "LOAD REPORT",
}
# the start of a warning and its category, of transformers 5.23: peft 0.21 calls what is deprecated
WARNED = ((r"`is_gradient_checkpointing` is deprecated", FutureWarning),)


@contextmanager
def spoken(quiet: bool = False) -> Iterator[bool]:
    """Inside the block, show alignkit's log and no bars of transformers; yields whether this was needed.

    A log that has handlers, its own or the root's, stays as it was configured. quiet: show warnings and errors only.
    """
    logger = logging.getLogger("alignkit")
    before = logger.level, logger.propagate
    handler = None if logger.hasHandlers() or rank() else PlainHandler()
    with _without_bars():
        silence()
        try:
            if handler is not None:
                logger.addHandler(handler)
                logger.propagate = False
                logger.setLevel(logging.INFO)
            if quiet:
                logger.setLevel(logging.WARNING)
            yield handler is not None
        finally:
            logger.setLevel(before[0])
            logger.propagate = before[1]
            if handler is not None:
                logger.removeHandler(handler)


def silence() -> None:
    """Leave out NOISE and WARNED from now on, in the whole process."""
    for name in NOISE:
        logger = logging.getLogger(name)
        if _is_no_noise not in logger.filters:
            logger.addFilter(_is_no_noise)
    for start, category in WARNED:
        warnings.filterwarnings("ignore", start, category)


def rank() -> int:
    """Return this process's rank, 0 for a single process."""
    return int(os.environ.get("RANK", "0"))  # set by torchrun


def _is_no_noise(record: logging.LogRecord) -> bool:
    return NOISE[record.name] not in record.getMessage()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' bars: one for each save and load. Those of downloads stay, on a terminal."""
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging as transformers_log

    shown = transformers_log.is_progress_bar_enabled()
    transformers_log.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            transformers_log.enable_progress_bar()
