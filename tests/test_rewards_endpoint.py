"""What an endpoint may send: too much, too deep, compressed, or the key that it was sent."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, chat_reply, chat_server

from alignkit.errors import ConfigError, RewardError
from alignkit.rewards import Answers, build_rewards, check_rewards
from alignkit.rewards.secrecy import redacted

KEY = 'sk-very"secret/key+1'
ANSWERS = Answers(["what?"], ["this"], {}, [11], [1], [True])


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


@pytest.fixture
def spec(chat: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    async def at_once(seconds: float) -> None:
        pass

    monkeypatch.setattr(asyncio, "sleep", at_once)
    monkeypatch.setenv("THE_KEY", KEY)
    given = {"use": "llm", "url": chat.url, "model": "m", "key_env": "THE_KEY", "retries": 1}
    return given | {"cache_file": tmp_path / "judgements.sqlite"}


def test_a_reply_without_an_end_is_read_up_to_a_limit(chat: ChatServer, spec: dict[str, Any]) -> None:
    size = 60 << 20
    chat.respond = lambda request: (200, {}, "x" * size)
    with pytest.raises(RewardError, match=r"a reply of more than 4 MiB: 'xxx.*after 2 attempts"):
        build_rewards(spec | {"timeout": 60}).score(ANSWERS)
    assert len(chat.requests) == 2
    deadline = time.monotonic() + 10
    while len(chat.sent) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert max(chat.sent) < size  # the connection was closed before all of it was sent


def test_a_large_reply_within_the_limit_is_read(chat: ChatServer, spec: dict[str, Any]) -> None:
    chat.script(chat_reply("word " * 700_000 + "Score: 7"))
    assert build_rewards(spec).score(ANSWERS).total == [0.7]


@pytest.mark.parametrize(
    "body",
    [
        "[" * 1_000_000,
        '{"choices": ' * 200_000,
        '{"choices": [{"message": {"content": %s}}]}' % ("9" * 5000),
        '{"choices": {"0": 1}}',
        "\x00\xff",
        "",
    ],
    ids=["deep list", "deep object", "huge number", "no list", "no text", "nothing"],
)
def test_what_is_no_chat_completion_is_asked_for_again_and_refused(
    body: str, chat: ChatServer, spec: dict[str, Any]
) -> None:
    chat.script((200, {}, body))
    with pytest.raises(RewardError, match=r"status 200, but no chat completion: .*after 2 attempts") as caught:
        build_rewards(spec).score(ANSWERS)
    assert len(str(caught.value)) < 1000
    chat.script((200, {}, body), chat_reply("Score: 2"))
    assert build_rewards(spec).score(ANSWERS).total == [0.2]


def test_a_compressed_reply_is_not_unpacked(chat: ChatServer, spec: dict[str, Any]) -> None:
    chat.script((200, {"content-encoding": "gzip"}, "bomb"))
    with pytest.raises(RewardError, match="DecodingError: the response is compressed, which was not asked for"):
        build_rewards(spec).score(ANSWERS)
    assert chat.requests[0][1]["accept-encoding"] == "identity"


@pytest.mark.parametrize("wait", ["9" * 400, "1e400", "inf", "86400", "Fri, 31 Dec 9999 23:59:59 GMT", "-5", "²"])
def test_no_wait_is_longer_than_five_minutes(
    wait: str, chat: ChatServer, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", note)
    monkeypatch.setattr("alignkit.rewards.endpoint._retry_after", _as_text(wait))
    chat.script((429, {}, "later"))
    with pytest.raises(RewardError, match="status 429"):
        build_rewards(spec).score(ANSWERS)
    assert all(0 <= seconds <= 300 for seconds in waits)


def _as_text(wait: str) -> Any:
    from alignkit.rewards.endpoint import _retry_after

    return lambda headers: _retry_after({"retry-after": wait})  # type: ignore[arg-type]


# Secrets


@pytest.mark.parametrize("status", [401, 500, 200])
@pytest.mark.parametrize("form", [KEY, json.dumps(KEY), "sk-very%22secret%2Fkey%2B1"])
def test_an_endpoint_that_repeats_the_key(
    form: str, status: int, chat: ChatServer, spec: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    # the key stands where the message is cut: a part of it would remain if it were cut first
    said = "x" * 185 + f" no such key: {form} "
    chat.script((status, {"x-echo": f"Bearer {form}"}, said))
    with pytest.raises(RewardError) as caught:
        build_rewards(spec).score(ANSWERS)
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert chat.requests[0][1]["authorization"] == f"Bearer {KEY}"  # it was sent
    assert "x-echo" in caplog.text  # the client does log headers
    for part in ("sk-very", "secret"):
        assert part not in told
    assert not [r for r in caplog.records if "secret" in repr(r.__dict__)]


def test_a_reply_that_repeats_the_key_is_stored_without_it(chat: ChatServer, spec: dict[str, Any]) -> None:
    chat.script(chat_reply(f"your key is {KEY}, so Score: 3"))
    rewards = build_rewards(spec)
    assert rewards.score(ANSWERS).total == [0.3]
    rewards.close()
    assert b"secret" not in spec["cache_file"].read_bytes()
    chat.script(chat_reply(f"no number, but {KEY}"))
    with pytest.raises(RewardError, match=r"cannot read the reply 'no number, but \[key\]'"):
        build_rewards(spec | {"model": "other"}).score(ANSWERS)


def test_a_word_that_is_a_placeholder_stays(
    chat: ChatServer, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", "Score")
    chat.script(chat_reply("Score: 4"))
    assert build_rewards(spec).score(ANSWERS).total == [0.4]


@pytest.mark.parametrize("key", ["two words-secret", "secret-line\n", "sécret-key"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(
    key: str, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", key)
    with pytest.raises(ConfigError, match="THE_KEY has white space, a line break or special letters") as caught:
        check_rewards(spec)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["ftp://me:pa55word@host", "http://me:pa55word@host:port/v1", "http://me:pa55/word@host"]
)
def test_a_wrong_url_with_a_password_is_refused_unseen(url: str, spec: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="url contains a user or a password") as caught:
        check_rewards(spec | {"url": url})
    assert "pa55" not in str(caught.value)


def test_the_password_of_a_proxy_is_not_shown(
    chat: ChatServer, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert redacted("cannot reach http://me:pa55word@proxy:1/", "") == "cannot reach http://[password]@proxy:1/"
    monkeypatch.setenv("HTTP_PROXY", f"http://me:pa55word@{chat.url.removeprefix('http://')}".removesuffix("/v1"))
    monkeypatch.setenv("NO_PROXY", "")
    chat.script((407, {}, "the proxy http://me:pa55word@proxy refuses"))
    with pytest.raises(RewardError, match="status 407") as caught:
        build_rewards(spec | {"url": "http://elsewhere.invalid/v1"}).score(ANSWERS)
    assert chat.requests
    assert "pa55word" not in "".join(traceback.format_exception(caught.value))
