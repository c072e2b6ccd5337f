"""`alignkit doctor` on the machine: devices, what computes on them, the reference cache, disks."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doctors import facts, fill, one, set_apart, spoil, troubles

import alignkit_kernels
from alignkit.errors import CacheError
from alignkit.insight.doctor import Asked, computing, container, kept, machine
from alignkit.insight.doctor.parts import Fact, Trouble
from alignkit.logpcache import LogpCache


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_apart(tmp_path, monkeypatch)


# ------------------------------------------------------------------------------------------------------- devices


def test_the_devices_of_this_machine() -> None:
    found = facts(machine.devices)
    assert "cores" in found["processor"]
    assert re.fullmatch(r"[\d.e+]+ [GM]iB, [\d.e+]+ [GM]iB free", found["memory"])


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.sessions.cores", lambda: 2)
    monkeypatch.setattr(container, "cores", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert Trouble(
        "warn", "torch uses 64 threads on 2 cores, which is slower than one for each", "export OMP_NUM_THREADS=2"
    ) in troubles(machine.devices)


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LITTLE", 2**60)
    assert any("of memory are free" in t.what for t in troubles(machine.devices))


MIB = 2**20
TREES: dict[str, tuple[str, dict[str, dict[str, object]]]] = {
    "version 2": (
        "0::/",
        {
            "": {
                "memory.max": 64 * MIB,
                "memory.current": 60 * MIB,
                "memory.stat": f"anon 1\ninactive_file {36 * MIB}\n",
            }
        },
    ),
    "version 2, a limit further out": (
        "0::/job/step",
        {
            "job/step": {"memory.max": "max", "memory.current": 30 * MIB, "memory.stat": "inactive_file 0"},
            "job": {"memory.max": 64 * MIB, "memory.current": 60 * MIB, "memory.stat": f"inactive_file {36 * MIB}"},
        },
    ),
    "version 1": (
        "4:memory:/docker/of-the-host\n1:cpu,cpuacct:/docker/of-the-host\n0::/",
        {
            "memory": {
                "memory.limit_in_bytes": 64 * MIB,
                "memory.usage_in_bytes": 60 * MIB,
                "memory.stat": f"inactive_file 7\ntotal_inactive_file {36 * MIB}",
            },
        },
    ),
    "version 1, a limit further in": (
        "4:memory:/job",
        {
            "memory": {"memory.limit_in_bytes": 9223372036854771712, "memory.usage_in_bytes": 90 * MIB},
            "memory/job": {
                "memory.limit_in_bytes": 64 * MIB,
                "memory.usage_in_bytes": 60 * MIB,
                "memory.stat": f"total_inactive_file {36 * MIB}",
            },
        },
    ),
}


def grow(own: str, tree: dict[str, dict[str, object]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant control groups."""
    for group, files in tree.items():
        (folder / "groups" / group).mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / "groups" / group / name).write_text(f"{value}\n")
    (folder / "own").write_text(own)
    monkeypatch.setattr(container, "GROUPS", folder / "groups")
    monkeypatch.setattr(container, "OWN", folder / "own")


