"""A sampling server killed in the middle of a batch or of a sync, and a network that refuses, tried and counted.

python tests/server_faults.py FOLDER TRIES [VLLM]    VLLM: a program `vllm`; without it, the double in a process

prints N tried, N that reached the state of a run that nothing interrupted. A real vLLM returns log-probabilities that
differ in the third digit from one call to the next, so its runs are compared with a second undisturbed one.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from on_ranks import REDS, Job, run_on, started
from safetensors.torch import load_file

from alignkit.rollout.serving import Plan, Servers
from alignkit.runs.folder import read_metrics
from helpers import free_port, make_rows, write_tiny

STEPS, WAIT = 8, 180.0
PLACES = {"batch": b"POST /v1/completions", "sync": b"POST /collective_rpc"}


class Proxy:
    """Passes TCP connections on to the server's port, and sees the requests."""

    def __init__(self, port: int) -> None:
        self.port, self._to = free_port(), port
        self._open: set[socket.socket] = set()
        self._seen: Callable[[bytes], None] = lambda chunk: None
        self._listen()

    def watch(self, path: bytes, number: int, act: Callable[[], None]) -> None:
        """Call `act` when the request of this number for the path has been passed on."""
        left = [number]

        def seen(chunk: bytes) -> None:
            if chunk.startswith(path):
                left[0] -= 1
                if left[0] == 0:
                    act()

        self._seen = seen

    def refuse(self, seconds: float) -> None:
        """Close all connections, and refuse new ones for a while."""
        self._listener.close()
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        threading.Timer(seconds, self._listen).start()

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # it was closed
            while True:
                threading.Thread(target=self._pair, args=[listener.accept()[0]], daemon=True).start()

    def _pair(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._to)) as server:
            self._open |= {client, server}
            threading.Thread(target=self._pass_on, args=[server, client], daemon=True).start()
            self._pass_on(client, server)
            self._open -= {client, server}

    def _pass_on(self, source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while chunk := source.recv(1 << 16):
                to.sendall(chunk)
                if to.getpeername()[1] == self._to:
                    self._seen(chunk)
            to.shutdown(socket.SHUT_WR)


class World:
    """A model, rows, one server behind a proxy, and runs that sample by it. vllm: a program; None for the double."""

    def __init__(self, folder: Path, vllm: str | None) -> None:
        self.folder, self.vllm, self.port = folder.absolute(), vllm, free_port()
        self.proxy = Proxy(self.port)
        folder.mkdir(parents=True, exist_ok=True)
        sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
        write_tiny(self.folder / "model", max_position_embeddings=256, **sizes)
        self.start()

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        model, quiet = str(self.folder / "model"), {"VLLM_SERVER_DEV_MODE": "1"}
        command = [sys.executable, str(Path(__file__).with_name("vllm_double.py")), "serve", model]
        if self.vllm:
            command = [self.vllm, "serve", model, "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
            command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
            quiet |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
        self.servers = Servers(Plan(command, quiet, []), "127.0.0.1", self.port, 1, self.folder / "logs")
        self.servers.__enter__()
        self.servers.wait_until_ready(WAIT)

    def kill(self) -> None:
        """kill -9 of the server and its children."""
        for process in self.servers._running.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def job(self, name: str, **rollout: Any) -> Job:
        """A run of 8 steps; its sampler gives up after 1 s without an answer, unless told otherwise."""
        url = f"http://127.0.0.1:{self.proxy.port}"
        given = {"backend": "vllm", "urls": [url], "retries": 2, "backoff": 0.3, "timeout": 60.0, **rollout}
        return "grpo", {
            "model": str(self.folder / "model"), "data": make_rows("text", 12), "output": str(self.folder),
            "name": name, "reward": REDS, "group_size": 3, "batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-4,
            "sampling": {"max_new_tokens": 12}, "rollout": given, "device": "cpu", "save_every": 100,
        }  # fmt: skip

    def disturbed(self, name: str, place: str, seed: int, seconds: float = 30) -> None:
        """Start a run and disturb it; resume it where that ended it. seconds: for which the network refuses."""
        draw = random.Random(seed)
        number = draw.randrange(4, 4 * STEPS - 4) if place != "sync" else draw.randrange(2, STEPS)
        refuses = place == "network"
        act = (lambda: self.proxy.refuse(seconds)) if refuses else self.kill
        self.proxy.watch(PLACES.get(place, PLACES["batch"]), number, act)
        job = self.job(name, **({"retries": 6, "backoff": 1.0} if refuses else {}))
        process = started(1, [job], self.folder / f"{name}-first")
        try:
            code = process.wait(WAIT)
        finally:
            process.kill()
            self.proxy.watch(b"", 0, lambda: None)
        said = (self.folder / f"{name}-first" / "said").read_text()
        if refuses:
            assert code == 0, said[-3000:]
            return
        assert code != 0, "the run ended before the server died"
        assert "continue with: alignkit run" in said, said[-3000:]
        self.servers.__exit__(None, None, None)
        self.start()
        method, settings = self.job(name)
        run_on(1, [(method, settings | {"resume": True})], self.folder / f"{name}-resumed")

    def difference(self, name: str, other: str = "whole") -> tuple[float, float]:
        """The share of completions that differ from those of another run, and the largest difference of a weight."""
        a, b = (re.findall(r'"completion": "[^"]*"', (self.folder / n / "completions.jsonl").read_text())
                for n in (name, other))  # fmt: skip
        assert len(a) == len(b) == STEPS * 12
        assert [line["step"] for line in read_metrics(self.folder / name)] == list(range(1, STEPS + 1))
        ours, theirs = (load_file(self.folder / n / "model" / "model.safetensors") for n in (name, other))
        worst = max(float(torch.max(abs(ours[k] - theirs[k]))) for k in ours)
        return sum(x != y for x, y in zip(a, b, strict=True)) / len(a), worst

    def close(self) -> None:
        """End the server."""
        self.servers.__exit__(None, None, None)


def main() -> None:
    folder, tries = Path(sys.argv[1]), int(sys.argv[2])
    world = World(folder, sys.argv[3] if len(sys.argv) > 3 else None)
    try:
        for name in ("whole", "again"):
            run_on(1, [world.job(name)], world.folder / f"{name}-first")
        allowed = tuple(2 * d + 1e-6 for d in world.difference("again"))
        print(f"two runs without a fault: {world.difference('again')} (completions, largest weight)", flush=True)
        for place in (*PLACES, "network"):
            good = 0
            for i in range(tries):
                started_at = time.monotonic()
                world.disturbed(f"{place}-{i}", place, seed=i)
                found = world.difference(f"{place}-{i}")
                good += all(d <= most for d, most in zip(found, allowed, strict=True))
                took = time.monotonic() - started_at
                print(f"{place}: {i + 1} tried, {good} reached the same state {found} ({took:.0f} s)", flush=True)
    finally:
        world.close()


if __name__ == "__main__":
    main()
