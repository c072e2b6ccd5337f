"""`alignkit doctor` on what is kept: the reference cache, disks."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doctors import facts, fill, one, set_apart, spoil, troubles

from alignkit.errors import CacheError
from alignkit.insight.doctor import Asked, kept
from alignkit.reference.cache import LogpCache


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_apart(tmp_path, monkeypatch)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A cache with three values."""
    return fill(tmp_path / "cache.sqlite")


def test_a_cache_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert facts(kept.cache)["values"].startswith("none yet")
    assert troubles(kept.cache) == []
    assert not (tmp_path / "cache.sqlite").exists()


@pytest.mark.parametrize("verify", [False, True])
def test_a_whole_cache(verify: bool, filled: Path) -> None:
    found = facts(kept.cache, Asked(verify=verify))
    assert (found["values"], found["checked"]) == ("3 of 1 reference", "3 values, 0 damaged")
    assert troubles(kept.cache) == []


def test_damaged_values_are_found_and_left_unless_verified(filled: Path) -> None:
    spoil(filled)
    for _ in range(2):
        found = one(kept.cache)
        assert (found.severity, found.remedy) == ("problem", "alignkit cache verify")
        assert found.what == "1 of the cache's values are damaged"
    assert "are damaged" in one(kept.cache, Asked(verify=True)).what
    assert troubles(kept.cache) == []  # removed, as by `cache verify`


def test_only_a_sample_is_looked_at(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(filled)
    monkeypatch.setattr(kept, "SAMPLE", 1)
    assert facts(kept.cache)["checked"] == "1 values, 0 damaged"
    assert facts(kept.cache, Asked(verify=True))["checked"] == "3 values, 1 damaged"


ELSEWHERE = "export ALIGNKIT_CACHE=/another/folder/reference.sqlite"


def state(folder: Path) -> dict[str, bytes]:
    """Every file but SQLite's index of its log, which holds no data."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and not p.name.endswith("-shm")}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("content", [b"something else " * 100, b"short", b"SQLite format 3\0" + b"\xff" * 600])
def test_a_file_that_is_no_cache_is_not_to_be_removed(content: bytes, verify: bool, tmp_path: Path) -> None:
    (tmp_path / "cache.sqlite").write_bytes(content)
    found = one(kept.cache, Asked(verify=verify))
    assert (found.severity, found.remedy) == ("problem", ELSEWHERE)
    assert "is not a reference cache of alignkit's: " in found.what
    assert state(tmp_path) == {"cache.sqlite": content}


@pytest.mark.parametrize("verify", [False, True])
def test_a_database_of_another_program_is_not_to_be_removed(verify: bool, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "cache.sqlite")) as connection:
        connection.execute("CREATE TABLE mine (x)")
    before = state(tmp_path)
    found = one(kept.cache, Asked(verify=verify))
    assert found == ("problem", f"{tmp_path}/cache.sqlite is a database of another program", ELSEWHERE)
    assert state(tmp_path) == before


def test_a_cache_that_is_a_folder_or_under_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache.sqlite").mkdir()
    assert one(kept.cache) == ("problem", f"{tmp_path}/cache.sqlite is not a file", ELSEWHERE)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "file" / "cache.sqlite"))
    assert one(kept.cache) == ("problem", f"{tmp_path}/file is not a folder", ELSEWHERE)


def test_a_newer_cache_wants_a_newer_alignkit(filled: Path) -> None:
    with closing(sqlite3.connect(filled)) as connection:
        connection.execute("PRAGMA user_version = 2")
    found = one(kept.cache)
    assert found.what == f"{filled} has format 2, and this alignkit reads 1"
    assert found.remedy == f"pip install -U alignkit, or {ELSEWHERE}"


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("damage", ["pages", "tables"])
def test_a_damaged_cache_may_be_removed(damage: str, verify: bool, filled: Path) -> None:
    if damage == "pages":
        with filled.open("r+b") as file:
            file.seek(4096)  # after the first page, which says whose it is
            file.write(b"\xff" * (filled.stat().st_size - 4096))
    else:
        with closing(sqlite3.connect(filled)) as connection:
            connection.execute("DROP TABLE logps")
    found = one(kept.cache, Asked(verify=verify))
    assert found.severity == "problem"
    assert f"the reference cache {filled} is damaged: " in found.what
    assert found.remedy.startswith("remove it ")
    assert ELSEWHERE in found.remedy


def test_damage_that_only_verifying_meets(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaged(sqlite3.DatabaseError):
        sqlite_errorcode = sqlite3.SQLITE_CORRUPT

    def refused(self: LogpCache) -> Any:
        raise CacheError("long") from Damaged("malformed")

    monkeypatch.setattr(LogpCache, "verify", refused)
    found = one(kept.cache, Asked(verify=True))
    assert found.what == f"the reference cache {filled} is damaged: malformed"
    assert troubles(kept.cache) == []


def test_an_empty_file_stays_empty(tmp_path: Path) -> None:
    (tmp_path / "cache.sqlite").touch()
    for verify in (False, True):
        assert facts(kept.cache, Asked(verify=verify))["values"].startswith("none yet")
        assert troubles(kept.cache) == []
    assert [(p.name, p.stat().st_size) for p in tmp_path.iterdir()] == [("cache.sqlite", 0)]


def test_looking_writes_nothing(filled: Path, tmp_path: Path) -> None:
    before = state(tmp_path)
    assert facts(kept.cache)["checked"] == "3 values, 0 damaged"
    assert {p.name for p in tmp_path.iterdir()} == {"cache.sqlite"}
    assert state(tmp_path) == before


def test_what_a_killed_run_left_is_counted_and_left(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LogpCache(filled) as cache:
        cache.put({b"k" * 32: torch.ones(2)}, "f" * 64)
        shutil.copytree(tmp_path, tmp_path / "left")  # as the disk is while the log is not yet in the file
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "left" / "cache.sqlite"))
    before = state(tmp_path / "left")
    assert "cache.sqlite-wal" in before
    assert facts(kept.cache)["values"] == "4 of 1 reference"
    assert state(tmp_path / "left") == before


def forbid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in a folder can be looked at, as where its rights lack x."""
    true = Path.stat

    def stat(self: Path, **given: Any) -> os.stat_result:
        if folder in self.parents:
            raise PermissionError(13, "Permission denied", str(self))
        return true(self, **given)

    monkeypatch.setattr(Path, "stat", stat)


def test_a_cache_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "LOW", 0)
    forbid(tmp_path / "locked", monkeypatch)
    path = tmp_path / "locked" / "of" / "cache.sqlite"
    monkeypatch.setenv("ALIGNKIT_CACHE", str(path))
    what = f"{path} cannot be read or written: Permission denied"
    assert one(kept.cache) == ("problem", what, f"mend its rights, or {ELSEWHERE}")
    (found,) = (t for t in troubles(kept.disks) if t.severity == "problem")
    assert found.what.startswith("reference cache cannot be read or written: ")
    assert "Permission denied" in found.what
    assert found.remedy == f"mend its rights, or {ELSEWHERE}"
    assert {"runs", "temporary files"} <= facts(kept.disks).keys()


