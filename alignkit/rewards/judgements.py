"""Replies of language models on disk: SQLite, one row for each question, so that no question is paid for twice."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.databases import WAIT, DamagedError, Spare, is_damage
from alignkit.errors import CacheError


def default_path() -> Path:
    """Return the path: the environment variable ALIGNKIT_JUDGEMENTS, else ~/.cache/alignkit/judgements.sqlite."""
    return Path(os.environ.get("ALIGNKIT_JUDGEMENTS") or "~/.cache/alignkit/judgements.sqlite").expanduser()


def key_of(question: Mapping[str, Any]) -> str:
    """Return a question's key: a hash of its JSON, which must hold everything that the reply depends on."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


class Judgements:
    """Replies by key. Several processes can share a file. Where the file fails, replies are kept in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path.expanduser() if path else default_path()
        self._kept: dict[str, str] = {}
        self._file = Spare("cache of judgements", self.path, lambda: _File(self.path), b"CREATE TABLE judgements")

    @property
    def place(self) -> str:
        """Where new replies are kept: the path, or "memory"."""
        return str(self.path) if self._file.writable else "memory"

    def get(self, key: str) -> str | None:
        """Return the reply to a question, None where it is not stored."""
        return self._kept[key] if key in self._kept else self._file.read(lambda file: file.get(key), None)

    def put(self, key: str, reply: str) -> None:
        """Store a reply, or keep it."""
        if not self._file.write(lambda file: file.put(key, reply)):
            self._kept[key] = reply

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _File:
    """The file. Every method raises CacheError where it fails, DamagedError where it is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # opened in one thread and used in that of the event loop, never in both at once
            self._db = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise self._failed("open", error) from error
        self._run("PRAGMA journal_mode = WAL")
        self._run("PRAGMA synchronous = NORMAL")
        self._run("CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID")

    def get(self, key: str) -> str | None:
        found = self._run("SELECT reply FROM judgements WHERE key = ?", key)
        try:
            reply = json.loads(found[0][0]) if found else None
        except (ValueError, TypeError, RecursionError):  # a damaged value: the question is asked again
            return None
        return reply if isinstance(reply, str) else None

    def put(self, key: str, reply: str) -> None:
        self._run("INSERT OR REPLACE INTO judgements VALUES (?, ?)", key, json.dumps(reply))

    def close(self) -> None:
        self._db.close()

    def _run(self, statement: str, *values: str) -> list[Any]:
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._failed("use", error) from error

    def _failed(self, what: str, error: Exception) -> CacheError:
        return (DamagedError if is_damage(error) else CacheError)(
            f"cannot {what} the judgements {self._path}: {error}. Set another file by cache_file, or by the "
            f"environment variable ALIGNKIT_JUDGEMENTS"
        )
