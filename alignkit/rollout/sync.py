"""How weights get to vLLM servers: by a folder, as an adapter alone, or by vLLM's own transfer between GPUs.

A server has the weights of a tag, which names the run's session and the version. With a folder the tag is the server's
`weight_version`; an adapter has it as its name. A server that was restarted has neither.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import httpx2

from alignkit.errors import ConfigError, RolloutError
from alignkit.files import remove
from alignkit.rollout.published import Weights, publish
from alignkit.rollout.servers import NoRouteError, Server, ServerError

RELOAD = "/collective_rpc"
VERSION = "/update_weight_version"
LOAD_ADAPTER = "/v1/load_lora_adapter"
TRANSFER = "/init_weight_transfer_engine"
ROUTES = (RELOAD, VERSION, LOAD_ADAPTER, TRANSFER, "/reset_prefix_cache")
_AGAIN = 0.1  # seconds until a prefix cache in use is reset again


class Sync(ABC):
    """Puts weights in force on servers. seconds: in which a server must load them. model: the servers' name of it.

    repeats: whether servers that all missed the weights can load them again.
    """

    name: str
    repeats = True

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._newest: Path | None = None

    @abstractmethod
    def publish(self, tag: str, model: Any, weights: Weights) -> None:
        """Leave the weights where servers get them; the main rank calls it. weights: see `published.publish`."""

    @abstractmethod
    def called(self, tag: str, model: str) -> str:
        """Return the model that requests name for the weights of a tag. model: the server's own."""

    @abstractmethod
    async def in_force(self, http: httpx2.AsyncClient, server: Server, tag: str) -> bool:
        """Return whether the server has the weights of the tag. Raises ServerError."""

    @abstractmethod
    async def load(self, http: httpx2.AsyncClient, server: Server, tag: str) -> None:
        """Make one server load the weights that were published. Raises ServerError, RolloutError."""

    async def loaded(self, http: httpx2.AsyncClient, server: Server, tag: str) -> None:
        """Make one server load the weights, empty its prefix cache, and see that it names them. Raises as `load`."""
        await self.load(http, server, tag)
        await self._empty_cache(http, server)
        if not await self.in_force(http, server, tag):
            raise ServerError(f"it does not have the weights {tag} after it loaded them")

    def close(self) -> None:
        """Remove what was left for the servers."""
        if self._newest is not None:
            remove(self._newest)

    def _replace(self, tag: str) -> Path:
        """Return the folder of a tag; those of earlier ones are removed, which every server has left."""
        before, self._newest = self._newest, self.folder / tag
        if before is not None:
            remove(before)
        return self._newest

    async def _empty_cache(self, http: httpx2.AsyncClient, server: Server) -> None:
        """Empty the prefix cache: vLLM 0.32 answers from that of the old weights after `reload_weights`."""
        end = time.monotonic() + self.seconds
        while True:
            reply = await server.post(http, "/reset_prefix_cache", {}, self.seconds)
            if isinstance(reply, dict) and reply.get("success") is True:
                return
            if time.monotonic() > end:  # it is refused while requests run
                raise ServerError(f"its prefix cache could not be emptied within {self.seconds:g} s: {reply}")
            await asyncio.sleep(_AGAIN)


class FolderSync(Sync):
    """All weights by a folder that the servers read (`reload_weights`)."""

    name = "folder"

    def publish(self, tag: str, model: Any, weights: Weights) -> None:
        """Write the weights, with adapters merged in."""
        publish(model, self._replace(tag).resolve(), False, weights)

    def called(self, tag: str, model: str) -> str:
        """Return the server's own model."""
        return model

    async def in_force(self, http: httpx2.AsyncClient, server: Server, tag: str) -> bool:
        """Compare the server's weight version."""
        info = await server.get(http, "/weight_info")
        return isinstance(info, dict) and info.get("weight_version") == tag

    async def load(self, http: httpx2.AsyncClient, server: Server, tag: str) -> None:
        """Reload the weights, and give them their version."""
        folder = (self.folder / tag).resolve()
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        # until the new weights are whole, the server has no version that anybody asks for
        await server.post(http, VERSION, {"new_version": f"before {tag}"}, self.seconds)
        await server.post(http, RELOAD, body, self.seconds)
        await server.post(http, VERSION, {"new_version": tag}, self.seconds)


