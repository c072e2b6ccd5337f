"""vLLM servers that a run starts itself, on its own machine, and ends with it."""

from __future__ import annotations

import atexit
import os
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from alignkit.config import RunConfig
from alignkit.errors import ConfigError, RolloutError
from alignkit.models.ranks import Ranks
from alignkit.rollout.serving import Servers, plan, vllm_program
from alignkit.rollout_settings import Rollout

SHARE = 0.3  # of a GPU's memory that such a server takes, unless an option says otherwise: it shares the GPU
_WAIT = 900.0  # seconds


class OwnServers:
    """The servers of `rollout.servers`, started by the main rank; `ready` waits for them. logs: a folder.

    All ranks create it and call `ready` together. They end with this process, however it ends. Raises ConfigError where
    they cannot be started.
    """

    def __init__(self, config: RunConfig, logs: Path, ranks: Ranks) -> None:
        self.ranks, self._started = ranks, ExitStack()
        self._servers: Servers | None = None
        n = config.rollout.servers
        if int(os.environ.get("LOCAL_WORLD_SIZE", ranks.n)) < ranks.n:
            raise ConfigError(
                "rollout.servers starts vLLM on one machine, but the run has several; start `alignkit serve --host "
                "ADDRESS` on one of them, and set rollout.urls instead"
            )
        first = ranks.most(ranks.together(lambda: self._start(config, n, logs), ConfigError))
        self.urls = [f"http://127.0.0.1:{first + i}" for i in range(n)]

    def ready(self, settings: Rollout) -> Rollout:
        """Wait until all servers answer; return the settings with their addresses. Raises RolloutError on all ranks."""

        def wait() -> None:
            if self._servers is not None:
                self._servers.wait_until_ready(min(_WAIT, self.ranks.patience or _WAIT))

        self.ranks.together(wait, RolloutError)
        return settings.model_copy(update={"urls": self.urls})

    def close(self) -> None:
        """End them."""
        self._started.close()
        atexit.unregister(self._started.close)

    def _start(self, config: RunConfig, n: int, logs: Path) -> int:
        """Start them on the main rank; return the first one's port, 0 on the others."""
        if not self.ranks.is_main:
            return 0
        settings, gpus = config.rollout, visible_gpus()
        options = list(settings.server_options)
        if gpus and not any(option.startswith("--gpu-memory-utilization") for option in options):
            options += ["--gpu-memory-utilization", str(SHARE)]
        made = plan(config, vllm_program(settings.program), n, gpus, None, options)
        port = free_ports(n)
        self._servers = self._started.enter_context(Servers(made, "127.0.0.1", port, n, logs))
        atexit.register(self._started.close)
        return port


@contextmanager
def own_servers(config: RunConfig, run: Path, ranks: Ranks) -> Iterator[OwnServers | None]:
    """Yield the servers of a run that asks for them, None without. run: its folder. They end where the block raises."""
    if not config.rollout.servers:
        yield None
        return
    servers = OwnServers(config, run / "servers", ranks)
    try:
        yield servers
    except BaseException:
        servers.close()
        raise


def visible_gpus() -> list[str]:
    """Return the GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def free_ports(n: int) -> int:
    """Return the first of n free ports that follow each other, below those that systems lend to clients meanwhile."""
    while True:
        first = random.SystemRandom().randrange(10_000, 32_000)
        with ExitStack() as held:
            try:
                for port in range(first, first + n):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
