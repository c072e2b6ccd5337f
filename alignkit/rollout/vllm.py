"""vLLM servers as a sampler: prompts are spread over them, and only completions of the right weights are taken."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from typing import Any, TypeVar

import httpx2
from torch import nn

from alignkit.errors import CheckpointError, ConfigError, RolloutError, first_line
from alignkit.files import remove
from alignkit.models.sharding import is_sharded
from alignkit.rewards import secrecy
from alignkit.rewards.event_loop import EventLoop
from alignkit.rewards.limits import Deadline, LateError
from alignkit.rollout.known_prompt import KnownPrompt
from alignkit.rollout.published import Weights, why_no_adapter
from alignkit.rollout.sampler import Request, Sampled, Sampler, Setup
from alignkit.rollout.servers import Server, ServerError, client, key_of, overdue
from alignkit.rollout.spread import Spread, waited
from alignkit.rollout.sync import ROUTES, AdapterSync, FolderSync, Sync, choose, models_of
from alignkit.rollout.transfer import TransferSync, why_no_transfer
from alignkit.rollout.vllm_requests import body_of, check_lengths, samples_of

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Vllm(Sampler):
    """Samples by vLLM servers. processed: False where they run without `--logprobs-mode processed_logprobs`.

    It is found out by a request at the first update, and is the same on all servers. Raises ConfigError where the
    servers cannot take weights, RolloutError where one does not answer.
    """

    def __init__(self, setup: Setup) -> None:
        settings = setup.settings
        if not settings.urls:
            raise ConfigError(
                "rollout.backend: vllm needs servers: set rollout.servers: 1, and the run starts one, or start it with "
                "`alignkit serve`, which prints `rollout.urls`, and set that"
            )
        self.setup, self.settings, self._key = setup, settings, key_of(settings.key_env)
        servers, own = [Server(url, self._key) for url in settings.urls], setup.ranks.own
        self.servers = [*servers[own % len(servers) :], *servers[: own % len(servers)]]
        # the same on all ranks, and of this session only: another run, or a server's restart, is not taken for it
        self._session = f"{setup.ranks.most(secrets.randbelow(2**31)):08x}"
        self._tag, self._updates, self._kinds, self._closed = "", 0, dict[str, bool](), False
        self._judged = False  # whether `processed` was found out
        self._loop = EventLoop()
        try:
            routes = self._run(self._look())
        except BaseException:
            self._loop.close()
            raise
        self._known = KnownPrompt(setup, self.longest, settings.timeout)
        device = next(setup.model.parameters()).device
        self._sharded = setup.policy is not None and is_sharded(setup.policy)
        shared = "the servers share the run's GPUs" if settings.servers else why_no_transfer(device, self._sharded)
        kind, why = choose(settings.sync, routes, why_no_adapter(setup.model), shared)
        self.sync = self._sync(kind)
        if setup.ranks.is_main:
            places = ", ".join(server.url for server in self.servers)
            logger.info("rollouts: vLLM at %s; weights: %s", places, why)

    def update(self, version: int, model: nn.Module) -> None:
        """Send the weights, on the main rank, and compare a known prompt; all ranks then know how they were sent.

        A server that fails is left out with a warning, while others go on.
        """
        self.version = None
        self._updates += 1  # the best weights of a run may be put in force at the same number of steps as its last
        self._tag = f"alignkit-{self._session}-{self._updates}-{version}"
        self._known.read()
        weights = self._gathered(model)
        self.setup.ranks.together(lambda: self._send(model, weights), RolloutError)
        self._agree()
        self.version = version

    def sample(self, request: Request) -> list[list[Sampled]]:
        """Return the completions, from servers that had the weights of `version` before and after."""
        check_lengths(request, self.longest)
        model = self.sync.called(self._tag, self.model)
        spread = Spread(self.servers, self.settings, self._holds, self._give)

        async def ask(http: httpx2.AsyncClient, server: Server, at: int) -> list[Sampled]:
            body = body_of(request, at, self.setup.ends, model)
            reply = await server.post(http, "/v1/completions", body, self.settings.timeout)
            return samples_of(reply, request, at, self.setup.ends, self.setup.tokenizer)

        async def all_of_them() -> list[list[Sampled]]:
            async with client(self._key) as http:
                return await spread.results(http, ask, len(request.prompts))

        return self._run(all_of_them())

    def close(self) -> None:
        """Remove the weights that were left for the servers, and end the thread of requests."""
        if self._closed:
            return
        self._closed = True
        if self.setup.ranks.is_main:
            self.sync.close()
        self._loop.close()
        if self.setup.servers is not None:
            self.setup.servers.close()

    async def _look(self) -> frozenset[str]:
        """Ask the servers what they serve; return the addresses that all of them have."""
        common, longest = set(ROUTES), list[int]()
        names = set[str]()
        async with client(self._key) as http:
            for server in self.servers:
                try:
                    name, about = next(iter(models_of(await server.get(http, "/v1/models")).items()))
                    common &= {route for route in ROUTES if await server.has(http, route)}
                    longest.append(int(about["max_model_len"]))
                except (ServerError, LookupError, StopIteration, TypeError) as error:
                    raise RolloutError(
                        f"{server} does not answer: {error}; start it with `alignkit serve`, or correct rollout.urls"
                    ) from None
                names.add(name)
        if len(names) > 1:
            raise ConfigError(f"the vLLM servers serve models of different names: {', '.join(sorted(names))}")
        self.model, self.longest = names.pop(), min(longest)
        return frozenset(common)

    def _sync(self, kind: str) -> Sync:
        folder = self.settings.sync_folder
        if folder is None:
            folder = self.setup.folder / "weights-for-servers"
            if self.setup.ranks.is_main:
                remove(folder)  # of a session that was killed
        if kind in ("nccl", "ipc"):
            return TransferSync(folder, self.settings.sync_timeout, kind, self.setup, self.servers)
        return {"folder": FolderSync, "adapter": AdapterSync}[kind](folder, self.settings.sync_timeout)

    def _gathered(self, model: nn.Module) -> Weights:
        """Return a sharded model's whole weights, on the main rank. Raises RolloutError on all ranks."""
        if not self._sharded or self.setup.gather is None:
            return None
        try:
            then = "Free some space there"
            ends = not isinstance(self.sync, AdapterSync)
            return self.setup.gather(model, self.setup.folder, self.setup.ranks, then, ends)
        except CheckpointError as error:
            raise RolloutError(f"the weights for the servers: {error}") from error

    def _send(self, model: nn.Module, weights: Weights) -> None:
        """On the main rank, make the servers load the weights. Raises RolloutError where none does."""
        if not self.setup.ranks.is_main:
            return
        try:
            failed = self._published(model, weights)
        except RolloutError:
            raise
        except Exception as error:  # the other ranks wait to be told
            raise RolloutError(f"the weights could not be sent: {first_line(error)}") from error
        if len(failed) == len(self.servers):
            raise RolloutError(f"no vLLM server could be given the weights: {_joined(failed)}")
        for url, why in failed.items():
            logger.warning("the vLLM server at %s could not be given the weights, and others go on: %s", url, why)

    def _published(self, model: nn.Module, weights: Weights) -> dict[str, str]:
        """Publish the weights for all servers; return those that fail to load them, with the reasons."""
        deadline = Deadline(self.setup.ranks.patience)
        self.sync.publish(self._tag, model, weights)
        failed = self._run(self._update(), deadline)
        if self._adapter_is_refused(failed):
            self.sync = self._sync("folder")
            self.sync.publish(self._tag, model, weights)
            failed = self._run(self._update(), deadline)
        return failed

    async def _update(self) -> dict[str, str]:
        """Load the published weights into all servers, again where all fail; return those that fail, with reasons."""
        async with client(self._key) as http:
            for attempt in range(self.settings.retries + 1):
                if attempt and not await waited(self.settings, attempt):
                    break
                done = await asyncio.gather(*(self._load(http, server) for server in self.servers))
                if not all(done) or self._may_merge() or not self.sync.repeats:
                    break
        return {server.url: why for server, why in zip(self.servers, done, strict=True) if why}

    async def _load(self, http: httpx2.AsyncClient, server: Server) -> str:
        try:
            await self._give(http, server)
        except ServerError as error:
            return str(error)
        return ""

    async def _holds(self, http: httpx2.AsyncClient, server: Server) -> bool:
        return await self.sync.in_force(http, server, self._tag)

    async def _give(self, http: httpx2.AsyncClient, server: Server) -> None:
        """Load the published weights into a server, and compare the known prompt."""
        model = self.sync.called(self._tag, self.model)
        await self.sync.loaded(http, server, self._tag)
        await self._known.check(http, server, model, self.settings.tolerance)
        self._kinds[server.url] = kind = await self._known.processed(http, server, model)
        if len(set(self._kinds.values())) > 1 or (self._judged and kind != self.processed):
            raise RolloutError(
                "the vLLM servers return log-probabilities of different kinds; start all of them with the same "
                "--logprobs-mode"
            )

    def _may_merge(self) -> bool:
        """Return whether weights may still be sent merged instead of an adapter."""
        alone = isinstance(self.sync, AdapterSync) and not self.sync.worked
        return alone and self.settings.sync == "auto" and not self._sharded

    def _adapter_is_refused(self, failed: dict[str, str]) -> bool:
        """Return whether no server takes an adapter at the first update, so that weights are sent merged."""
        if not self._may_merge() or len(failed) < len(self.servers):
            return False
        logger.warning("weights: through a folder, merged, because no server takes the adapter: %s", _joined(failed))
        self.sync.close()
        return True

    def _agree(self) -> None:
        """Tell all ranks what the main one found: whether weights go through a folder, and the kind of logprobs."""
        ranks, kinds = self.setup.ranks, set(self._kinds.values())
        own = 2 * isinstance(self.sync, FolderSync) + (False in kinds)
        found = ranks.most(own if ranks.is_main else 0)
        if found & 2 and not isinstance(self.sync, FolderSync):
            self.sync = self._sync("folder")
        self.processed, self._judged = not found & 1, True

    def _run(self, work: Coroutine[Any, Any, T], deadline: Deadline | None = None) -> T:
        """Return the result of `work`. Raises RolloutError where a signal, or the other ranks, cannot wait for it."""
        deadline = deadline or Deadline(self.setup.ranks.patience)
        with secrecy.logging(self._key):
            try:
                return self._loop.run(work, lambda: overdue(deadline))
            except LateError as error:
                raise RolloutError(str(error)) from None


def _joined(failed: dict[str, str]) -> str:
    return "; ".join(f"{url}: {why}" for url, why in failed.items())