class AdapterSync(Sync):
    """The adapter alone, loaded at run time next to the server's model, under a name of its own for each version."""

    name = "adapter"

    def __init__(self, folder: Path, seconds: float) -> None:
        super().__init__(folder, seconds)
        self._loaded: dict[str, str] = {}

    @property
    def worked(self) -> bool:
        """Whether a server has loaded an adapter."""
        return bool(self._loaded)

    def publish(self, tag: str, model: Any, weights: Weights) -> None:
        """Write the adapter."""
        publish(model, self._replace(tag).resolve(), True, weights)

    def called(self, tag: str, model: str) -> str:
        """Return the adapter's name."""
        return tag

    async def in_force(self, http: httpx2.AsyncClient, server: Server, tag: str) -> bool:
        """Look for the adapter among the server's models."""
        return tag in models_of(await server.get(http, "/v1/models"))

    async def load(self, http: httpx2.AsyncClient, server: Server, tag: str) -> None:
        """Load the adapter, and unload the one before it."""
        body = {"lora_name": tag, "lora_path": str((self.folder / tag).resolve())}
        if not await self.in_force(http, server, tag):
            try:
                await server.post(http, LOAD_ADAPTER, body, self.seconds)
            except RolloutError as error:  # with `sync: auto` merged weights may take its place
                raise ServerError(str(error)) from None
        before, self._loaded[server.url] = self._loaded.get(server.url), tag
        if before not in (None, tag) and before in models_of(await server.get(http, "/v1/models")):
            await server.post(http, "/v1/unload_lora_adapter", {"lora_name": before}, self.seconds)

    async def _empty_cache(self, http: httpx2.AsyncClient, server: Server) -> None:
        try:
            await super()._empty_cache(http, server)
        except NoRouteError:
            return  # without the routes of development; vLLM's cache knows adapters apart by their names


def models_of(reply: Any) -> dict[str, Any]:
    """Return a server's models by name, its own first. Raises ServerError where the reply is none of vLLM."""
    try:
        return {str(one["id"]): one for one in reply["data"]}
    except (LookupError, TypeError) as error:
        raise ServerError(f"/v1/models is not that of vLLM: {type(error).__name__}: {error}") from None


def choose(wanted: str, routes: frozenset[str], no_adapter: str | None, no_transfer: str) -> tuple[str, str]:
    """Return how weights get to the servers, and why, in one line. wanted: `rollout.sync`. routes: of all servers.

    no_adapter: why the adapter alone cannot be sent, None where it can. no_transfer: why vLLM's own transfer between
    GPUs cannot be used, empty where it can. Raises ConfigError where what is wanted is not possible.
    """
    dev = "start the servers with `alignkit serve`, or with VLLM_SERVER_DEV_MODE=1"
    if no_adapter is None and LOAD_ADAPTER not in routes:
        no_adapter = "a server does not load adapters at run time (VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora)"
    folder = routes.issuperset((RELOAD, VERSION, "/reset_prefix_cache"))
    if wanted in ("nccl", "ipc"):
        if no_transfer or TRANSFER not in routes:
            raise ConfigError(f"rollout.sync: {wanted} cannot be used: {no_transfer or dev}; use sync: auto")
        return wanted, "as `rollout.sync` says"
    if wanted == "adapter":
        if no_adapter:
            raise ConfigError(f"rollout.sync: adapter cannot be used: {no_adapter}; use sync: auto")
        return "adapter", "as `rollout.sync` says"
    if wanted == "auto" and no_adapter is None:
        return "adapter", "the adapter alone, which the servers load at run time"
    if wanted == "auto" and not no_transfer and TRANSFER in routes:
        return "nccl", "by vLLM's own transfer between GPUs"
    if not folder:
        raise ConfigError(f"a vLLM server cannot be given weights: it lacks {RELOAD}, {VERSION} or reset; {dev}")
    why = "as `rollout.sync` says" if wanted == "folder" else f"{no_transfer or 'no transfer'}; {no_adapter}"
    return "folder", f"all weights, through a folder ({why})"
