"""A language model as a reward, asked through a real server: retries, time-outs, limits, and a cache."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, chat_reply, chat_server

from alignkit.errors import ConfigError, RewardError
from alignkit.rewards import Answers, build_rewards, check_rewards, judgements
from alignkit.rewards.judgements import default_path


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited, without waiting."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return found


@pytest.fixture
def spec(chat: ChatServer, tmp_path: Path) -> dict[str, Any]:
    return {"use": "llm", "url": chat.url, "model": "judge", "cache_file": tmp_path / "judgements.sqlite"}


def answers(*completions: str, **columns: list[Any]) -> Answers:
    n = len(completions)
    prompts: list[Any] = [f"prompt {i}" for i in range(n)]
    return Answers(prompts, list(completions), columns, list(range(11, 11 + n)), [3] * n, [True] * n)


def score(spec: Any, asked: Answers) -> list[float]:
    rewards = build_rewards(spec)
    try:
        return rewards.score(asked).total
    finally:
        rewards.close()


def test_the_request_is_one_of_the_protocol(
    chat: ChatServer, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    chat.script(chat_reply("It is fine.\nScore: 7.5"))
    assert score(spec | {"key_env": "MY_KEY", "body": {"top_p": 0.5}}, answers("the answer")) == [0.75]
    ((path, headers, body),) = chat.requests
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer secret"
    assert {k: body[k] for k in ("model", "temperature", "max_tokens", "top_p")} == {
        "model": "judge", "temperature": 0.0, "max_tokens": 512, "top_p": 0.5,
    }  # fmt: skip
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert "<prompt>\nprompt 0\n</prompt>" in message["content"]
    assert "<answer>\nthe answer\n</answer>" in message["content"]
    assert "from 0 (useless) to 10 (perfect)" in message["content"]


def test_options_that_are_null_are_not_sent(chat: ChatServer, spec: dict[str, Any]) -> None:
    score(spec | {"temperature": None, "max_tokens": None}, answers("a"))
    assert set(chat.requests[0][2]) == {"model", "messages"}
    assert "authorization" not in chat.requests[0][1]


@pytest.mark.parametrize(
    ("reply", "scale", "want"),
    [
        ("Score: 10", (0, 10), 1.0),
        ("score: **2**", (0, 10), 0.2),
        ("First I thought Score: 9, but no.\n\nScore: 4/10", (0, 10), 0.4),
        ("7", (0, 10), 0.7),
        (" 8.5/10.\n", (0, 10), 0.85),
        ("Score: -1", (-2, 2), 0.25),
        ("Score: 1,000", (0, 4000), 0.25),  # numbers are read as those in answers are
        ("Score: 1e1", (0, 20), 0.5),
        ("SCORE = 3", (1, 5), 0.5),
    ],
)
def test_a_reply_is_read(
    chat: ChatServer, spec: dict[str, Any], reply: str, scale: tuple[int, int], want: float
) -> None:
    chat.script(chat_reply(reply))
    assert score(spec | {"scale": scale}, answers("a")) == [pytest.approx(want)]


def test_a_reply_of_blanks_is_read_at_once(chat: ChatServer, spec: dict[str, Any]) -> None:
    # with any backtracking across the repetitions this would take hours
    chat.respond = lambda request: chat_reply("7" + " " * 200_000 + "x")
    assert score(spec | {"fallback": 0.5}, answers("a")) == [0.5]


def test_a_row_without_a_column_of_the_template_is_named(chat: ChatServer, spec: dict[str, Any]) -> None:
    with pytest.raises(
        RewardError, match="'llm', row 12, prompt 'prompt 1': the row has no value in the column 'gold'"
    ):
        score(spec | {"template": "$completion or $gold?"}, answers("a", "b", gold=["x", None], other=[None, None]))
    assert not chat.requests


@pytest.mark.parametrize("reply", ["I would rather not.", "Score: 11", "", "There are 3 apples.", "Score: high"])
def test_a_reply_that_cannot_be_read(chat: ChatServer, spec: dict[str, Any], reply: str) -> None:
    chat.respond = lambda request: chat_reply(reply if "bad" in request["messages"][0]["content"] else "Score: 1")
    with pytest.raises(RewardError, match=r"'llm', row 12, prompt 'prompt 1': cannot read the reply .*`fallback`"):
        score(spec, answers("good", "bad"))
    n = len(chat.requests)
    assert score(spec | {"fallback": 0.5}, answers("good", "bad")) == [0.1, 0.5]
    assert len(chat.requests) == n + 1  # what could not be used was not kept, what could be was
    assert score(spec | {"fallback": 0.25}, answers("good", "bad")) == [0.1, 0.25]
    assert len(chat.requests) == n + 1  # with a fallback it is of use


def test_the_template_sees_the_rows_columns(chat: ChatServer, spec: dict[str, Any]) -> None:
    template = "Is $completion worth $$5, and $answer? $prompt"
    score(spec | {"template": template}, answers("$x", answer=[42], other=["unused"]))
    assert chat.questions == ["Is $x worth $5, and 42? prompt 0"]
    with pytest.raises(RewardError, match=r"'llm' needs the column 'answer'; .* Did you mean 'answers'"):
        score(spec | {"template": template}, answers("x", answers=[42]))


def test_messages_are_shown_with_their_roles(chat: ChatServer, spec: dict[str, Any]) -> None:
    prompt = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    asked = Answers([prompt], [[{"role": "assistant", "content": "hi"}]], {}, [1], [1], [True])
    score(spec | {"template": "$prompt|$completion"}, asked)
    assert chat.questions == ["system: be kind\n\nuser: hello|hi"]


# --------------------------------------------------------------------------------------------------- what may pass


def test_failures_that_pass(chat: ChatServer, spec: dict[str, Any], waits: list[float]) -> None:
    garbage = (200, {}, "<html>gateway</html>")
    chat.script(
        (500, {}, "boom"),
        (503, {}, ""),
        garbage,
        chat_reply(None),
        (200, {}, '{"choices": []}'),
        chat_reply("Score: 3"),
    )
    assert score(spec | {"backoff": 0.5}, answers("a")) == [0.3]
    assert len(chat.requests) == 6
    longest = [0.5, 1.0, 2.0, 4.0, 8.0]
    assert len(waits) == len(longest)
    assert [(w, most) for w, most in zip(waits, longest, strict=True) if not most / 2 <= w <= most] == []


def test_requests_that_failed_together_are_not_all_sent_again_together(
    chat: ChatServer, spec: dict[str, Any], waits: list[float]
) -> None:
    def respond(request: dict[str, Any]) -> Any:
        again = chat.questions.count(request["messages"][0]["content"]) > 1
        return chat_reply("Score: 3") if again else (500, {}, "")

    chat.respond = respond
    assert score(spec | {"template": "$completion", "backoff": 4}, answers(*"abcdefgh")) == [0.3] * 8
    assert len(set(waits)) == 8
    assert all(2.0 <= wait <= 4.0 for wait in waits)


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [("7", 7.0, 7.0), ("Thu, 01 Jan 1970 00:01:00 GMT", 20.0, 20.0), ("soon", 0.5, 1.0), ("300", 300.0, 300.0)],
)
def test_the_endpoint_says_when_to_come_again(
    chat: ChatServer,
    spec: dict[str, Any],
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    header: str,
    least: float,
    most: float,
) -> None:
    monkeypatch.setattr("alignkit.rewards.endpoint.time", type("Clock", (), {"time": staticmethod(lambda: 40.0)}))
    chat.script((429, {"Retry-After": header}, "slow down"), chat_reply("Score: 3"))
    assert score(spec, answers("a")) == [0.3]
    (wait,) = waits
    assert least <= wait <= most  # what the endpoint asks for is waited exactly


def test_an_endpoint_that_wants_a_day_is_dead(chat: ChatServer, spec: dict[str, Any], waits: list[float]) -> None:
    chat.script((429, {"Retry-After": "86400"}, "quota"))
    with pytest.raises(RewardError, match="status 429, 'quota' \\(after 1 attempt\\)"):
        score(spec, answers("a"))
    assert waits == []


def test_a_time_out_is_asked_again(chat: ChatServer, spec: dict[str, Any], waits: list[float]) -> None:
    first = threading.Event()

    def respond(request: dict[str, Any]) -> Any:
        if not first.is_set():
            first.set()
            return chat.hang()
        return chat_reply("Score: 6")

    chat.respond = respond
    assert score(spec | {"timeout": 0.3}, answers("a")) == [0.6]
    assert len(chat.requests) == 2


# ------------------------------------------------------------------------------------------------ what does not pass


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_an_endpoint_that_stays_dead(
    spec: dict[str, Any], waits: list[float], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    ends = {0.5: min, 1.0: max}
    monkeypatch.setattr("alignkit.rewards.endpoint.random.uniform", lambda *bounds: ends[share](bounds))
    with chat_server() as gone:
        url = gone.url
    with pytest.raises(
        RewardError,
        match=r"^reward 'llm': the language model at http://.*/v1 is not available: ConnectError.*after 3 attempts",
    ):
        score(spec | {"url": url, "retries": 2, "backoff": 200}, answers("a", "b"))
    assert set(waits) <= {200.0 * share, 300.0 * share}  # the wait is bounded


def test_the_error_says_status_and_what_to_do(chat: ChatServer, spec: dict[str, Any], waits: list[float]) -> None:
    chat.script((500, {}, "out of memory"))
    with pytest.raises(RewardError, match=r"status 500, 'out of memory' \(after 2 attempts\)\. Restart it and resume"):
        score(spec | {"retries": 1}, answers("a"))


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_a_refusal_is_not_asked_again(chat: ChatServer, spec: dict[str, Any], waits: list[float], status: int) -> None:
    chat.script((status, {}, "no such model"))
    with pytest.raises(
        RewardError, match=f"refuses the request: status {status}, 'no such model'; check url, model, key_env"
    ):
        score(spec, answers("a"))
    assert len(chat.requests) == 1
    assert waits == []


# ----------------------------------------------------------------------------------------------- concurrency, cache


def test_requests_at_once_are_bounded_and_come_back_in_order(chat: ChatServer, spec: dict[str, Any]) -> None:
    together, fourth = threading.Barrier(3), threading.Event()

    def respond(request: dict[str, Any]) -> Any:
        if len(chat.requests) > 3:
            fourth.set()
        together.wait(10)  # goes on when three are here, so fewer at once would fail
        fourth.wait(0.3)  # the first three stay for a moment, so that a fourth would meet them
        fourth.set()
        return chat_reply(f"Score: {request['messages'][0]['content']}")

    chat.respond = respond
    scores = score(spec | {"concurrency": 3, "template": "$completion", "retries": 0}, answers(*"012345678"))
    assert scores == pytest.approx([i / 10 for i in range(9)])
    assert chat.peak == 3


def test_what_was_answered_is_not_asked_again(chat: ChatServer, spec: dict[str, Any]) -> None:
    first = score(spec, answers("a", "b"))
    assert len(chat.requests) == 2
    assert score(spec, answers("a", "b", "c")) == [*first, 0.5]
    assert len(chat.requests) == 3
    again = {"url": chat.url.replace("127.0.0.1", "localhost")}
    for change in (again, {"model": "other"}, {"temperature": 1.0}, {"body": {"seed": 1}}, {"template": "$completion"}):
        n = len(chat.requests)
        score(spec | change, answers("a"))
        assert len(chat.requests) == n + 1, change
    n = len(chat.requests)
    score(spec | {"concurrency": 1, "timeout": 5, "scale": (0, 10)}, answers("a"))
    assert len(chat.requests) == n


def test_equal_questions_are_asked_once(chat: ChatServer, spec: dict[str, Any]) -> None:
    assert score(spec | {"template": "$completion"}, answers("a", "a", "b", "a")) == [0.5] * 4
    assert sorted(chat.questions) == ["a", "b"]


def test_what_came_before_the_endpoint_died_is_kept(chat: ChatServer, spec: dict[str, Any], waits: list[float]) -> None:
    chat.script(chat_reply("Score: 1"), chat_reply("Score: 2"), (500, {}, ""))
    options = spec | {"template": "$completion", "concurrency": 1, "retries": 0}
    with pytest.raises(RewardError, match=r"kept in .*judgements\.sqlite"):
        score(options, answers("a", "b", "c"))
    chat.script(chat_reply("Score: 3"))
    chat.requests.clear()
    assert score(options, answers("a", "b", "c")) == pytest.approx([0.1, 0.2, 0.3])
    assert chat.questions == ["c"]


def test_a_text_file_in_the_caches_place_stays_and_is_said(
    chat: ChatServer, spec: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "text.sqlite"
    file.write_text(text := "this is no database, whatever it is called\n" * 50)
    rewards = build_rewards(spec | {"cache_file": file})
    assert rewards.score(answers("a", "b")).total == rewards.score(answers("a", "b")).total == [0.5, 0.5]
    assert len(chat.requests) == 2  # the second time from memory
    (said,) = [m for m in caplog.messages if "judgements" in m]
    assert "the judgements" in said
    assert "cache_file" in said
    assert "The run continues without it" in said
    assert file.read_text() == text


@pytest.mark.parametrize("kept", [0, 100, 3000])
def test_a_damaged_cache_of_judgements_is_set_aside(
    kept: int, chat: ChatServer, spec: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    many = answers(*(f"{i} " * 40 for i in range(60)))
    assert score(spec, many) == [0.5] * 60
    file = spec["cache_file"]
    file.write_bytes(bytes(5000) if kept == 0 else file.read_bytes()[:kept])
    damaged = file.read_bytes()
    assert score(spec, many) == [0.5] * 60
    assert len(chat.requests) == 120
    (said,) = [m for m in caplog.messages if "judgements" in m]
    (aside,) = file.parent.glob("judgements.sqlite.damaged-*[0-9]")
    assert str(aside) in said
    assert aside.read_bytes() == damaged
    assert score(spec, many) == [0.5] * 60
    assert len(chat.requests) == 120  # the new file is in use


def test_a_full_disk_costs_no_reply(
    chat: ChatServer, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: object, key: str, reply: str) -> None:
        self._run("PRAGMA max_page_count = 1")  # type: ignore[attr-defined]
        put(self, key, reply)  # type: ignore[arg-type]

    put = judgements._File.put
    monkeypatch.setattr(judgements._File, "put", full)
    rewards = build_rewards(spec)
    long = answers(*(c * 9000 for c in "abcd"))
    chat.script(chat_reply("Score: 5" + " " * 9000))
    assert rewards.score(long).total == rewards.score(long).total == [0.5] * 4
    assert len(chat.requests) == 4
    (said,) = [m for m in caplog.messages if "judgements" in m]
    assert "database or disk is full" in said


@pytest.mark.parametrize("value", ["no JSON", "[1]", "[" * 100_000])
def test_a_damaged_reply_is_asked_again(chat: ChatServer, spec: dict[str, Any], value: str) -> None:
    assert score(spec, answers("a")) == [0.5]
    with sqlite3.connect(spec["cache_file"]) as db:
        db.execute("UPDATE judgements SET reply = ?", [value])
    db.close()
    assert score(spec, answers("a")) == [0.5]
    assert len(chat.requests) == 2


def test_the_cache_holds_json_and_no_key(
    chat: ChatServer, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "very-secret")
    chat.script(chat_reply("Score: 5 é\ud83d"))
    score(spec | {"key_env": "MY_KEY"}, answers("a"))
    rows = sqlite3.connect(spec["cache_file"]).execute("SELECT key, reply FROM judgements").fetchall()
    assert [reply for _, reply in rows] == ['"Score: 5 \\u00e9\\ud83d"']
    assert b"very-secret" not in spec["cache_file"].read_bytes()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNKIT_JUDGEMENTS", "/somewhere/else.sqlite")
    assert default_path() == Path("/somewhere/else.sqlite")
    monkeypatch.delenv("ALIGNKIT_JUDGEMENTS")
    assert default_path() == Path("~/.cache/alignkit/judgements.sqlite").expanduser()


def test_inside_of_a_running_event_loop(spec: dict[str, Any]) -> None:
    async def notebook() -> list[float]:
        return score(spec, answers("a"))

    assert asyncio.run(notebook()) == [0.5]


# ---------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"url": "localhost:8000"}, "url: give http:// or https://"),
        ({"url": "ftp://host/v1"}, "url: give http:// or https://"),
        ({"url": "http://host/v1#part"}, r"url has a query \(\?...\) or a fragment"),
        ({"key_env": "NO_SUCH_VARIABLE"}, "key_env is the NAME of the environment variable"),
        ({"template": "costs $5"}, r"template: has a \$ without a name after it"),
        ({"scale": (5, 5)}, "scale: give the lowest score first"),
        ({"concurrency": 0}, "concurrency"),
        ({"retry": 3}, "no option 'retry'. Did you mean 'retries'"),
    ],
)
def test_wrong_options_are_refused_early(spec: dict[str, Any], change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_rewards(spec | change)


@pytest.mark.parametrize(
    "change",
    [{"url": "http://me:pa55word@host/v1"}, {"url": "http://host/v1?key=pa55word"}, {"key_env": "sk-pa55word"}],
)
def test_an_error_shows_no_secret(spec: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_rewards(spec | change)
    assert "pa55word" not in str(caught.value)


def test_what_is_needed_is_said() -> None:
    with pytest.raises(ConfigError, match="reward 'llm': url: Field required; model: Field required"):
        check_rewards("llm")
