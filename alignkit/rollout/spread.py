"""Prompts spread over servers: a failed one is asked elsewhere, or again, and only whole results are returned."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import httpx2

from alignkit.errors import RolloutError
from alignkit.rewards.limits import STOP
from alignkit.rollout.servers import Server, ServerError
from alignkit.rollout_settings import Rollout

logger = logging.getLogger(__name__)
T = TypeVar("T")
_LONGEST_WAIT = 60.0  # seconds
Holds = Callable[[httpx2.AsyncClient, Server], Awaitable[bool]]
Give = Callable[[httpx2.AsyncClient, Server], Awaitable[None]]
Ask = Callable[[httpx2.AsyncClient, Server, int], Awaitable[T]]


async def waited(settings: Rollout, attempt: int) -> bool:
    """Wait before an attempt, from 1, at servers that all failed; return False where a signal ends the run."""
    # jitter, so that prompts that failed together are not all sent again at the same moment
    left = min(settings.backoff * 2 ** max(attempt - 1, 0), _LONGEST_WAIT) * random.uniform(0.8, 1.0)
    while left > 0 and STOP.at is None:
        await asyncio.sleep(min(left, 0.5))
        left -= 0.5
    return STOP.at is None


class Spread:
    """One call's prompts over servers.

    holds: returns whether a server has the right weights. give: gives them to it. Both raise ServerError. A server is
    looked at before its first prompt, after each of its failures, and after all its answers: those between two states
    are asked for again.
    """

    def __init__(self, servers: Sequence[Server], settings: Rollout, holds: Holds, give: Give) -> None:
        self.servers, self.settings, self._holds, self._give = servers, settings, holds, give
        self._checked: set[str] = set()
        self._down: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._slots = {server.url: asyncio.Semaphore(settings.concurrency) for server in servers}

    async def results(self, http: httpx2.AsyncClient, ask: Ask[T], n: int) -> list[T]:
        """Return the results of prompts 0 to n - 1. Raises RolloutError where one fails everywhere, `retries` times."""
        found: dict[int, tuple[Server, T]] = {}
        for _ in range(self.settings.retries + 1):
            missing = [at for at in range(n) if at not in found]
            try:
                async with asyncio.TaskGroup() as tasks:
                    made = {at: tasks.create_task(self._one(http, ask, at)) for at in missing}
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            found |= {at: task.result() for at, task in made.items()}
            changed = await self._changed(http, {server for server, _ in found.values()})
            found = {at: one for at, one in found.items() if one[0].url not in changed}
            if len(found) == n:
                return [found[at][1] for at in range(n)]
        raise RolloutError(f"the servers changed their weights while they sampled, again and again: {self._why()}")

    async def _one(self, http: httpx2.AsyncClient, ask: Ask[T], at: int) -> tuple[Server, T]:
        """Return a prompt's result and who gave it."""
        for attempt in range(self.settings.retries + 1):
            if len(self._down) == len(self.servers):
                await self._wait(attempt)
            server = min((s for s in self.servers if s.url not in self._down), key=lambda s: s.active, default=None)
            if server is None:  # another prompt found the last one down meanwhile
                continue
            server.active += 1
            try:
                async with self._slots[server.url]:
                    await self._check(http, server)
                    return server, await ask(http, server, at)
            except ServerError as error:
                self._failed(server, str(error))
            finally:
                server.active -= 1
        attempts = f"{self.settings.retries + 1} attempt{'s' * (self.settings.retries > 0)}"
        raise RolloutError(
            f"no vLLM server returns the completions of prompt {at + 1} (after {attempts}): {self._why()}. Restart "
            "them, with `alignkit serve` or as they were started, and resume the run"
        )

    async def _wait(self, attempt: int) -> None:
        """Wait until servers that all failed are tried again. Raises RolloutError where a signal ends the run."""
        if not await waited(self.settings, attempt):
            raise RolloutError(f"no vLLM server answers, and a signal asked the run to stop: {self._why()}")
        self._down.clear()

    async def _check(self, http: httpx2.AsyncClient, server: Server) -> None:
        async with server.checked:
            if server.url in self._checked:
                return
            if not await self._holds(http, server):
                logger.warning("%s does not have the weights of this step; it is given them again", server)
                await self._give(http, server)
            self._checked.add(server.url)

    async def _changed(self, http: httpx2.AsyncClient, servers: set[Server]) -> set[str]:
        """Return the servers that no longer have the weights that they had before their answers."""
        changed = set()
        for server in servers:
            try:
                if not await self._holds(http, server):
                    raise ServerError("it had other weights after its answers than before")
            except ServerError as error:
                self._failed(server, str(error))
                changed.add(server.url)
        return changed

    def _failed(self, server: Server, why: str) -> None:
        self._checked.discard(server.url)
        if server.url not in self._down:
            logger.warning("%s failed: %s", server, why)
        self._down.add(server.url)
        self._reasons[server.url] = why

    def _why(self) -> str:
        return "; ".join(f"{url}: {why}" for url, why in self._reasons.items())
