"""All errors that alignkit raises on purpose: one tree, so that `except AlignkitError` catches them.

A message states what failed, what was given, what exists, and what to type next. The command line prints it without a
traceback and exits with 2.
"""

from __future__ import annotations

import difflib
import re
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

_OURS = (str(Path(__file__).parent), "alignkit_kernels")
_LIBRARIES = (
    "accelerate", "bitsandbytes", "datasets", "importlib", "numpy", "peft", "pluggy", "pydantic", "pydantic_core",
    "tokenizers", "torch", "transformers", "triton",
)  # fmt: skip
_INSTALLED = tuple(sysconfig.get_paths()[kind] for kind in ("stdlib", "purelib", "platlib"))


class AlignkitError(Exception):
    """Base of all errors that alignkit raises on purpose."""


class ConfigError(AlignkitError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(AlignkitError):
    """The rows of a data set cannot be used; the message names file, row, column and fix."""


class PluginError(AlignkitError):
    """A plugin is missing or broken, or violates the contract of `alignkit.method.Method`."""


class ModelError(AlignkitError):
    """A model cannot be loaded, or cannot be used in its role."""


class CacheError(AlignkitError):
    """The reference cache cannot be opened or written."""


class CheckpointError(AlignkitError):
    """A checkpoint cannot be written, or no checkpoint is complete."""


class RewardError(AlignkitError):
    """A reward or a judge raised an error or returned an invalid value, or its endpoint does not answer."""


class RolloutError(AlignkitError):
    """A sampler failed: no server answers, or one has other weights than it should, or weights cannot be sent."""


class TrainingError(AlignkitError):
    """Training cannot continue: too many non-finite steps, or a rank that does not answer."""


class AlarmError(AlignkitError):
    """An alarm in `stop_on` ended a run; its checkpoint is saved."""


def without_passwords(text: str) -> str:
    """Return a text without the passwords in its URLs."""
    return re.sub(r"//[^/\s@\"']+@", "//[password]@", text)


def first_line(error: BaseException) -> str:
    """Return an error's kind and first line, of 300 characters at most."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def place_of(error: BaseException) -> str:
    """Return "FILE:LINE, in FUNCTION" of the last line of a plugin's or a user's own code that raised; "" without one.

    Ours, Python's and other libraries' lines are left out, before and after it.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    last, package = "", ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file, module = frame.f_code.co_filename, str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if file.startswith((_OURS[0], "<frozen")) or module == _OURS[1] or module in _LIBRARIES:
            continue
        # a plugin may be installed among the libraries: the package that was called is its own
        if not file.startswith(_INSTALLED) or module == (package or module):
            names = [n for n in frame.f_code.co_qualname.split(".") if not n.startswith("<")]  # without <listcomp>
            last, package = f"{file}:{line}, in {names[-1] if names else '<module>'}", package or module
    return last


def at_place(error: BaseException) -> str:
    """Return " (at FILE:LINE, in FUNCTION)" for the end of a message, see `place_of`, or ""."""
    place = place_of(error)
    return f" (at {place})" if place else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" with the closest of `known`, or ""; it starts with a space."""
    close = difflib.get_close_matches(word.lower(), sorted(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
