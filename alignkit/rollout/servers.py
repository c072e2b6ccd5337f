"""HTTP with vLLM servers: what a server answers, and which failures may pass."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import httpx2

from alignkit.data.rows import shown
from alignkit.errors import ConfigError, RolloutError
from alignkit.rewards import secrecy
from alignkit.rewards.limits import GRACE, STOP, Deadline

_TRANSIENT = frozenset({408, 409, 425, 429})  # and 5xx: the same request may succeed later
_LARGEST = 1 << 30  # bytes of a reply: a group of long completions has some MB
CONNECT = 10.0  # seconds


class ServerError(Exception):
    """A failure that may pass, or that another server may not have; the message follows the server's address."""


class NoRouteError(ServerError):
    """The server does not have this address."""


def key_of(key_env: str | None) -> str:
    """Return the servers' key. Raises ConfigError where the variable is not set, or cannot be a header."""
    if key_env is None:
        return ""
    key = os.environ.get(key_env, "")
    if not re.fullmatch("[!-~]+", key):
        raise ConfigError(
            "rollout.key_env is the NAME of the environment variable that holds the key; it is not set, or holds white "
            "space, a line break or special letters"
        )
    return key


def client(key: str) -> httpx2.AsyncClient:
    """Return a client that sends the key, to be used in `async with`."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # concurrency is limited by the caller: waiting for a connection must not time out
    limits = httpx2.Limits(max_connections=None)
    return httpx2.AsyncClient(
        headers={"Accept-Encoding": "identity", **headers}, timeout=httpx2.Timeout(None, connect=CONNECT), limits=limits
    )


def overdue(deadline: Deadline) -> str:
    """Return why servers are waited for no longer, empty while they are. deadline: with the ranks' patience."""
    if (left := deadline.left()) is None or left > 0:
        return ""
    if STOP.at is not None:
        return f"the vLLM servers had not answered {GRACE:g} s after a signal asked the run to stop"
    return (
        f"the vLLM servers had not answered after {deadline.seconds:g} s, and the other ranks wait no longer; "
        "lower rollout.timeout or rollout.retries, or raise timeout_minutes"
    )


class Server:
    """One vLLM server. url: its base. active: prompts that it works on now."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url, self.key, self.active = url.rstrip("/"), key, 0
        self.checked = asyncio.Lock()

    def __str__(self) -> str:
        return f"the vLLM server at {self.url}"

    async def get(self, http: httpx2.AsyncClient, path: str, seconds: float = 30.0) -> Any:
        """Return the JSON at a path. Raises ServerError, or RolloutError where a retry cannot help."""
        return await self._call(http, "GET", path, None, seconds)

    async def post(self, http: httpx2.AsyncClient, path: str, body: Mapping[str, Any], seconds: float) -> Any:
        """Return the JSON of the reply to a request, None for an empty one. Raises as `get` does."""
        return await self._call(http, "POST", path, body, seconds)

    async def has(self, http: httpx2.AsyncClient, path: str) -> bool:
        """Return whether the server has an address that takes POST; nothing is done there."""
        try:
            await self.get(http, path)
        except NoRouteError:
            return False
        except RolloutError:  # 405: it is there, but not for GET
            return True
        return True

    async def _call(
        self, http: httpx2.AsyncClient, verb: str, path: str, body: Mapping[str, Any] | None, seconds: float
    ) -> Any:
        try:
            async with asyncio.timeout(seconds):
                sent = {} if body is None else {"json": dict(body)}
                status, content = await self._reply(http, verb, path, sent)
        except TimeoutError:
            raise ServerError(f"no reply to {path} within {seconds:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ServerError(secrecy.redacted(f"{type(error).__name__}: {error}", self.key)) from None
        text = secrecy.redacted(content.decode(errors="replace"), self.key)
        about = f"{path} gave status {status}, {shown(text, 300)}"
        if status == 404 and "does not exist" not in text:
            raise NoRouteError(about)
        if status in _TRANSIENT or status >= 500 or status == 404:
            raise ServerError(about)
        if status >= 400:
            raise RolloutError(f"{self} refuses a request: {about}")
        try:
            return json.loads(text) if text.startswith(("{", "[")) else None
        except (ValueError, RecursionError):
            raise ServerError(f"{path} gave status {status}, but no JSON: {shown(text, 200)}") from None

    async def _reply(self, http: httpx2.AsyncClient, verb: str, path: str, sent: Any) -> tuple[int, bytes]:
        content = b""
        async with http.stream(verb, f"{self.url}{path}", **sent) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise httpx2.DecodingError("the response is compressed, which was not asked for")
            parts = []
            size = 0
            async for part in response.aiter_raw():
                parts.append(part)
                size += len(part)
                if size > _LARGEST:
                    raise httpx2.DecodingError(f"the response has more than {_LARGEST >> 30} GiB")
            content = b"".join(parts)
        return response.status_code, content
