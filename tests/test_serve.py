"""`alignkit serve`: vLLM's options for a run, and servers that start, fail and end, with a program in its place."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignkit.config import RunConfig
from alignkit.errors import ConfigError, RolloutError
from alignkit.rollout.serving import Plan, Servers, plan, vllm_program
from helpers import free_port

# it answers /health as vllm does, and starts a process of its own, as vllm does
STANDS_IN = """#!{python}
import http.server, os, subprocess, sys
if "--broken" in sys.argv:
    print("ValueError: planted by the test", file=sys.stderr)
    sys.exit(3)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # {mark}"])
print(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["VLLM_SERVER_DEV_MODE"], *sys.argv, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def config(tiny: str, **more: Any) -> RunConfig:
    return RunConfig(**{"method": "grpo", "model": tiny, "data": "d", **more})


def options(made: Plan) -> dict[str, str]:
    """The options of a command with their values."""
    words = made.command[3:]
    return {w: words[i + 1] if i + 1 < len(words) else "" for i, w in enumerate(words) if w.startswith("--")}


def test_the_options_are_those_of_the_run(tiny: str) -> None:
    made = plan(config(tiny, max_prompt_tokens=100, sampling={"max_new_tokens": 60}), "vllm", 1, [], None, ["--x", "1"])
    assert made.command[:3] == ["vllm", "serve", tiny]
    assert options(made).items() >= {
        "--dtype": "float32", "--logprobs-mode": "processed_logprobs", "--generation-config": "vllm",
        "--max-model-len": "160", "--x": "1", "--max-num-batched-tokens": "2048",
    }.items()  # fmt: skip
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} <= {*made.command}
    assert "--enable-lora" not in made.command
    assert made.environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in made.environment
    # no longer than the model has positions, which vLLM refuses
    assert options(plan(config(tiny), "vllm", 1, [], "bfloat16", []))["--max-model-len"] == "256"
    on_gpus = plan(config(tiny), "vllm", 2, ["4", "5", "6", "7"], None, [])
    assert options(on_gpus)["--dtype"] == "bfloat16"
    assert options(on_gpus)["--weight-transfer-config"] == '{"backend": "nccl"}'
    assert on_gpus.gpus == ["4,5", "6,7"]
    assert options(on_gpus)["--tensor-parallel-size"] == "2"
    assert "--tensor-parallel-size" not in plan(config(tiny), "vllm", 2, ["4", "5"], None, []).command
    with pytest.raises(ConfigError, match="--processes 3 needs as many GPUs, and 2 are visible"):
        plan(config(tiny), "vllm", 3, ["0", "1"], None, [])


@pytest.mark.parametrize(
    ("lora", "rank"),
    [
        (8, "8"), (4, "8"), ({"r": 12, "rank_pattern": {"q_proj": 40}}, "64"), ({"r": 8, "init": "pissa"}, "16"),
        ({"r": 8, "dora": True}, None), ({"r": 8, "modules_to_save": ["lm_head"]}, None),
    ],
)  # fmt: skip
def test_adapters_are_served_alone_where_vllm_can(tiny: str, lora: Any, rank: str | None) -> None:
    made = plan(config(tiny, lora=lora), "vllm", 1, [], None, [])
    assert options(made).get("--max-lora-rank") == rank
    assert ("--enable-lora" in made.command) is (rank is not None)
    assert made.environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == (None if rank is None else "1")


def test_a_key_is_not_on_the_command_line(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    made = plan(config(tiny, rollout={"backend": "vllm", "key_env": "MY_KEY"}), "vllm", 1, [], None, [])
    assert made.environment["VLLM_API_KEY"] == "sk-very-secret"
    assert "sk-very-secret" not in " ".join(made.command)


def test_where_vllm_is_not_installed_the_error_says_what_to_type(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"vLLM is not installed here: pip install vllm.*--vllm .*scripts/vllm-cpu"):
        vllm_program(None)
    with pytest.raises(ConfigError, match=r"nothing \(--vllm, rollout.program or ALIGNKIT_VLLM\) is not a program"):
        vllm_program(tmp_path / "nothing")
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert vllm_program(None) == str(program)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program in the place of vllm."""
    path = tmp_path / "vllm"
    path.write_text(STANDS_IN.format(python=sys.executable, mark=tmp_path))
    path.chmod(0o755)
    return path


def running(mark: Path) -> list[str]:
    found = subprocess.run(["pgrep", "-f", f"# {mark}"], capture_output=True, text=True)
    return found.stdout.split()


def test_servers_start_and_end_with_their_children(program: Path, tmp_path: Path) -> None:
    made = Plan([str(program), "serve", "m"], {"VLLM_SERVER_DEV_MODE": "1"}, ["4", "5"])
    with Servers(made, "127.0.0.1", free_port(2), 2, tmp_path / "logs") as servers:
        servers.wait_until_ready(20)
        assert len(running(tmp_path)) == 2
        servers.check()
        for i, port in enumerate(servers.ports):
            said = servers.log_of(port).read_text()
            assert said.startswith(f"{i + 4} 1 ")
            assert f"serve m --host 127.0.0.1 --port {port}\n" in said
    assert running(tmp_path) == []


def test_a_port_in_use_is_refused(program: Path, tmp_path: Path) -> None:
    """Who answers there would be taken for the new server."""
    made = Plan([str(program), "serve", "m"], {"VLLM_SERVER_DEV_MODE": "1"}, [])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1: .*in use; choose another --port"):
            Servers(made, "127.0.0.1", port, 1, tmp_path / "logs").__enter__()
    assert running(tmp_path) == []


def test_a_server_that_cannot_start_is_an_error_with_the_end_of_its_log(program: Path, tmp_path: Path) -> None:
    made = Plan([str(program), "serve", "m", "--broken"], {"VLLM_SERVER_DEV_MODE": "1"}, [])
    with Servers(made, "127.0.0.1", free_port(), 1, tmp_path / "logs") as servers:
        with pytest.raises(RolloutError, match=r"(?s)ended with exit code 3; the end of .*planted by the test"):
            servers.wait_until_ready(20)


def test_the_command_ends_its_servers_on_sigterm(program: Path, tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"method": "grpo", "model": tiny, "data": "d", "reward": "numeric"}))
    port = free_port()
    command = [sys.executable, "-m", "alignkit", "serve", str(file), "--port", str(port), "--vllm", str(program)]
    with subprocess.Popen([*command, "--logs", str(tmp_path / "logs")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert yaml.safe_load(line)["rollout"] == {"backend": "vllm", "urls": [f"http://127.0.0.1:{port}"]}
        assert len(running(tmp_path)) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    time.sleep(0.1)
    assert running(tmp_path) == []
    assert os.path.isfile(tmp_path / "logs" / f"vllm-{port}.log")
