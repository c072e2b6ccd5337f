"""A run goes on where its reference cache is damaged, full, locked or read-only."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import alignkit
from alignkit import databases
from alignkit.errors import CacheError
from alignkit.reference import cache as cache_module
from alignkit.reference.cache import LogpCache
from alignkit.reference.run_cache import RunCache
from alignkit.runs.folder import read_metrics
from helpers import make_rows

REFERENCE = "f" * 64
VALUES = {bytes([i]) * 32: torch.arange(50.0) + i for i in range(200)}
KEYS = list(VALUES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A cache of 200 values."""
    with LogpCache(tmp_path / "cache.sqlite") as cache:
        cache.put(VALUES, REFERENCE)
    assert not (tmp_path / "cache.sqlite-wal").exists()
    return tmp_path / "cache.sqlite"


def in_the_middle(raw: bytes) -> bytes:
    return raw[:8192] + b"\xa5" * (len(raw) - 12288) + raw[-4096:]


def whole(found: dict[bytes, torch.Tensor]) -> bool:
    return found.keys() == VALUES.keys() and all(torch.equal(found[k], v) for k, v in VALUES.items())


@pytest.mark.parametrize(
    "damage",
    [
        in_the_middle,
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:5000],
        lambda raw: raw[:100],
        lambda raw: bytes(len(raw)),
        lambda raw: b"\xa5" * 64 + raw[64:],
    ],
    ids=["middle", "half", "two pages", "header", "zeros", "no header"],
)
def test_a_damaged_file_is_set_aside_and_built_anew(
    damage: Callable[[bytes], bytes], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(damaged := damage(path.read_bytes()))
    cache = RunCache(path)
    cache.use(REFERENCE)
    found = cache.get(KEYS)
    assert all(torch.equal(VALUES[k], v) for k, v in found.items())  # never a wrong value
    cache.put({k: v for k, v in VALUES.items() if k not in found}, REFERENCE)
    assert whole(cache.get(KEYS))
    cache.close()
    (said,) = caplog.messages
    (aside,) = path.parent.glob("cache.sqlite.damaged-*[0-9]")
    assert str(aside) in said
    assert str(path) in said
    assert aside.stat().st_size == len(damaged)
    with LogpCache(path) as rebuilt:
        assert whole(rebuilt.get(KEYS))


def test_an_empty_file_is_a_new_cache(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b"")
    cache = RunCache(path)
    assert cache.get(KEYS) == {}
    cache.put(VALUES, REFERENCE)
    assert whole(cache.get(KEYS))
    assert caplog.messages == []


@pytest.mark.parametrize("content", [b"prompt,chosen,rejected\n" * 400, b"short", b"\x93NUMPY" + bytes(9000)])
def test_a_file_that_was_never_a_cache_is_left_alone(
    content: bytes, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(content)
    cache = RunCache(path)
    cache.put(VALUES, REFERENCE)
    assert whole(cache.get(KEYS))
    (said,) = caplog.messages
    assert str(path) in said
    assert "The run continues without it" in said
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_another_programs_database_is_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    before = path.read_bytes()
    cache = RunCache(path)
    cache.put(VALUES, REFERENCE)
    assert whole(cache.get(KEYS))
    assert len(caplog.messages) == 1
    assert path.read_bytes() == before


def test_a_file_that_another_process_has_set_aside_is_not_renamed_twice(path: Path) -> None:
    path.write_bytes(in_the_middle(path.read_bytes()))
    first, second = RunCache(path), RunCache(path)
    for cache in (first, second):
        cache.use(REFERENCE)  # both have the damaged file open
    for cache in (first, second):
        cache.get(KEYS)
        cache.put(VALUES, REFERENCE)
    assert whole(first.get(KEYS))
    assert whole(second.get(KEYS))
    assert len(list(path.parent.glob("*.damaged-*[0-9]"))) == 1


def test_a_full_disk_leaves_what_is_read_and_keeps_what_is_new(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_up = LogpCache._set_up

    def small(self: LogpCache) -> None:
        set_up(self)
        self._db.execute("PRAGMA max_page_count = 1")

    monkeypatch.setattr(LogpCache, "_set_up", small)
    new = {bytes([i, 1]) * 16: torch.full((5000,), float(i)) for i in range(3)}
    cache = RunCache(path)
    for _ in range(2):
        cache.put(new, REFERENCE)
    assert cache.stores is False
    found = cache.get([*KEYS, *new])
    assert all(torch.equal(found[k], v) for k, v in (VALUES | new).items())
    assert cache.misses == 0
    (said,) = caplog.messages
    assert "database or disk is full" in said


def test_a_lock_that_is_held_for_too_long_costs_one_wait(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_module, "WAIT", 0.2)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    cache = RunCache(path)
    assert whole(cache.get(KEYS))  # readers do not wait for a writer
    new = {b"n" * 32: torch.ones(3)}
    cache.put(new, REFERENCE)
    cache.put(new, REFERENCE)
    assert torch.equal(cache.get([b"n" * 32])[b"n" * 32], torch.ones(3))
    (said,) = caplog.messages
    assert "locked" in said
    other.close()


@pytest.mark.parametrize("write_fails", [True, False])
def test_a_disk_that_fails(
    write_fails: bool, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise CacheError("the reference cache failed: attempt to write a readonly database")

    monkeypatch.setattr(LogpCache, "put" if write_fails else "get", fails)
    cache = RunCache(path)
    cache.put({b"n" * 32: torch.ones(3)}, REFERENCE)
    assert set(cache.get([KEYS[0]])) == ({KEYS[0]} if write_fails else set())
    cache.put({b"m" * 32: torch.ones(3)}, REFERENCE)
    assert set(cache.get([b"m" * 32])) == {b"m" * 32}
    assert len(caplog.messages) == 1


def test_a_file_that_is_damaged_again_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: Any) -> None:
        raise databases.DamagedError("damaged")

    monkeypatch.setattr(LogpCache, "get", damaged)
    cache = RunCache(path)
    assert cache.get(KEYS) == {}
    cache.put(VALUES, REFERENCE)
    assert whole(cache.get(KEYS))
    assert len(list(path.parent.glob("*.damaged-*[0-9]"))) == 1


# Whole runs


@pytest.fixture
def settings(tiny: str, tmp_path: Path) -> dict[str, Any]:
    given = {"max_steps": 4, "batch_size": 4, "eval_fraction": 0, "device": "cpu", "learning_rate": 0.01}
    return given | {"model": tiny, "output": tmp_path / "runs", "cache_file": tmp_path / "c.sqlite"}


def losses(result: Any) -> list[float]:
    return [line["loss"] for line in read_metrics(result.folder)]


def test_a_run_without_room_for_its_cache_is_the_same_run(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows("pairs", 8)
    wanted = losses(alignkit.run("dpo", data=rows, **settings))

    def full(*_: Any) -> None:
        raise CacheError("the reference cache failed: database or disk is full")

    monkeypatch.setattr(LogpCache, "put", full)
    assert losses(alignkit.run("dpo", data=rows, **settings | {"cache_file": settings["output"] / "new"})) == wanted


def test_a_cache_that_is_lost_after_the_reference_saves_the_state_and_resumes(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows("pairs", 8)
    wanted = losses(alignkit.run("dpo", data=rows, **settings))
    settings |= {"cache_file": settings["output"] / "new"}
    get, calls = LogpCache.get, itertools.count()

    def damaged(self: LogpCache, keys: Any) -> Any:
        if next(calls) == 3:  # the fill looks them up once, then each step does
            raise databases.DamagedError("pages contradict each other")
        return get(self, keys)

    with monkeypatch.context() as patched:
        patched.setattr(LogpCache, "get", damaged)
        with pytest.raises(CacheError, match=r"(?s)was unloaded.*Stopped after step 2; continue with") as caught:
            alignkit.run("dpo", data=rows, name="lost", **settings)
    assert "--resume" in str(caught.value)
    assert losses(alignkit.run("dpo", data=rows, name="lost", resume=True, **settings)) == wanted