@pytest.mark.parametrize("name", TREES)
def test_the_memory_of_a_container(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grow(*TREES[name], tmp_path, monkeypatch)
    assert facts(machine.devices)["memory"] == "64 MiB, 40 MiB free"  # 64 - (60 - 36)


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        ({"memory.max": 64 * MIB}, "64 MiB, 64 MiB free"),
        ({"memory.max": 64 * MIB, "memory.current": 99 * MIB}, "64 MiB, 0 bytes free"),
        ({"memory.max": "max", "memory.current": 9 * MIB}, None),
        ({"memory.limit_in_bytes": 9223372036854771712, "memory.usage_in_bytes": 9 * MIB}, None),
        ({"memory.max": 64 * MIB, "memory.current": 1, "memory.stat": "inactive_file odd"}, "unknown: ValueError: "),
    ],
)
def test_limits_that_are_none_or_cannot_be_read(
    files: dict[str, object], shown: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow("0::/", {"": files}, tmp_path, monkeypatch)
    found = facts(machine.devices)
    assert found["memory"].startswith(shown) if shown else "GiB, " in found["memory"]
    assert "processor" in found


@pytest.mark.parametrize(
    ("own", "tree", "cores"),
    [
        ("0::/", {"": {"cpu.max": "150000 100000"}}, 1.5),
        ("0::/", {"": {"cpu.max": "max 100000"}}, None),
        ("0::/a", {"": {"cpu.max": "200000 100000"}, "a": {"cpu.max": "300000 100000"}}, 2),
        ("1:cpu,cpuacct:/", {"cpu": {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"}}, 1.5),
        ("1:cpu,cpuacct:/", {"cpu": {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}}, None),
        ("", {}, None),
    ],
)
def test_the_cores_of_a_container(
    own: str, tree: dict[str, dict[str, object]], cores: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(own, tree, tmp_path, monkeypatch)
    assert container.cores() == cores
    monkeypatch.setattr("alignkit.sessions.cores", lambda: 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    said = facts(machine.devices)["processor"]
    assert ("by a container's limit" in said) is (cores is not None)
    assert [t.remedy for t in troubles(machine.devices) if "threads on" in t.what] == (
        ["export OMP_NUM_THREADS=2"] if cores else []
    )


@pytest.mark.parametrize(
    ("cuda", "said"), [(None, "built for the CPU alone"), ("13.0", "torch for CUDA 13.0 cannot use it")]
)
def test_a_gpu_that_torch_cannot_use(cuda: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_driver", lambda: ("580.65", ""))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert any(t.severity == "problem" and said in t.what for t in troubles(machine.devices))
    assert facts(machine.devices)["NVIDIA driver"] == "580.65"


def test_a_gpu_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(name="A thing", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (10 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert facts(machine.devices)["GPU 0"] == "A thing, capability 9.0, 80 GiB, 10 GiB free"
    assert any("more than half of its memory is in use" in t.what for t in troubles(machine.devices))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (70 * 2**30, 80 * 2**30))
    assert not any("in use already" in t.what for t in troubles(machine.devices))


def test_a_gpu_of_another_make_than_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_driver", lambda: ("580.65", ""))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert any(t.what.endswith("this torch is built for ROCm 7.1") for t in troubles(machine.devices))


def test_gpus_that_are_hidden_are_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_driver", lambda: ("580.65", ""))
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert facts(machine.devices)["GPU"] == "none: CUDA_VISIBLE_DEVICES hides them"
    assert not [t for t in troubles(machine.devices) if t.severity == "problem"]
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "_driver", lambda: ("", ""))
    assert facts(machine.devices)["GPU"] == "none that torch can use: runs go to the CPU"


def test_one_gpu_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def about(i: int) -> Any:
        if i == 0:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")
        return SimpleNamespace(name="A thing", major=9, minor=0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (70 * 2**30, 80 * 2**30))
    assert "GPU 1" in facts(machine.devices)
    what = "GPU 0 cannot be used: RuntimeError: CUDA error: uncorrectable ECC error encountered"
    assert what in [t.what for t in troubles(machine.devices) if t.severity == "problem"]


@pytest.mark.parametrize(
    ("code", "said", "driver", "complaint"),
    [
        (0, "580.65.06\n580.65.06\n", "580.65.06", ""),
        (0, "No devices were found\n", "", "No devices were found"),
        (18, "Failed to initialize NVML: Driver/library version mismatch\nmore", "", "Failed to initialize NVML: "),
        (9, "", "", "it says nothing"),
    ],
)
def test_what_nvidia_smi_says(
    code: int, said: str, driver: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = SimpleNamespace(returncode=code, stdout=said, stderr="")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ran)
    found = machine._driver()
    assert found[0] == driver
    assert found[1].startswith(complaint)
    assert any("nvidia-smi fails: " in t.what for t in troubles(machine.devices)) is bool(complaint)


def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any, **__: Any) -> Any:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", late)
    assert machine._driver()[0] == ""
    assert "timed out after 20 seconds" in machine._driver()[1]


# ----------------------------------------------------------------------------------------- kernels and attention


def test_the_kernels_of_a_cpu() -> None:
    assert facts(computing.kernels)["on cpu"] == "plain PyTorch: Triton is for GPUs"
    assert troubles(computing.kernels) == []


def test_kernels_that_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNKIT_KERNELS", "eager")
    assert facts(computing.kernels)["on cpu"] == "plain PyTorch, by ALIGNKIT_KERNELS"
    for value in ("egaer", "triton"):  # misspelt; and there is no GPU, nor the interpreter
        monkeypatch.setenv("ALIGNKIT_KERNELS", value)
        found = one(computing.kernels)
        assert (found.severity, found.remedy) == ("problem", "unset ALIGNKIT_KERNELS")


def test_a_device_on_which_nothing_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    true = torch.empty

    def empty(*given: Any, device: Any, **named: Any) -> Any:
        if torch.device(device).type == "cuda":
            raise RuntimeError("CUDA error: out of memory\nmore")
        return true(*given, device=device, **named)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "empty", empty)
    assert one(computing.kernels).what == "computing on cuda:0 fails: RuntimeError: CUDA error: out of memory"
    assert "on cpu" in facts(computing.kernels)


def test_kernels_that_are_forced_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "empty", lambda *given, device, **named: SimpleNamespace(
        is_cuda=torch.device(device).type == "cuda", dtype=torch.float32, device=device
    ))  # fmt: skip
    monkeypatch.setenv("ALIGNKIT_KERNELS", "triton")
    runtime = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    monkeypatch.setattr("alignkit_kernels.backend.triton", SimpleNamespace(knobs=runtime, __version__="3.7.1"))
    monkeypatch.setattr(computing, "_compiler", lambda: True)
    monkeypatch.setattr(computing, "_tried", lambda *_: iter(()))
    assert list(computing.kernels(Asked())) == [
        Fact("on cpu", "nothing: ALIGNKIT_KERNELS=triton is for GPUs"),
        Fact("on cuda:0", "Triton 3.7.1, by ALIGNKIT_KERNELS"),
    ]


@pytest.mark.parametrize(
    ("there", "headers", "found"),
    [({"gcc"}, True, True), ({"clang"}, True, True), ({"cc"}, True, False), ({"gcc"}, False, False)],
)
def test_what_triton_compiles_with(
    there: set[str], headers: bool, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr("sysconfig.get_default_scheme", lambda: "posix_local")  # Debian's: its folder has no headers
    folders = {"posix_prefix": {"include": str(tmp_path)}, "posix_local": {"include": "/nowhere"}}
    monkeypatch.setattr("sysconfig.get_paths", folders.__getitem__)
    if headers:
        (tmp_path / "Python.h").touch()
    assert computing._compiler() is found


def test_kernels_that_are_wrong_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    true = alignkit_kernels.selective_logps
    monkeypatch.setattr(alignkit_kernels, "selective_logps", lambda logits, targets: true(logits, targets) + 1e-3)
    assert "are 0.001 nats off" in one(computing.kernels).what

    def refused(logits: Any, targets: Any) -> Any:
        raise RuntimeError("no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(alignkit_kernels, "selective_logps", refused)
    assert one(computing.kernels).what.endswith("no kernel image is available for execution on the device")


def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit_kernels.backend.uses_triton", lambda values: True)
    runtime = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    monkeypatch.setattr("alignkit_kernels.backend.triton", SimpleNamespace(knobs=runtime, __version__="3.7.1"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C compiler" in one(computing.kernels).what
    runtime.runtime.interpret = True
    assert "hundreds of times slower" in one(computing.kernels).what


@pytest.mark.slow
def test_the_interpreter_is_found_out() -> None:
    given = {**os.environ, "TRITON_INTERPRET": "1", "ALIGNKIT_KERNELS": "triton", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-m", "alignkit", "doctor"], capture_output=True, text=True, env=given, check=False
    )
    assert ran.returncode == 1, ran.stderr
    assert "problem: the kernels on cpu run in Triton's interpreter" in ran.stdout
    assert "warn: TRITON_INTERPRET is set" in ran.stdout
    assert ran.stderr == ""


def test_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts(computing.attention)["of a Llama on cpu"].startswith("alignkit_branches, branch by branch")
    assert troubles(computing.attention) == []
    monkeypatch.setattr("alignkit.insight.places.device", lambda: torch.device("cuda"))
    assert facts(computing.attention)["of a Llama on cuda"].startswith("flex_attention, ")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert one(computing.attention).remedy == "unset TORCHDYNAMO_DISABLE"


# --------------------------------------------------------------------------------------------------------- cache


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
