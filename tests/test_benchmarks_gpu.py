"""The benchmarks for GPUs: gpu.sh with its stages, on a CPU at the smallest size, and what their reports compare."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import SCRIPTS, executable, needs_timeout, rows


def gpu_sh(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "STAGES": "", "TINY": "", "TRL_PYTHON": "", **environment}
    command = [str(SCRIPTS / "gpu.sh"), str(out), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@needs_timeout
def test_all_stages_of_gpu_sh_with_engine_gpu_online_gpu_and_kernels(tmp_path: Path) -> None:
    from alignkit_kernels.bench import cases

    done = gpu_sh(tmp_path, TINY="1", PYTHON=sys.executable, TRL_PYTHON="none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in (tmp_path / "tests.log").read_text()
    kernels = (tmp_path / "kernels.log").read_text()
    assert all(f"\n{name} " in kernels for name in cases.NAMES)
    engine = (tmp_path / "engine.log").read_text()
    for name in ("llama-3.2-1b  lora", "llama-3.2-1b  full", "qwen3-0.6b    lora", "qwen3-0.6b    full"):
        rows(engine, f"{name}  alignkit")
    assert len(json.loads((tmp_path / "engine.json").read_text())["runs"]) == 4
    rows((tmp_path / "online.log").read_text(), "alignkit", "alignkit-transformers")
    online = json.loads((tmp_path / "online.json").read_text())["table"]
    assert all(row["sampled_per_second"] > 0 and row["learning_to_trl"] is None for row in online.values())
    ended = (tmp_path / "versions.txt").read_text()
    assert all(f"\n{stage}: done in " in ended for stage in ("tests", "kernels", "engine", "online"))
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"]


@needs_timeout
@pytest.mark.parametrize(
    ("stages", "seconds"),
    [
        ("", {"tests": 144, "kernels": 156, "engine": 180, "online": 120}),
        ("kernels", {"kernels": 600}),
        ("engine tests", {"tests": 266, "engine": 333}),
        ("online engine", {"engine": 360, "online": 240}),
    ],
)
def test_the_stages_that_are_named_share_all_the_time(stages: str, seconds: dict[str, int], tmp_path: Path) -> None:
    python = executable(tmp_path / "python", '[ "$1" = - ] && exec cat >/dev/null\necho "ran $*"')
    done = gpu_sh(tmp_path / "out", "10", STAGES=stages, PYTHON=str(python))
    assert done.returncode == 0
    logs = {name: tmp_path / "out" / f"{name}.log" for name in ("tests", "kernels", "engine", "online")}
    for name in logs:
        assert (f"== {name}, at most {seconds.get(name)} s" in done.stdout) == (name in seconds)
    for name in seconds.keys() - {"tests"}:
        assert f"--minutes {seconds[name] * 0.8 / 60:.2f}" in logs[name].read_text()
    if "tests" in seconds:
        assert logs["tests"].read_text().strip().endswith(" tests/test_gpu.py kernels/tests")
    if "kernels" in seconds:
        assert f"--png {tmp_path / 'out' / 'kernels.png'}" in logs["kernels"].read_text()
    for name in seconds.keys() & {"engine", "online"}:
        assert f"--trl-python {python}" in logs[name].read_text()


@needs_timeout
def test_no_stage_has_four_minutes_of_the_twelve_that_are_the_default(tmp_path: Path) -> None:
    python = executable(tmp_path / "python", '[ "$1" = - ] && exec cat >/dev/null\necho "ran $*"')
    done = gpu_sh(tmp_path / "out", PYTHON=str(python))
    limits = [int(seconds) for seconds in re.findall(r"^== \w+, at most (\d+) s$", done.stdout, re.MULTILINE)]
    assert len(limits) == 4
    assert max(limits) < 240
    assert 700 < sum(limits) <= 720


@needs_timeout
def test_a_killed_gpu_sh_has_told_the_stages_that_ended(tmp_path: Path) -> None:
    body = (
        '[ "$1" = - ] && exec cat >/dev/null\ncase "$*" in *engine_gpu.py*) kill -KILL "$GPU_SH" ;; esac\necho "ran $*"'
    )
    python = executable(tmp_path / "python", body)
    starter = executable(tmp_path / "starter", f'GPU_SH=$$ exec "{SCRIPTS / "gpu.sh"}" "{tmp_path / "out"}"')
    env = {**os.environ, "STAGES": "", "TINY": "", "TRL_PYTHON": "none", "PYTHON": str(python)}
    assert subprocess.run([str(starter)], env=env, capture_output=True, check=False).returncode == -signal.SIGKILL
    ended = (tmp_path / "out" / "versions.txt").read_text()
    assert "\nkernels: done in " in ended
    assert "engine: " not in ended


@needs_timeout
def test_a_stage_that_fails_stops_no_other_and_is_no_success(tmp_path: Path) -> None:
    body = '[ "$1" = - ] && exec cat >/dev/null\ncase "$*" in *kernels.py*|*find_spec*) exit 3 ;; esac\necho "ran $*"'
    python = executable(tmp_path / "python", body)
    done = gpu_sh(tmp_path / "out", PYTHON=str(python))
    assert done.returncode == 1
    assert "kernels: exit code 3 after" in done.stdout
    assert "engine: done in" in done.stdout
    assert "kernels: exit code 3 after" in (tmp_path / "out" / "versions.txt").read_text()
    assert "--trl-python" not in (tmp_path / "out" / "engine.log").read_text()


@needs_timeout
def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    done = gpu_sh(tmp_path, STAGES="kernel")
    assert done.returncode == 2
    assert "unknown stage 'kernel'; choose from tests, kernels, engine and online" in done.stderr


def test_engine_gpu_measures_the_most_informative_first(script: Any) -> None:
    engine_gpu = script("engine_gpu")
    names = engine_gpu.in_order(list(engine_gpu.MODELS), list(engine_gpu.MODES), list(engine_gpu.CONTENDERS))
    assert names == [
        "llama-3.2-1b:lora:alignkit", "llama-3.2-1b:lora:trl", "llama-3.2-1b:full:alignkit", "llama-3.2-1b:full:trl",
        "qwen3-0.6b:lora:alignkit", "qwen3-0.6b:lora:trl", "qwen3-0.6b:full:alignkit", "qwen3-0.6b:full:trl",
        "llama-3.2-1b:lora:trl-full-logits", "llama-3.2-1b:full:trl-full-logits",
        "qwen3-0.6b:lora:trl-full-logits", "qwen3-0.6b:full:trl-full-logits",
    ]  # fmt: skip


def test_online_gpu_compares_medians_with_trl_without_checkpointing(script: Any) -> None:
    online_gpu = script("online_gpu")

    def figures(*sampling: float) -> list[dict[str, Any]]:
        return [{"peak_mib": 4.0, "seconds": [{"sampling": s, "scoring": 0.0, "learning": 1.0, "step": s + 1.0}
                                              for s in sampling]}]  # fmt: skip

    runs = {"alignkit": figures(90.0, 2.0, 2.0, 8.0), "trl": figures(1.0, 6.0), "trl-checkpointing": figures(0.0, 3.0)}
    found = online_gpu.summarise(runs, online_gpu.TINY)
    assert found["alignkit"]["sampling_to_trl"] == 3.0
    assert found["alignkit"]["sampled_per_second"] == 16.0  # 2 prompts, 2 completions, 8 tokens
    assert found["trl-checkpointing"]["step_to_trl"] == 7 / 4
    assert online_gpu.report(found).count("\n") == 3
