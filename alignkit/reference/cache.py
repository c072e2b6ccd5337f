"""The reference cache's file: SQLite in WAL mode, one row for each value, a checksum in each row, no pickle.

Several processes can read and fill one file at once. It must be on a local disk: WAL needs shared memory, which network
file systems do not provide.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignkit.databases import WAIT, DamagedError, code, is_damage
from alignkit.errors import CacheError, nearest

VERSION = 1
APPLICATION = 0x616C6B72  # distinguishes our files from other SQLite databases
_CHUNK = 500  # keys in one SELECT
_SCHEMA = (
    "CREATE TABLE refs (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, label TEXT NOT NULL DEFAULT '',"
    " first_used TEXT NOT NULL, last_used TEXT NOT NULL)",
    "CREATE TABLE logps (key BLOB NOT NULL UNIQUE, ref INTEGER NOT NULL, value BLOB NOT NULL, checksum BLOB NOT NULL)",
    "CREATE INDEX logps_by_ref ON logps (ref)",
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)


def default_path() -> Path:
    """Return the cache's path: the environment variable ALIGNKIT_CACHE, else ~/.cache/alignkit/reference.sqlite."""
    return Path(os.environ.get("ALIGNKIT_CACHE") or "~/.cache/alignkit/reference.sqlite").expanduser()


