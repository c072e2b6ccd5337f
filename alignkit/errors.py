"""Every error alignkit raises on purpose. One tree, so `except AlignkitError` catches them all.

A message says what failed, what was given, what exists, and what to type next. The command line prints it
without a traceback and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlignkitError(Exception):
    """Base of all errors that alignkit raises on purpose."""


class ConfigError(AlignkitError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(AlignkitError):
    """The rows of a data set cannot be used; the message names file, row, column and fix."""


class PluginError(AlignkitError):
    """A plugin is missing, broken, or breaks the contract of `alignkit.method.Method`."""


class ModelError(AlignkitError):
    """A model cannot be loaded, or cannot play the role it was given."""


class CacheError(AlignkitError):
    """The reference cache cannot be opened or written."""


class CheckpointError(AlignkitError):
    """A checkpoint cannot be written, or none of those present is whole."""


class RewardError(AlignkitError):
    """A reward or a judge raised, or gave back what is no reward; or its endpoint is dead."""


class TrainingError(AlignkitError):
    """Training cannot go on: too many non-finite steps, or a rank that no longer answers."""


class AlarmError(AlignkitError):
    """An alarm that `stop_on` names ended a run; what it had learned is saved."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the sentence " Did you mean 'x'?" for the closest of `known`, or nothing; the space belongs to it."""
    close = difflib.get_close_matches(word.lower(), sorted(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
