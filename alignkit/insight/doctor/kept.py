"""What is kept on disk: the reference cache, and how much room there is."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from alignkit.insight import terminal
from alignkit.insight.doctor.parts import Asked, Fact, Trouble, first

LOW, EMPTY = 5 * 2**30, 2**30  # bytes free
SAMPLE = 1000  # values whose checksums are looked at
_PATIENCE = 1.0  # seconds; a doctor does not wait as long as a run does
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "fuse.sshfs", "9p", "afs"}
_NONE_YET = "none yet: the first run with a reference makes them"
_ELSEWHERE = "export ALIGNKIT_CACHE=/another/folder/reference.sqlite"
_REMEDIES = {
    "runs": "mend its rights, or choose another `output`",
    "reference cache": f"mend its rights, or {_ELSEWHERE}",
    "models of the hub": "mend its rights, or export HF_HOME=/another/folder",
    "temporary files": "mend its rights, or export TMPDIR=/another/folder",
}
_SMALLEST = 512  # bytes; SQLite would take a shorter file for an empty database
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}  # the last: its tables are not there
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def cache(asked: Asked) -> Iterator[Fact | Trouble]:
    """Yield where the cache of the reference's values is, its size, and whether its values are whole."""
    from alignkit.reference.cache import default_path

    try:
        path = default_path()
    except RuntimeError as error:
        yield Trouble("problem", f"the cache has no place: {first(error)}", f"export HOME=/a/folder, or {_ELSEWHERE}")
        return
    yield Fact("path", str(path))
    try:
        nearest = existing(path)
        if (kind := filesystem(path)) in _NETWORK:
            what = f"the cache is on a network file system ({kind}), which SQLite cannot share between processes"
            yield Trouble("warn", what, "export ALIGNKIT_CACHE=/a/local/disk/reference.sqlite")
        if nearest != path.absolute():
            if nearest.is_dir():
                yield Fact("values", _NONE_YET)
            else:
                yield Trouble("problem", f"{nearest} is not a folder", _ELSEWHERE)
        elif not path.is_file():
            yield Trouble("problem", f"{path} is not a file", _ELSEWHERE)
        elif not (os.access(path, os.R_OK | os.W_OK) and os.access(path.parent, os.W_OK | os.X_OK)):
            yield Trouble("problem", f"{path} cannot be read or written", f"mend its rights, or {_ELSEWHERE}")
        elif not (size := path.stat().st_size):
            yield Fact("values", _NONE_YET)
        elif size < _SMALLEST:
            yield Trouble("problem", f"{path} is not a reference cache of alignkit's: too short", _ELSEWHERE)
        else:
            yield from _looked_into(path, asked)
    except OSError as error:
        what = f"{path} cannot be read or written: {error.strerror or error}"
        yield Trouble("problem", what, f"mend its rights, or {_ELSEWHERE}")


def _looked_into(path: Path, asked: Asked) -> Iterator[Fact | Trouble]:
    """Yield what a file holds; only `verify` writes into it, and only where it is alignkit's."""
    from alignkit.errors import CacheError
    from alignkit.reference.cache import APPLICATION, LogpCache, is_whole

    ours = False
    try:
        with closing(_reading(path)) as connection:
            ours = _only(connection, "PRAGMA application_id") == APPLICATION
            if not _only(connection, "SELECT count(*) FROM sqlite_master"):
                yield Fact("values", _NONE_YET)
                return
            if trouble := _refused(path, ours, _only(connection, "PRAGMA user_version")):
                yield trouble
                return
            n = _only(connection, "SELECT count(*) FROM refs")
            entries = _only(connection, "SELECT count(*) FROM logps")
            yield Fact("values", f"{entries:,} of {n} reference{'s' * (n != 1)}")
            yield Fact("size", terminal.size(sum(p.stat().st_size for p in (path, _log(path)) if p.exists())))
            held = _held(path)
            rows = connection.execute("SELECT key, value, checksum FROM logps LIMIT ?", [SAMPLE]).fetchall()
        bad = sum(not is_whole(*row) for row in rows)
        good = len(rows) - bad
        if held:
            yield held
        elif asked.verify:
            with LogpCache(path) as opened:
                good, bad = opened.verify()
    except (sqlite3.Error, CacheError) as error:
        yield _failure(path, error, ours)
        return
    yield Fact("checked", f"{good + bad:,} values, {bad} damaged")
    if bad:
        yield Trouble("problem", f"{bad} of the cache's values are damaged", "alignkit cache verify")


