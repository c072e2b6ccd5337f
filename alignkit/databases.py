"""SQLite files that a run can do without: a damaged one is set aside, one that fails is not used any further."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from alignkit.errors import CacheError

logger = logging.getLogger(__name__)
WAIT = 60.0  # seconds to wait for another process's transaction
_HEAD = 4096  # bytes of SQLite's first page, which holds the definitions of the tables


class DamagedError(CacheError):
    """The file is no database, or its pages contradict each other."""


class _Closes(Protocol):
    def close(self) -> None: ...


D = TypeVar("D", bound=_Closes)
T = TypeVar("T")


def code(error: BaseException | None) -> int:
    """Return SQLite's primary error code, 0 where there is none."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def is_damage(error: BaseException | None) -> bool:
    """Return whether an error of SQLite says that the file is damaged."""
    return code(error) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


class Spare(Generic[D]):
    """A database that may fail without ending the run: one warning, and the caller gets the values otherwise.

    what: its name in warnings. open_: raises CacheError, DamagedError for a damaged file. table: the beginning of the
    definition of a table of ours, by which a damaged file is known: another program's file is never renamed.
    """

    def __init__(self, what: str, path: Path, open_: Callable[[], D], table: bytes) -> None:
        self.path, self._what, self._open, self._table = path, what, open_, table
        self._database: D | None = None
        self._opened: tuple[int, int] | None = None  # which file it is: another process may have renamed it
        self._repaired = False
        self.readable = self.writable = True

    def read(self, action: Callable[[D], T], otherwise: T) -> T:
        """Return what `action` reads; `otherwise` where the file cannot be read, from now on without trying."""
        if not self.readable:
            return otherwise
        try:
            return self._tried(action)
        except CacheError as error:
            self._give_up(error, reading=True)
            return otherwise

    def write(self, action: Callable[[D], object]) -> bool:
        """Return whether `action` was done; after a failure nothing is written any more."""
        if not self.writable:
            return False
        try:
            self._tried(action)
        except CacheError as error:
            self._give_up(error, reading=self._database is None)
            return False
        return True

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def _tried(self, action: Callable[[D], T]) -> T:
        try:
            return action(self._ready())
        except DamagedError as error:
            self.close()
            if self._repaired:  # a new file that is damaged again has a cause that a third one would not escape
                raise
            self._repaired = True
            self._set_aside(error)
            return action(self._ready())

    def _ready(self) -> D:
        if self._database is None:
            self._opened = _identity(self.path)
            self._database = self._open()
            self._opened = _identity(self.path)
        return self._database

    def _set_aside(self, error: DamagedError) -> None:
        """Rename the file with its log. Raises the error where it is not ours, or cannot be renamed."""
        if _identity(self.path) != self._opened:
            return  # another process of the run was faster
        if not self._is_ours():
            raise error
        aside = self.path.with_name(f"{self.path.name}.damaged-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}")
        try:
            for ending in ("-wal", "-shm", ""):  # the log first: SQLite would replay an old one into a new file
                with suppress(FileNotFoundError):
                    os.replace(f"{self.path}{ending}", f"{aside}{ending}")
        except OSError:
            raise error from None
        why = error.__cause__ or "it is too short"
        logger.warning(
            "the %s %s is damaged (%s): it is now %s, and a new one is begun", self._what, self.path, why, aside
        )

    def _is_ours(self) -> bool:
        try:
            with self.path.open("rb") as file:
                head = file.read(_HEAD)
        except OSError:
            return False
        cut = head.startswith(b"SQLite format 3\0") and len(head) < _HEAD
        return self._table in head or cut or not head.strip(b"\0")  # zeros are what a crashed disk leaves

    def _give_up(self, error: CacheError, reading: bool) -> None:
        self.writable = False
        if reading:
            self.close()
            self.readable = False
        logger.warning("%s. The run continues without it, and keeps in memory what it would have stored", error)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