class LogpCache:
    """Log-probabilities by key: 32 bytes -> float32 [c], nats. hits and misses count distinct keys looked up.

    Every method raises CacheError where the file cannot be opened, read or written, DamagedError where it is damaged.
    Usable only in the thread and process that created it; each process opens its own.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path).expanduser() if path is not None else default_path()
        self.hits = 0
        self.misses = 0
        self._used: set[str] = set()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and 0 < self.path.stat().st_size < 512:  # SQLite would read it as an empty file
                raise self._not_ours("too short")
            self._db = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise CacheError(f"cannot open the reference cache {self.path}: {error}. {_elsewhere()}") from error
        self._set_up()

    def __enter__(self) -> LogpCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        """Return the stored values, float32 [c]; damaged values are deleted, with a warning, and left out."""
        found: dict[bytes, Tensor] = {}
        bad: list[int] = []
        wanted = list(dict.fromkeys(keys))
        for start in range(0, len(wanted), _CHUNK):
            chunk = wanted[start : start + _CHUNK]
            query = f"SELECT rowid, key, value, checksum FROM logps WHERE key IN ({','.join('?' * len(chunk))})"
            for rowid, k, value, checksum in self._all(query, chunk):
                if is_whole(k, value, checksum):
                    found[k] = torch.from_numpy(np.frombuffer(value, "<f4").astype(np.float32))
                else:
                    bad.append(rowid)
        if bad:
            self._delete(bad)
            warnings.warn(f"damaged values in {self.path}: {len(bad)} deleted; they are computed again", stacklevel=2)
        self.hits += len(found)
        self.misses += len(wanted) - len(found)
        return found

    def put(self, items: Mapping[bytes, Tensor], fingerprint: str) -> None:
        """Store one reference's values, float32 [c], in one transaction; an existing key keeps its value."""
        rows = []
        for k, value in items.items():
            raw = value.detach().cpu().numpy().astype("<f4").tobytes()
            rows.append((k, raw, _checksum(k, raw), fingerprint))
        with self._transaction():
            self._touch(fingerprint, "")
            self._db.executemany(
                "INSERT OR IGNORE INTO logps (key, ref, value, checksum)"
                " SELECT ?1, id, ?2, ?3 FROM refs WHERE fingerprint = ?4",
                rows,
            )

    def use(self, fingerprint: str, label: str = "") -> None:
        """Record that a reference is in use today, and its label; `info` returns both."""
        if label or fingerprint not in self._used:
            with self._transaction():
                self._touch(fingerprint, label)
            self._used.add(fingerprint)

    def info(self) -> dict[str, Any]:
        """Return path, entries, bytes (of the file), and references, most recently used first: fingerprint, label,
        entries, bytes (of its values), first_used and last_used (UTC, ISO 8601)."""
        columns = ("fingerprint", "label", "entries", "bytes", "first_used", "last_used")
        rows = self._all(
            "SELECT fingerprint, label, count(logps.key), coalesce(sum(length(value)), 0), first_used, last_used"
            " FROM refs LEFT JOIN logps ON ref = refs.id GROUP BY refs.id ORDER BY last_used DESC, refs.id DESC"
        )
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return {
            "path": str(self.path),
            "entries": self._all("SELECT count(*) FROM logps")[0][0],
            "bytes": sum(f.stat().st_size for f in files if f.exists()),
            "references": [dict(zip(columns, row, strict=True)) for row in rows],
        }

    def verify(self) -> tuple[int, int]:
        """Check every value and delete the damaged ones; return the numbers of (good, bad) values."""
        query = "SELECT rowid, key, value, checksum FROM logps WHERE rowid > ? ORDER BY rowid LIMIT 1000"
        good, bad, last = 0, 0, -1
        while rows := self._all(query, [last]):
            broken = [rowid for rowid, k, value, checksum in rows if not is_whole(k, value, checksum)]
            self._delete(broken)
            good, bad, last = good + len(rows) - len(broken), bad + len(broken), rows[-1][0]
        return good, bad

    def clear(self, reference: str | None = None) -> int:
        """Delete all values, or those of the reference that `reference` begins; return how many were deleted."""
        names = [row[0] for row in self._all("SELECT fingerprint FROM refs")]
        chosen = [n for n in names if reference is None or n.startswith(reference)]
        if reference is not None and len(chosen) != 1:
            short = [n[:12] for n in chosen or names]
            raise CacheError(
                f"{len(chosen)} references in {self.path} start with '{reference}'; give the start of exactly one: "
                f"{', '.join(short) or 'none'}.{nearest(reference, short)} See: alignkit cache info"
            )
        with self._transaction():
            ids = [self._db.execute("SELECT id FROM refs WHERE fingerprint = ?", [n]).fetchone()[0] for n in chosen]
            removed = sum(self._db.execute("DELETE FROM logps WHERE ref = ?", [i]).rowcount for i in ids)
            self._db.executemany("DELETE FROM refs WHERE id = ?", [[i] for i in ids])
        self._used.clear()
        self._all("VACUUM")  # else the file keeps its size
        self._all("PRAGMA wal_checkpoint(TRUNCATE)")
        return removed

    def _set_up(self) -> None:
        # checked first: a file that another process is creating is empty until it is ours
        empty = not self._all("SELECT 1 FROM sqlite_master LIMIT 1")
        application, version = (self._all(f"PRAGMA {p}")[0][0] for p in ("application_id", "user_version"))
        if not empty and application != APPLICATION:
            raise CacheError(f"{self.path} is another program's database. {_elsewhere()}")
        if version > VERSION:
            raise CacheError(
                f"the reference cache {self.path} has format {version}, this alignkit reads {VERSION}. "
                f"Upgrade with pip install -U alignkit, or: {_elsewhere()}"
            )
        self._all("PRAGMA journal_mode = WAL")
        self._all("PRAGMA synchronous = NORMAL")  # a power failure may lose values, not the file
        if empty:
            with self._transaction():
                # another process may have created it between the check above and this lock
                if not self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                    for statement in _SCHEMA:
                        self._db.execute(statement)

    def _touch(self, fingerprint: str, label: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._db.execute(
            "INSERT INTO refs (fingerprint, label, first_used, last_used) VALUES (?1, ?2, ?3, ?3)"
            " ON CONFLICT (fingerprint) DO UPDATE SET last_used = ?3, label = iif(?2 = '', label, ?2)",
            [fingerprint, label, now],
        )

    def _delete(self, rowids: list[int]) -> None:
        with self._transaction():
            self._db.executemany("DELETE FROM logps WHERE rowid = ?", [[r] for r in rowids])

    def _all(self, statement: str, values: Sequence[object] = ()) -> Any:
        return self._guard(lambda: self._db.execute(statement, values).fetchall())

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._guard(lambda: self._db.execute("BEGIN IMMEDIATE"))
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                with suppress(sqlite3.Error):  # the first error says what is wrong
                    self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise self._failure(error) from error
            raise

    def _guard(self, action: Callable[[], Any]) -> Any:
        """Run, and retry while the file is busy: SQLite does not wait for every kind of lock itself."""
        end = time.monotonic() + WAIT
        while True:
            try:
                return action()
            except sqlite3.Error as error:
                if code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() > end:
                    raise self._failure(error) from error
                time.sleep(0.05)

    def _failure(self, error: sqlite3.Error) -> CacheError:
        if is_damage(error):
            return self._not_ours(error)
        return CacheError(f"the reference cache {self.path} failed: {error}. {_elsewhere()}")

    def _not_ours(self, why: object) -> DamagedError:
        return DamagedError(
            f"{self.path} is not a reference cache, or cannot be repaired: {why}. "
            f"{_elsewhere()}, or, if it was a cache, remove it (its values are computed again): rm '{self.path}'*"
        )


def _elsewhere() -> str:
    return "Use another file: export ALIGNKIT_CACHE=/another/folder/reference.sqlite"


def _checksum(k: bytes, value: bytes) -> bytes:
    # includes the key, so that a value stored under another key is found too
    return hashlib.blake2b(k + value, digest_size=8).digest()


def is_whole(k: object, value: object, checksum: object) -> bool:
    """Return whether a row of the cache is undamaged; a damaged one may hold any type."""
    return isinstance(k, bytes) and isinstance(value, bytes) and len(value) % 4 == 0 and checksum == _checksum(k, value)
