"""What is kept on disk: the reference cache, and how much room there is."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from alignkit import console
from alignkit.insight.doctor.parts import Asked, Fact, Trouble, first

LOW, EMPTY = 5 * 2**30, 2**30  # bytes free
SAMPLE = 1000  # values whose checksums are looked at
_PATIENCE = 1.0  # seconds; a doctor does not wait as long as a run does
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "fuse.sshfs", "9p", "afs"}


def cache(asked: Asked) -> Iterator[Fact | Trouble]:
    """Yield where the cache of the reference's values is, its size, and whether its values are whole."""
    from alignkit.errors import CacheError
    from alignkit.logpcache import LogpCache, default_path

    path = default_path()
    yield Fact("path", str(path))
    if (kind := filesystem(path)) in _NETWORK:
        what = f"the cache is on a network file system ({kind}), which SQLite cannot share between processes"
        yield Trouble("warn", what, "export ALIGNKIT_CACHE=/a/local/disk/reference.sqlite")
    if not path.exists():
        yield Fact("values", "none yet: the first run with a reference makes the file")
        return
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        yield Trouble("problem", f"{path} cannot be written", "mend its rights, or export ALIGNKIT_CACHE=...")
        return
    if trouble := _locked(path):
        yield trouble
        return
    try:
        with LogpCache(path) as opened:
            about = opened.info()
            n = len(about["references"])
            yield Fact("values", f"{about['entries']:,} of {n} reference{'s' * (n != 1)}")
            yield Fact("size", console.size(about["bytes"]))
            good, bad = opened.verify() if asked.verify else _sampled(path)
    except CacheError as error:
        what = str(error).split(". Use another file")[0]
        remedy = "remove the file, its values are computed again; or export ALIGNKIT_CACHE=/another/reference.sqlite"
        yield Trouble("problem", what, remedy)
        return
    yield Fact("checked", f"{good + bad:,} values, {bad} damaged")
    if bad:
        yield Trouble("problem", f"{bad} of the cache's values are damaged", "alignkit cache verify")


def _locked(path: Path) -> Trouble | None:
    """Say that another process holds the file, None where none does."""
    try:
        with closing(sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        if "locked" in str(error):  # else it is damaged, and opening it as a cache says how
            remedy = "wait for the run that fills it; if there is none, end what holds it (fuser shows its number)"
            return Trouble("warn", f"another process writes to the cache, for {_PATIENCE:g} s at least", remedy)
    return None


def _sampled(path: Path) -> tuple[int, int]:
    """Check the first values, and touch none; return how many are (good, bad)."""
    from alignkit.errors import CacheError
    from alignkit.logpcache import is_whole

    query = "SELECT key, value, checksum FROM logps LIMIT ?"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute(query, [SAMPLE]).fetchall()
    except sqlite3.Error as error:
        raise CacheError(f"the reference cache {path} cannot be read: {error}") from error
    good = sum(is_whole(*row) for row in rows)
    return good, len(rows) - good


def disks(asked: Asked) -> Iterator[Fact | Trouble]:
    """Yield the room where runs, the cache, downloaded models and temporary files go."""
    from alignkit.logpcache import default_path

    places = {"runs": asked.runs, "reference cache": default_path().parent}
    try:
        from huggingface_hub.constants import HF_HUB_CACHE

        places["models of the hub"] = Path(HF_HUB_CACHE)
    except Exception as error:
        yield Fact("models of the hub", f"unknown: {first(error)}")
    places["temporary files"] = Path(tempfile.gettempdir())
    for name, path in places.items():
        there = existing(path)
        free = shutil.disk_usage(there).free
        yield Fact(name, f"{path}, {console.size(free)} free")
        if not os.access(there, os.W_OK):
            yield Trouble("problem", f"{name}: {there} cannot be written", "mend its rights, or choose another folder")
        if free < LOW:
            what = f"{name}: only {console.size(free)} are free at {there}"
            remedy = "remove what is not needed (old checkpoints in runs/*/checkpoints), or use another disk"
            yield Trouble("problem" if free < EMPTY else "warn", what, remedy)


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there."""
    path = path.expanduser().absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def filesystem(path: Path) -> str | None:
    """Return the kind of file system that holds a path, None where that cannot be known."""
    table, there = Path("/proc/mounts"), existing(path).resolve()
    if not table.is_file():
        return None
    mounts = [line.split()[1:3] for line in table.read_text().splitlines()]
    around = [(where, kind) for where, kind in mounts if there.is_relative_to(where.replace("\\040", " "))]
    return max(around, key=lambda m: len(m[0]), default=(None, None))[1]