def test_a_cache_without_rights(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == filled and mode & os.R_OK))
    found = one(kept.cache)
    assert (found.severity, found.what) == ("problem", f"{filled} cannot be read or written")


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> Path:
        if str(self).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return self

    monkeypatch.delenv("ALIGNKIT_CACHE")
    monkeypatch.setattr(Path, "expanduser", refused)
    assert one(kept.cache).what == "the cache has no place: Could not determine home directory."
    assert any(t.what.startswith("reference cache cannot be read or written: ") for t in troubles(kept.disks))
    assert {"runs", "temporary files"} <= facts(kept.disks).keys()


def test_a_cache_that_is_held_is_not_waited_for(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_PATIENCE", 0.01)
    holder = sqlite3.connect(filled, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    found = one(kept.cache)
    holder.close()
    assert found.severity == "warn"
    assert "another process writes to the cache" in found.what


def test_a_cache_on_a_network(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "filesystem", lambda path: "nfs4")
    assert "network file system (nfs4)" in one(kept.cache).what


def test_the_file_system_of_this_folder_is_known(tmp_path: Path) -> None:
    if Path("/proc/mounts").is_file():
        assert kept.filesystem(Path("/proc/self")) == "proc"
        assert kept.filesystem(tmp_path / "not/there") not in (None, "proc")


@pytest.mark.parametrize(("free", "severities"), [(6, []), (3, ["warn"]), (0.5, ["problem"])])
def test_disks(free: float, severities: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(free * 2**30)))
    found = troubles(kept.disks)
    assert sorted({t.severity for t in found}) == severities
    assert len(facts(kept.disks)) == 4


def test_runs_that_are_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "LOW", 0)
    (tmp_path / "file").write_text("")
    found = one(kept.disks, Asked(runs=tmp_path / "file" / "runs"))
    assert found == ("problem", f"runs: {tmp_path}/file is not a folder", "mend its rights, or choose another `output`")


def test_of_two_mounts_at_one_place_the_last_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Path, "read_text", lambda self: f"auto {tmp_path} autofs rw 0 0\nhost:/x {tmp_path} nfs4 rw 0 0\n"
    )
    assert kept.filesystem(tmp_path / "x") == "nfs4"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert f"runs: {tmp_path} cannot be written" in [t.what for t in troubles(kept.disks)]
