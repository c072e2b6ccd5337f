"""Replies of language models on disk: SQLite, one row for each question, so that no question is paid for twice."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.errors import CacheError

_WAIT = 60.0  # seconds to wait for another process's transaction


def default_path() -> Path:
    """Return the path: the environment variable ALIGNKIT_JUDGEMENTS, else ~/.cache/alignkit/judgements.sqlite."""
    return Path(os.environ.get("ALIGNKIT_JUDGEMENTS") or "~/.cache/alignkit/judgements.sqlite").expanduser()


def key_of(question: Mapping[str, Any]) -> str:
    """Return a question's key: a hash of its JSON, which must hold everything that the reply depends on."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


class Judgements:
    """Replies by key. Several processes can share a file. Every method raises CacheError where the file fails."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path.expanduser() if path else default_path()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # opened in one thread and used in that of the event loop, never in both at once
            self._db = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise self._failed("open", error) from error
        self._run("PRAGMA journal_mode = WAL")
        self._run("PRAGMA synchronous = NORMAL")
        self._run("CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID")

    def get(self, key: str) -> str | None:
        """Return the reply to a question, None where it is not stored."""
        found = self._run("SELECT reply FROM judgements WHERE key = ?", key)
        return str(json.loads(found[0][0])) if found else None

    def put(self, key: str, reply: str) -> None:
        """Store a reply."""
        self._run("INSERT OR REPLACE INTO judgements VALUES (?, ?)", key, json.dumps(reply))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _run(self, statement: str, *values: str) -> list[Any]:
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._failed("use", error) from error

    def _failed(self, what: str, error: Exception) -> CacheError:
        return CacheError(
            f"cannot {what} the judgements {self.path}: {error}. Set another file by cache_file, or by the environment "
            f"variable ALIGNKIT_JUDGEMENTS"
        )
