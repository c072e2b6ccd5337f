"""vLLM's own transfer of weights between GPUs (NCCL, or CUDA IPC on one machine), driven by its trainer-side engine.

Only on CUDA, and where vLLM can be imported by the Python that trains; vLLM 0.32, `vllm.distributed.weight_transfer`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import torch
from torch import Tensor

from alignkit.errors import RolloutError, first_line
from alignkit.models.loading import causal_lm
from alignkit.rollout.published import Weights, merged_state
from alignkit.rollout.sampler import Setup
from alignkit.rollout.servers import Server, ServerError
from alignkit.rollout.sync import VERSION, FolderSync

_PACKAGE = "vllm.distributed.weight_transfer"


def why_no_transfer(device: torch.device, sharded: bool = False) -> str:
    """Return why weights cannot go to servers from GPU to GPU, empty where they can. device, sharded: of the policy."""
    if sharded:
        return "no transfer between GPUs, the policy is sharded"
    if device.type != "cuda":
        return f"no transfer between GPUs, the policy is on a {device.type}"
    if find_spec("vllm") is None:
        return "no transfer between GPUs, this Python has no vLLM"
    try:
        import_module(f"{_PACKAGE}.factory")
    except Exception as error:
        return f"no transfer between GPUs, this Python's vLLM cannot be imported ({first_line(error)})"
    return ""


class TransferSync(FolderSync):
    """All weights through vLLM's engine; a server that misses a transfer gets the next one. kind: nccl or ipc."""

    repeats = False

    def __init__(self, folder: Path, seconds: float, kind: str, setup: Setup, servers: list[Server]) -> None:
        super().__init__(folder, seconds)
        self.name, self.setup, self.servers = kind, setup, servers
        self._engine: Any = None

    def publish(self, tag: str, model: Any, weights: Weights) -> None:
        """Send the weights to all servers at once. Raises RolloutError."""
        control = _Control(self.servers, self.seconds)
        try:
            if self._engine is None:
                self._engine = self._begun(control, model)
            self._engine.send_weights()
            control.all_of(VERSION, {"new_version": tag})
        except Exception as error:  # NCCL's, vLLM's and HTTP's
            self._engine = None
            raise RolloutError(f"the weights could not be sent by {self.name}: {first_line(error)}") from error

    async def load(self, http: httpx2.AsyncClient, server: Server, tag: str) -> None:
        """See that the transfer arrived: it cannot be repeated for one server. Raises ServerError."""
        if not await self.in_force(http, server, tag):
            raise ServerError(f"it missed the transfer of {tag}")

    def _begun(self, control: _Control, model: Any) -> Any:
        factory, base = import_module(f"{_PACKAGE}.factory"), import_module(f"{_PACKAGE}.base")
        source = _Source(model, base.ParamMeta)
        if self.name == "ipc":
            info = import_module(f"{_PACKAGE}.ipc_engine").IPCTrainerInitInfo(rank=0, packed=True)
        else:
            control.sizes = [int(size) for size in control.asked("/get_world_size", "world_size")]
            address, port = _free_address()
            info = import_module(f"{_PACKAGE}.nccl_engine").NCCLTrainerInitInfo(
                master_address=address, master_port=port, world_size=1 + sum(control.sizes), rank=0
            )
        return factory.WeightTransferTrainerFactory.trainer_init(info, client=control, source=source)


class _Source:
    """The policy's weights, as vLLM's engines iterate over them: by the names of the checkpoint, adapters merged in."""

    def __init__(self, model: Any, meta: Callable[..., Any]) -> None:
        self.model, self._meta = model, meta
        self._about: list[Any] | None = None

    def metadata(self) -> list[Any]:
        """Return name, data type and shape of each weight."""
        if self._about is None:
            self._about = [self._meta(name, w.dtype, tuple(w.shape)) for name, w in self]
        return self._about

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        lm = causal_lm(self.model)
        tied = set(getattr(lm, "all_tied_weights_keys", None) or {})
        return ((name, w) for name, w in merged_state(self.model, lm) if name not in tied)

    def held_names(self) -> None:
        """Say that this process holds every weight."""


class _Control:
    """vLLM's `VLLMWeightSyncClient` for several servers, which must all take part at the same time.

    sizes: workers of each server, whose numbers in the group follow on each other.
    """

    def __init__(self, servers: list[Server], seconds: float) -> None:
        self.servers, self.seconds, self.sizes = servers, seconds, [1] * len(servers)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let the servers join; each with its own offset in the group."""
        offset, bodies = int(init_info.get("rank_offset", 0)), []
        for size in self.sizes:
            own = {"rank_offset": offset} if "rank_offset" in init_info else {}
            bodies.append({"init_info": {**init_info, **own}})
            offset += size
        self._each("/init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        """Begin an update."""
        self.all_of("/start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        """Receive weights."""
        safe = import_module(f"{_PACKAGE}.clients")._json_safe_update_payload(update_info)
        self.all_of("/update_weights", {"update_info": safe})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End an update."""
        self.all_of("/finish_weight_update", {} if weight_version is None else {"weight_version": weight_version})

    def all_of(self, path: str, body: dict[str, Any]) -> None:
        """Send all servers the same."""
        self._each(path, [body] * len(self.servers))

    def asked(self, path: str, name: str) -> list[Any]:
        """Return a field of each server's answer."""
        found = []
        for server in self.servers:
            with self._http(server) as http:
                found.append(http.get(f"{server.url}{path}").raise_for_status().json()[name])
        return found

    def _each(self, path: str, bodies: list[dict[str, Any]]) -> None:
        def post(server: Server, body: dict[str, Any]) -> None:
            with self._http(server) as http:
                http.post(f"{server.url}{path}", json=body).raise_for_status()

        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(post, self.servers, bodies))

    def _http(self, server: Server) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
        return httpx2.Client(headers=headers, timeout=self.seconds)


def _free_address() -> tuple[str, int]:
    """Return an address of this machine that servers elsewhere can reach, and a free port."""
    with socket.socket() as one:
        one.bind(("", 0))
        return socket.gethostbyname(socket.gethostname()), int(one.getsockname()[1])
