"""A client for language models with the OpenAI protocol: bounded concurrency, retries, and a cache on disk."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import httpx2
from pydantic import Field, PrivateAttr, field_validator, model_validator

from alignkit.data.rows import shown
from alignkit.errors import RewardError
from alignkit.rewards import secrecy
from alignkit.rewards.judgements import Judgements, key_of
from alignkit.rewards.verifiers import Options

Messages = list[dict[str, str]]
_TRANSIENT = frozenset({408, 409, 425, 429})  # and 5xx: the same request may succeed later
_LONGEST_WAIT = 300.0  # seconds
_LARGEST = 4 << 20  # bytes of a reply


class Endpoint(Options):
    """Options of rewards and judges that call a language model through an OpenAI-compatible endpoint."""

    limits_itself: ClassVar[bool] = True  # by `timeout` and `retries`
    url: str = Field(description="base of the endpoint, such as http://localhost:8000/v1")
    model: str = Field(description="the model's name there")
    key_env: str | None = Field(None, description="NAME of the environment variable that holds the key")
    temperature: float | None = Field(0.0, ge=0, description="null leaves it out of the request")
    max_tokens: int | None = Field(512, ge=1, description="of a reply; null leaves it out of the request")
    body: dict[str, Any] = Field({}, description="additional fields of the request")
    timeout: float = Field(60.0, gt=0, description="seconds for one request")
    retries: int = Field(5, ge=0, le=100, description="after time-outs, lost connections, and statuses 429 and 5xx")
    backoff: float = Field(1.0, ge=0, description="longest wait before the first retry, in seconds; doubles each time")
    concurrency: int = Field(8, ge=1, description="concurrent requests of each process")
    cache_file: Path | None = Field(None, description="default: ~/.cache/alignkit/judgements.sqlite")
    _judgements: Judgements | None = PrivateAttr(None)

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if "@" in url:  # the error of a field's validator prints the value, which may hold a password
            return url
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"is not a URL: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError("give http:// or https://, a host, and a path, such as http://localhost:8000/v1")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        # checked on the whole model, whose errors do not print the value
        if "@" in self.url:
            raise ValueError(
                "url contains a user or a password (@); put it in an environment variable, and set key_env to the "
                "variable's name"
            )
        if "?" in self.url or "#" in self.url:
            raise ValueError("url has a query (?...) or a fragment (#...); give the base only, and the key by key_env")
        if self.key_env is not None and not os.environ.get(self.key_env):
            raise ValueError("key_env is the NAME of the environment variable that holds the key; it is not set")
        if self.key_env is not None and not re.fullmatch("[!-~]+", os.environ[self.key_env]):
            raise ValueError(f"the key in the variable {self.key_env} has white space, a line break or special letters")
        return self

    async def replies(self, questions: Sequence[Messages], keep: Callable[[str], bool]) -> list[str]:
        """Return the model's reply to each question, from the cache where it has it.

        keep: returns whether a reply is usable; usable replies are cached as they arrive. Raises RewardError where the
        endpoint refuses a request, or does not answer after all retries.
        """
        if self._judgements is None:
            self._judgements = Judgements(self.cache_file)
        cache, keys = self._judgements, [key_of(self._request(q) | {"url": self.url}) for q in questions]
        found = {key: cache.get(key) for key in keys}
        missing = {key: q for key, q in zip(keys, questions, strict=True) if found[key] is None}
        slots = asyncio.Semaphore(self.concurrency)
        limits = httpx2.Limits(max_connections=None)  # the semaphore limits them: waiting for it must not time out

        async def fill(client: httpx2.AsyncClient, key: str, question: Messages) -> None:
            async with slots:
                found[key] = reply = await self._reply(client, question)
            if keep(reply):
                cache.put(key, reply)

        try:
            with secrecy.logging(self._key()):
                async with httpx2.AsyncClient(headers=self._headers(), timeout=None, limits=limits) as client:
                    async with asyncio.TaskGroup() as tasks:
                        for key, question in missing.items():
                            tasks.create_task(fill(client, key, question))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return [str(found[key]) for key in keys]

    def close(self) -> None:
        """Close the cache."""
        if self._judgements is not None:
            self._judgements.close()
            self._judgements = None

    def _key(self) -> str:
        return os.environ.get(self.key_env, "") if self.key_env else ""

    def _headers(self) -> dict[str, str]:
        plain = {"Accept-Encoding": "identity"}  # a few compressed bytes could become more than the memory holds
        return plain | ({"Authorization": f"Bearer {self._key()}"} if self.key_env else {})

    def _request(self, messages: Messages) -> dict[str, Any]:
        options = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {
            "model": self.model,
            "messages": messages,
            **{k: v for k, v in options.items() if v is not None},
            **self.body,
        }

    async def _reply(self, client: httpx2.AsyncClient, messages: Messages) -> str:
        """Send a request, and send it again after transient failures."""
        for attempt in range(self.retries + 1):
            found = await self._attempt(client, messages)
            if isinstance(found, str):
                return found
            failed = found
            # jitter, so that requests that failed together are not all sent again at the same moment
            backoff = min(self.backoff * 2**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.0)
            wait = backoff if failed.wait is None else failed.wait
            if attempt == self.retries or wait > _LONGEST_WAIT:
                break
            await asyncio.sleep(wait)
        kept = self._judgements.place if self._judgements else ""
        attempts = f"{attempt + 1} attempt{'s' * (attempt > 0)}"
        raise RewardError(
            f"the language model at {self.url} is not available: {failed.problem} (after {attempts}). Restart it and "
            f"resume the run; its replies so far are kept in {kept}"
        )

    async def _attempt(self, client: httpx2.AsyncClient, messages: Messages) -> str | _Failure:
        """Send one request. Raises RewardError where a retry cannot help."""
        try:
            async with asyncio.timeout(self.timeout):
                status, headers, body = await self._response(client, messages)
        except TimeoutError:
            return _Failure(f"no reply within {self.timeout:g} s")
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            return _Failure(secrecy.redacted(f"{type(error).__name__}: {error}", self._key()))
        text = secrecy.without(body.decode(errors="replace"), self._key())
        about = shown(secrecy.redacted(text, ""), 200)
        if status != 200:
            if status in _TRANSIENT or status >= 500:
                return _Failure(f"status {status}, {about}", _retry_after(headers))
            raise RewardError(
                f"the language model at {self.url} refuses the request: status {status}, {about}; check url, model, "
                f"key_env and body"
            )
        if len(body) > _LARGEST:
            return _Failure(f"status 200, but a reply of more than {_LARGEST >> 20} MiB: {about}")
        try:
            reply = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            reply = None
        return reply if isinstance(reply, str) else _Failure(f"status 200, but no chat completion: {about}")

    async def _response(self, client: httpx2.AsyncClient, messages: Messages) -> tuple[int, httpx2.Headers, bytes]:
        """Return status, headers and body of a response; of a body of more than _LARGEST bytes, its beginning."""
        body = b""
        url = f"{self.url}/chat/completions"
        async with client.stream("POST", url, json=self._request(messages)) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise httpx2.DecodingError("the response is compressed, which was not asked for")
            async for part in response.aiter_raw():
                body += part
                if len(body) > _LARGEST:
                    break
        return response.status_code, response.headers, body


class _Failure(NamedTuple):
    """A transient failure, and the seconds that the endpoint asks to wait, None where it does not."""

    problem: str
    wait: float | None = None


def _retry_after(headers: httpx2.Headers) -> float | None:
    """Return the seconds of the Retry-After header, a number or a date; None without one."""
    value = headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
