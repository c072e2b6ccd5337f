"""`alignkit doctor` on devices, kernels and attention."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doctors import facts, isolate, one, troubles

import alignkit_kernels
from alignkit.insight.doctor import devices, kernels
from alignkit.insight.doctor.attention import attention
from alignkit.insight.doctor.probe import Fact, Trouble


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(tmp_path, monkeypatch)


# ------------------------------------------------------------------------------------------------------- devices


def test_the_devices_of_this_machine() -> None:
    found = facts(devices.devices)
    assert "cores" in found["processor"]
    assert re.fullmatch(r"[\d.e+]+ [GM]iB, [\d.e+]+ [GM]iB free", found["memory of the machine"])


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (
            {torch.float32: 0.42, torch.bfloat16: 0.1},
            "4.2 times as fast as in float32: runs on this CPU are faster with",
        ),
        (
            {torch.float32: 0.1, torch.bfloat16: 0.2},
            "0.5 times as fast as in float32: runs on this CPU are best left in",
        ),
    ],
)
def test_it_says_whether_bf16_pays_on_this_cpu(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[torch.dtype, float], said: str
) -> None:
    assert devices._product_seconds(torch, torch.bfloat16) > 0
    monkeypatch.setattr(devices, "_product_seconds", lambda _, dtype: seconds[dtype])
    assert facts(devices.devices)["products in bf16"].startswith(said)


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.runs.sessions.cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert Trouble(
        "warn", "torch uses 64 threads on 2 cores, which is slower than one for each", "export OMP_NUM_THREADS=2"
    ) in troubles(devices.devices)


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "LITTLE", 2**60)
    assert any("of memory is free" in t.what for t in troubles(devices.devices))


@pytest.mark.parametrize(
    ("cuda", "message"), [(None, "built for the CPU alone"), ("13.0", "torch for CUDA 13.0 cannot use it")]
)
def test_a_gpu_that_torch_cannot_use(cuda: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_driver", lambda: ("580.65", ""))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert any(t.severity == "problem" and message in t.what for t in troubles(devices.devices))
    assert facts(devices.devices)["NVIDIA driver"] == "580.65"


def test_a_gpu_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(name="A thing", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (10 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert facts(devices.devices)["GPU 0"] == "A thing, capability 9.0, 80 GiB, 10 GiB free"
    assert any("more than half of its memory is in use" in t.what for t in troubles(devices.devices))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (70 * 2**30, 80 * 2**30))
    assert not any("in use already" in t.what for t in troubles(devices.devices))


def test_a_gpu_of_another_make_than_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_driver", lambda: ("580.65", ""))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert any(t.what.endswith("this torch is built for ROCm 7.1") for t in troubles(devices.devices))


def test_gpus_that_are_hidden_are_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_driver", lambda: ("580.65", ""))
    for value in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert facts(devices.devices)["GPU"] == "none: CUDA_VISIBLE_DEVICES hides any"
        assert not [t for t in troubles(devices.devices) if t.severity == "problem"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(devices, "_driver", lambda: ("", ""))
    assert facts(devices.devices)["GPU"] == "none that torch can use: runs use the CPU"


def test_one_gpu_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def about(i: int) -> Any:
        if i == 0:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")
        return SimpleNamespace(name="A thing", major=9, minor=0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (70 * 2**30, 80 * 2**30))
    assert "GPU 1" in facts(devices.devices)
    what = "GPU 0 cannot be used: RuntimeError: CUDA error: uncorrectable ECC error encountered"
    assert what in [t.what for t in troubles(devices.devices) if t.severity == "problem"]


@pytest.mark.parametrize(
    ("code", "printed", "driver", "failure"),
    [
        (0, "580.65.06\n580.65.06\n", "580.65.06", ""),
        (0, "No devices were found\n", "", "No devices were found"),
        (18, "Failed to initialize NVML: Driver/library version mismatch\nmore", "", "Failed to initialize NVML: "),
        (9, "", "", "it printed nothing"),
    ],
)
def test_the_output_of_nvidia_smi(
    code: int, printed: str, driver: str, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = SimpleNamespace(returncode=code, stdout=printed, stderr="")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ran)
    found = devices._driver()
    assert found[0] == driver
    assert found[1].startswith(failure)
    assert any("nvidia-smi fails: " in t.what for t in troubles(devices.devices)) is bool(failure)


def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any, **__: Any) -> Any:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", late)
    assert devices._driver()[0] == ""
    assert "timed out after 20 seconds" in devices._driver()[1]


# ----------------------------------------------------------------------------------------- kernels and attention


def test_the_kernels_of_a_cpu() -> None:
    assert facts(kernels.kernels)["on cpu"] == "plain PyTorch: Triton is for GPUs"
    assert troubles(kernels.kernels) == []


def test_kernels_that_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNKIT_KERNELS", "eager")
    assert facts(kernels.kernels)["on cpu"] == "plain PyTorch, by ALIGNKIT_KERNELS"
    for value in ("egaer", "triton"):  # misspelt; and there is no GPU, nor the interpreter
        monkeypatch.setenv("ALIGNKIT_KERNELS", value)
        found = one(kernels.kernels)
        assert (found.severity, found.remedy) == ("problem", "unset ALIGNKIT_KERNELS")


def test_a_device_on_which_nothing_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    true = torch.empty

    def empty(*given: Any, device: Any, **named: Any) -> Any:
        if torch.device(device).type == "cuda":
            raise RuntimeError("CUDA error: out of memory\nmore")
        return true(*given, device=device, **named)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "empty", empty)
    assert one(kernels.kernels).what == "computing on cuda:0 fails: RuntimeError: CUDA error: out of memory"
    assert "on cpu" in facts(kernels.kernels)


def test_kernels_that_are_forced_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "empty", lambda *given, device, **named: SimpleNamespace(
        is_cuda=torch.device(device).type == "cuda", dtype=torch.float32, device=device
    ))  # fmt: skip
    monkeypatch.setenv("ALIGNKIT_KERNELS", "triton")
    runtime = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    monkeypatch.setattr("alignkit_kernels.backend.triton", SimpleNamespace(knobs=runtime, __version__="3.7.1"))
    monkeypatch.setattr(kernels, "_has_compiler", lambda: True)
    monkeypatch.setattr(kernels, "_check", lambda *_: iter(()))
    assert list(kernels.kernels()) == [
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
    assert kernels._has_compiler() is found


def test_kernels_that_are_wrong_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    true = alignkit_kernels.selective_logps
    monkeypatch.setattr(alignkit_kernels, "selective_logps", lambda logits, targets: true(logits, targets) + 1e-3)
    assert "are wrong by 0.001 nats" in one(kernels.kernels).what

    def refused(logits: Any, targets: Any) -> Any:
        raise RuntimeError("no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(alignkit_kernels, "selective_logps", refused)
    assert one(kernels.kernels).what.endswith("no kernel image is available for execution on the device")


def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit_kernels.backend.uses_triton", lambda values: True)
    runtime = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    monkeypatch.setattr("alignkit_kernels.backend.triton", SimpleNamespace(knobs=runtime, __version__="3.7.1"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C compiler" in one(kernels.kernels).what
    runtime.runtime.interpret = True
    assert "hundreds of times slower" in one(kernels.kernels).what


@pytest.mark.slow
def test_the_interpreter_is_found_out() -> None:
    given = {**os.environ, "TRITON_INTERPRET": "1", "ALIGNKIT_KERNELS": "triton", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-m", "alignkit", "doctor"], capture_output=True, text=True, env=given, check=False
    )
    assert ran.returncode == 1, ran.stderr
    assert "problem: the kernels on cpu run in Triton's interpreter" in ran.stdout
    assert ran.stderr == ""


def test_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts(attention)["of a Llama on cpu"].startswith("alignkit_branches, branch by branch")
    assert troubles(attention) == []
    monkeypatch.setattr("alignkit.insight.model_paths.device", lambda: torch.device("cuda"))
    assert facts(attention)["of a Llama on cuda"].startswith("flex_attention, ")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert one(attention).remedy == "unset TORCHDYNAMO_DISABLE"
