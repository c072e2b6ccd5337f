"""vLLM servers that a run starts itself, with a double of the server in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from on_ranks import REDS, run_on, started
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_double import vllm_double

import alignkit
from alignkit.config import RunConfig
from alignkit.errors import ConfigError, RolloutError
from alignkit.models.ranks import SINGLE, Ranks
from alignkit.rollout import own_servers
from helpers import make_rows


@pytest.fixture
def own(tiny: str, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run that starts a double."""
    does = f'exec {sys.executable} {Path(__file__).with_name("vllm_double.py")} "$@"'
    rows = [{"prompt": row["prompt"]} for row in make_rows("text", 8)]
    return {
        "model": tiny, "data": rows, "output": str(tmp_path / "runs"), "name": "own", "reward": REDS, "device": "cpu",
        "group_size": 2, "batch_size": 4, "max_steps": 2, "sampling": {"max_new_tokens": 6},
        "rollout": {"backend": "vllm", "servers": 1, "program": program(tmp_path, does)},
    }  # fmt: skip


def program(folder: Path, does: str) -> str:
    """A program in the place of vllm."""
    path = folder / "vllm"
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return str(path)


def config_of(settings: dict[str, Any]) -> RunConfig:
    return RunConfig(**{k: v for k, v in settings.items() if k != "group_size"}, method="grpo")


def ports(run: Path) -> list[int]:
    """The ports of a run's servers."""
    return sorted(int(log.stem.removeprefix("vllm-")) for log in (run / "servers").glob("*.log"))


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_run_starts_its_servers_and_ends_them(own: dict[str, Any]) -> None:
    """It samples what servers of others sample for it."""
    found = alignkit.run("grpo", **own)
    assert [answers(port) for port in ports(found.folder)] == [False]
    assert yaml.safe_load((found.folder / "config.yaml").read_text())["rollout"]["urls"] == []
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(own["model"]), AutoTokenizer.from_pretrained(own["model"])
    with vllm_double(lm, tokenizer) as double:
        other = alignkit.run("grpo", **own | {"name": "url", "rollout": {"backend": "vllm", "urls": [double.url]}})
    said = [(folder / "completions.jsonl").read_text() for folder in (found.folder, other.folder)]
    assert said[0] == said[1]


@pytest.mark.slow
def test_two_ranks_share_servers_that_one_starts(own: dict[str, Any], tmp_path: Path) -> None:
    run = own | {"rollout": own["rollout"] | {"servers": 2}, "max_steps": 1}
    run_on(2, [("grpo", run)], tmp_path / "two")
    assert [answers(port) for port in ports(tmp_path / "runs" / "own")] == [False, False]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_server_ends_with_a_run_that_is_killed(own: dict[str, Any], tmp_path: Path) -> None:
    process = started(1, [("grpo", own | {"max_steps": 1000})], tmp_path / "killed")
    run, end = tmp_path / "runs" / "own", time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.1)
    (port,) = ports(run)
    assert answers(port)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    while answers(port) and time.monotonic() < end:
        time.sleep(0.1)
    assert not answers(port)


def test_servers_that_cannot_start_end_the_run_with_the_reason(own: dict[str, Any], tmp_path: Path) -> None:
    program(tmp_path, "echo planted by the test; exit 3")
    says = r"(?s)the vLLM server of port \d+ ended with exit code 3;.*planted by the test"
    with pytest.raises(RolloutError, match=says):
        alignkit.run("grpo", **own)
    missing = own | {"name": "missing", "rollout": own["rollout"] | {"program": str(tmp_path / "nothing")}}
    with pytest.raises(ConfigError, match=r"nothing .*rollout\.program.* is not a program; give the path of `vllm`"):
        alignkit.run("grpo", **missing)


def test_servers_on_another_machine_are_not_started(own: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    four = Ranks()
    four.n = 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = config_of(own)
    with pytest.raises(ConfigError, match=r"starts vLLM on one machine.*alignkit serve --host ADDRESS"):
        own_servers.OwnServers(config, Path(), four)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"urls": ["http://127.0.0.1:1"]}, "servers are started by the run, and urls are of others; give one of both"),
        ({"servers": 0}, "server_options and program are for servers that the run starts: set `servers`, such as 1"),
        ({"backend": "generate"}, "servers has an effect with backend: vllm only; remove it"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(own: dict[str, Any], given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        alignkit.run("grpo", **own | {"rollout": own["rollout"] | given})


def test_a_gpu_is_shared_unless_an_option_says_how(own: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(own_servers, "visible_gpus", lambda: ["0"])
    program(tmp_path, 'echo "$@"; sleep 60')
    for options, share in (([], "0.3"), (["--gpu-memory-utilization", "0.5"], "0.5")):
        rollout = own["rollout"] | {"server_options": options}
        config = config_of(own | {"rollout": rollout})
        servers = own_servers.OwnServers(config, tmp_path / "logs", SINGLE)
        words = servers._servers.plan.command  # type: ignore[union-attr]
        servers.close()
        assert words[words.index("--gpu-memory-utilization") + 1] == share
        assert words.count("--gpu-memory-utilization") == 1
