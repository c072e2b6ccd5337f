"""vLLM servers for a run: their options from its settings, their start, and their end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2

from alignkit.config import RunConfig
from alignkit.errors import ConfigError, RolloutError
from alignkit.lora_settings import LoraSettings
from alignkit.rollout.servers import key_of

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.32 takes for --max-lora-rank
AT_ONCE = 2048  # tokens of a pass on a CPU, vLLM's default
_LAST_LINES = 15  # of the log of a server that failed
_GRACE = 20.0  # seconds for a server to end
# Linux sends SIGTERM to the program where the process that started it is gone, also after kill -9 (prctl 1)
_CODE = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
_BOUND = [sys.executable, "-ISc", _CODE] if sys.platform == "linux" else []


@dataclass(frozen=True)
class Plan:
    """What is started. command: without address. environment: variables besides those of this process.

    gpus: the devices of each process, empty on a CPU.
    """

    command: list[str]
    environment: dict[str, str]
    gpus: list[str]


def vllm_program(given: Path | None) -> str:
    """Return the program `vllm`: the given one, that of ALIGNKIT_VLLM, or the installed one.

    Raises ConfigError where it is not there, with what to type.
    """
    if given is None and (named := os.environ.get("ALIGNKIT_VLLM")):
        given = Path(named)
    if given is not None:
        if not (given.is_file() and os.access(given, os.X_OK)):
            raise ConfigError(
                f"{given} (--vllm, rollout.program or ALIGNKIT_VLLM) is not a program; give the path of `vllm`, such "
                "as ENVIRONMENT/bin/vllm"
            )
        return str(given.absolute())
    beside = Path(sys.executable).with_name("vllm")
    if find_spec("vllm") is not None and beside.is_file():
        return str(beside)
    if found := shutil.which("vllm"):
        return found
    raise ConfigError(
        "vLLM is not installed here: pip install vllm, or name the program of another environment, --vllm "
        "ENVIRONMENT/bin/vllm (on a CPU, scripts/vllm-cpu makes such an environment)"
    )


def plan(
    config: RunConfig, program: str, processes: int, gpus: Sequence[str], dtype: str | None, more: Sequence[str]
) -> Plan:
    """Return how servers for a run are started. gpus: the visible devices. dtype: of the servers' weights.

    more: further options of `vllm serve`. Raises ConfigError where the model has no folder, or GPUs are too few.
    """
    if not isinstance(config.model, str | Path):
        raise ConfigError("a server needs the folder or the hub name of the model; set `model` to it")
    on_gpu = bool(gpus) and config.device != "cpu"
    exact = config.precision == "fp32" or (config.precision == "auto" and not on_gpu)
    options = ["serve", str(config.model), "--dtype", dtype or ("float32" if exact else "bfloat16")]
    # the folder's generation settings are no part of the policy, and log-probabilities are those of what was drawn
    options += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    if isinstance(config.tokenizer, str | Path):
        options += ["--tokenizer", str(config.tokenizer)]
    if (longest := _longest(config)) is not None:
        options += ["--max-model-len", str(longest)]
    if config.trust_remote_code:
        options.append("--trust-remote-code")
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # the addresses that take weights
    if config.lora is not None and (rank := _served_rank(config.lora)) and config.quantize is None:
        options += ["--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2", "--max-lora-rank", str(rank)]
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    shares = _shares(gpus, processes) if on_gpu else []
    if on_gpu:
        if (size := shares[0].count(",") + 1) > 1:
            options += ["--tensor-parallel-size", str(size)]
        options += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    else:
        # a prompt that is read in parts ends vLLM 0.32 on a CPU, where the request has a seed
        at_once = max(AT_ONCE, longest or 0)
        options += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(at_once)]
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    if key := key_of(config.rollout.key_env):
        environment["VLLM_API_KEY"] = key  # never on the command line, which every user of the machine can read
    return Plan([program, *options, *more], environment, shares)


def _longest(config: RunConfig) -> int | None:
    """Return the tokens of the longest prompt with its completion, no more than the model has positions."""
    if config.max_prompt_tokens is None:
        return None
    from transformers import AutoConfig

    try:
        known = AutoConfig.from_pretrained(str(config.model), trust_remote_code=config.trust_remote_code)
        limit = getattr(known.get_text_config(), "max_position_embeddings", None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the configuration of the model {config.model} cannot be read: {error}") from None
    longest = config.max_prompt_tokens + config.sampling.max_new_tokens
    return min(longest, limit) if limit else longest


def _served_rank(lora: LoraSettings) -> int | None:
    """Return the --max-lora-rank of an adapter that vLLM serves alone, None where weights are merged instead."""
    if lora.dora or lora.modules_to_save or lora.bias != "none" or lora.target_parameters:
        return None
    rank = max([lora.r, *lora.rank_pattern.values()]) * (2 if lora.changes_base else 1)
    return next((known for known in RANKS if known >= rank), None)


def _shares(gpus: Sequence[str], processes: int) -> list[str]:
    """Return the devices of each process, as CUDA_VISIBLE_DEVICES."""
    size = len(gpus) // processes
    if not size:
        raise ConfigError(f"--processes {processes} needs as many GPUs, and {len(gpus)} are visible; lower it")
    return [",".join(gpus[i * size : (i + 1) * size]) for i in range(processes)]


class Servers:
    """Started servers, to be used in `with`: they end with the block, however it ends. logs: a folder."""

    def __init__(self, plan: Plan, host: str, port: int, processes: int, logs: Path) -> None:
        self.plan, self.host, self.logs = plan, host, logs
        self.ports = range(port, port + processes)
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def urls(self) -> list[str]:
        """The addresses, as in `rollout.urls`."""
        shown = "127.0.0.1" if self.host == "0.0.0.0" else self.host
        return [f"http://{shown}:{port}" for port in self.ports]

    def log_of(self, port: int) -> Path:
        """Return the file with what a server says."""
        return self.logs / f"vllm-{port}.log"

    def __enter__(self) -> Servers:
        self.logs.mkdir(parents=True, exist_ok=True)
        for port in self.ports:
            self._check_free(port)
        try:
            for i, port in enumerate(self.ports):
                self._running[port] = self._start(i, port)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def wait_until_ready(self, seconds: float) -> None:
        """Return when all servers answer. Raises RolloutError with the end of the log where one does not."""
        end = time.monotonic() + seconds
        for port, url in zip(self.ports, self.urls, strict=True):
            while not self._answers(url):
                self.check()
                if time.monotonic() > end:
                    raise self._failed(port, f"does not answer after {seconds:g} s")
                time.sleep(0.5)

    def check(self) -> None:
        """Raise RolloutError where a server has ended."""
        for port, process in self._running.items():
            if (code := process.poll()) is not None:
                raise self._failed(port, f"ended with exit code {code}")

    def end(self) -> None:
        """End all servers and their children: they are asked to, and killed where they do not."""
        for process in self._running.values():
            _signal(process, signal.SIGTERM)
        end = time.monotonic() + _GRACE
        for process in self._running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0.1))
            _signal(process, signal.SIGKILL)  # its children have its group
            process.wait()
        self._running.clear()

    def _check_free(self, port: int) -> None:
        """Raise ConfigError where something listens on a port: its answers would be taken for the server's."""
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind((self.host, port))
            except OSError as error:
                raise ConfigError(f"port {port} of {self.host}: {error.strerror}; choose another --port") from None

    def _start(self, number: int, port: int) -> subprocess.Popen[bytes]:
        command = [*_BOUND, *self.plan.command, "--host", self.host, "--port", str(port)]
        environment: Mapping[str, Any] = os.environ | self.plan.environment
        if self.plan.gpus:
            environment = {**environment, "CUDA_VISIBLE_DEVICES": self.plan.gpus[number]}
        with self.log_of(port).open("wb") as log:
            try:
                return subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
                )
            except OSError as error:
                raise ConfigError(f"{command[0]} cannot be started: {error.strerror}; check --vllm") from error

    def _answers(self, url: str) -> bool:
        try:
            return httpx2.get(f"{url}/health", timeout=5.0).status_code == 200
        except httpx2.HTTPError:
            return False

    def _failed(self, port: int, why: str) -> RolloutError:
        path = self.log_of(port)
        lines = path.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return RolloutError("\n".join([f"the vLLM server of port {port} {why}; the end of {path}:", *lines]))


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return