def _reading(path: Path) -> sqlite3.Connection:
    """Connect to look and not to touch; without `immutable`, SQLite makes files beside one that nobody has open."""
    mode = "mode=ro" if _log(path).exists() else "mode=ro&immutable=1"
    return sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=_PATIENCE)


def _log(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _only(connection: sqlite3.Connection, query: str) -> Any:
    return connection.execute(query).fetchone()[0]


def _refused(path: Path, ours: bool, version: int) -> Trouble | None:
    """Say that this alignkit cannot use a sound database, None where it can."""
    from alignkit.reference.cache import VERSION

    if not ours:
        return Trouble("problem", f"{path} is a database of another program", _ELSEWHERE)
    if version > VERSION:
        what = f"{path} has format {version}, and this alignkit reads {VERSION}"
        return Trouble("problem", what, f"pip install -U alignkit, or {_ELSEWHERE}")
    return None


def _held(path: Path) -> Trouble | None:
    """Say that another process holds the file, None where none does. The caller has it open: else the last to close
    would write the log into it."""
    if not _log(path).exists():
        return None
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_PATIENCE)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        if _code(error) in _BUSY:
            return _busy()
        raise
    return None


def _busy() -> Trouble:
    remedy = "wait for the run that fills it; if there is none, end what holds it (fuser shows its number)"
    return Trouble("warn", f"another process writes to the cache, for {_PATIENCE:g} s at least", remedy)


def _failure(path: Path, error: Exception, ours: bool) -> Trouble:
    """Say what a file that cannot be read is; only one that is known to be alignkit's may be removed."""
    cause = error.__cause__ or error  # SQLite's own error is under alignkit's
    code = _code(cause)
    if code in _BUSY:
        return _busy()
    if code in _DAMAGED and ours:
        remedy = (
            f"remove it and what is named like it with -wal and -shm, its values are computed again; or {_ELSEWHERE}"
        )
        return Trouble("problem", f"the reference cache {path} is damaged: {first(cause)}", remedy)
    if code in _DAMAGED:
        return Trouble("problem", f"{path} is not a reference cache of alignkit's: {first(cause)}", _ELSEWHERE)
    return Trouble("problem", f"{path} cannot be read: {first(cause)}", _ELSEWHERE)


def _code(error: BaseException) -> int:
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def disks(asked: Asked) -> Iterator[Fact | Trouble]:
    """Yield the room where runs, the cache, downloaded models and temporary files go."""
    from alignkit.reference.cache import default_path

    places: dict[str, Callable[[], Path]] = {
        "runs": lambda: asked.runs,
        "reference cache": lambda: default_path().parent,
    }
    try:
        from huggingface_hub.constants import HF_HUB_CACHE

        places["models of the hub"] = lambda: Path(HF_HUB_CACHE)
    except Exception as error:
        yield Fact("models of the hub", f"unknown: {first(error)}")
    places["temporary files"] = lambda: Path(tempfile.gettempdir())
    for name, place in places.items():
        try:
            yield from _room(name, place())
        except (OSError, RuntimeError) as error:  # the latter: no home folder
            yield Trouble("problem", f"{name} cannot be read or written: {first(error)}", _REMEDIES[name])


def _room(name: str, path: Path) -> Iterator[Fact | Trouble]:
    there = existing(path)
    free = shutil.disk_usage(there).free
    yield Fact(name, f"{path}, {terminal.size(free)} free")
    if not there.is_dir():
        yield Trouble("problem", f"{name}: {there} is not a folder", _REMEDIES[name])
    elif not os.access(there, os.W_OK | os.X_OK):
        yield Trouble("problem", f"{name}: {there} cannot be written", _REMEDIES[name])
    if free < LOW:
        what = f"{name}: only {terminal.size(free)} are free at {there}"
        remedy = "remove what is not needed (old checkpoints in runs/*/checkpoints), or use another disk"
        yield Trouble("problem" if free < EMPTY else "warn", what, remedy)


def existing(path: Path) -> Path:
    """Return the path, or the nearest one above it that is there. Raises OSError where that cannot be known."""
    path = path.expanduser().absolute()
    for place in (path, *path.parents):
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return place
    return path


def filesystem(path: Path) -> str | None:
    """Return the kind of file system that holds a path, None where that cannot be known."""
    table, there = Path("/proc/mounts"), existing(path).resolve()
    if not table.is_file():
        return None
    mounts = [line.split()[1:3] for line in table.read_text().splitlines()]
    around = [(where, kind) for where, kind in mounts if there.is_relative_to(where.replace("\\040", " "))]
    # the last mounted is what is seen of several at one place
    return max(reversed(around), key=lambda m: len(m[0]), default=(None, None))[1]
