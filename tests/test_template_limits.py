"""Templates in their process: limits of time and memory, the same drafts as without it, and nothing that is left."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from families import tokenizer_of

from alignkit.data import load
from alignkit.data.chat import Chat, SpecialTokens, render, rendering, turn_end
from alignkit.data.chat.helper import Helper
from alignkit.errors import ModelError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
GIB = 1 << 30
LOOP = "{% for i in range(40) %}"


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    rendering.close()
    yield
    rendering.close()


def rows_of(*contents: str) -> Any:
    answer = {"role": "assistant", "content": "yes"}
    return load([{"messages": [{"role": "user", "content": c}, answer]} for c in contents], "text").rows


def tokenizer(extra: str = "") -> Any:
    made = tokenizer_of("qwen2_5")
    made.chat_template = extra + made.chat_template
    return made


def drafted(made: Any, *contents: str, chat: Chat | None = None) -> list[Any]:
    return render(rows_of(*contents), "data", made, SpecialTokens(made), chat or Chat())


def pids() -> list[int]:
    return [kept.helper.pid for kept in rendering._HELPERS]


def where(condition: str, then: str) -> str:
    return f"{{% if messages[0].content == '{condition}' %}}{then}{{% endif %}}"


@pytest.mark.parametrize(
    "bomb",
    [
        where("bomb", "{% set n = 3000000000 %}{{ 'x' * n }}"),
        where("bomb", "{{ 'x' * 3000000000 }}"),
        where("bomb", "{% set n = 3000 %}{{ (['x' * 1000000] * n) | join }}"),
        where("bomb", "{% for i in range(90000) %}{{ 'x' * 30000 }}{% endfor %}"),
        where(
            "bomb", "{% set n = namespace(t='x' * 1000) %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}"
        ),
    ],
    ids=["product", "folded when compiled", "join", "output", "doubling"],
)
def test_a_template_that_needs_too_much_memory_ends_as_an_error_of_its_row(bomb: str) -> None:
    made = tokenizer(bomb)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    told = "the chat template of qwen2_5 needs more than 1024 MiB of memory for row 2,.*Read tokenizer"
    with pytest.raises(ModelError, match=told):
        drafted(made, "said", "bomb", "said")
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
    assert pids() == [0]
    made.chat_template = tokenizer().chat_template
    assert len(drafted(made, "said")) == 1


def test_a_text_that_is_too_long_to_be_taken_is_refused_there() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=r"for row 2, or makes more than 64 MiB of text of it"):
        drafted(tokenizer(where("long", "{% set n = 70000000 %}{{ 'x' * n }}")), "said", "long")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_the_row_at_which_it_hangs_is_named_though_answers_come_together() -> None:
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    contents = ["said"] * 100
    contents[70] = "loop"
    with pytest.raises(ModelError, match=r"template of qwen2_5 did not finish row 71 within 0.5 s"):
        drafted(tokenizer(where("loop", loop)), *contents, chat=Chat(seconds=0.5))
    assert pids() == [0]


def test_the_process_is_kept_and_belongs_to_one_template() -> None:
    made = tokenizer()
    drafted(made, "a")
    (first,) = pids()
    drafted(made, "b")
    assert pids() == [first]
    drafted(made, "b", chat=Chat(special_tokens=True))
    assert len(set(pids())) == 2
    made.chat_template = "{% set x = 1 %}" + made.chat_template
    drafted(made, "b")
    assert len(pids()) == 2
    assert first not in pids()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_process_that_was_killed_is_started_again() -> None:
    made = tokenizer()
    wanted = drafted(made, "a")
    os.kill(pids()[0], signal.SIGKILL)
    time.sleep(0.1)
    assert drafted(made, "a") == wanted


def test_a_process_of_a_large_one_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.data.chat.helper._SMALL", 0)
    assert len(drafted(tokenizer(), "a")) == 1
    assert pids() == []


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gptoss"])
def test_without_a_process_the_drafts_are_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = tokenizer_of(family)
    contents = ["a", "é😀 <|im_end|>", 'quote " and \\ ', "x" * 300_000]
    there = drafted(made, *contents)
    rendering.close()

    def cannot(*_: Any) -> Any:
        raise OSError("no processes left")

    rendering._warn.cache_clear()
    monkeypatch.setattr(rendering, "Helper", cannot)
    assert [drafted(made, *contents) for _ in range(2)] == [there, there]
    assert caplog.messages == [
        "chat templates are rendered with a limit of time, and none of memory: no processes left"
    ]


def helped(work: Callable[[list[Any]], Iterator[Any]], n: int = 1) -> list[Any]:
    helper = Helper(work, "mine")
    try:
        return list(helper.ask(list(range(n)), list(range(1, n + 1)), 5.0))
    finally:
        helper.close()


def test_it_has_no_file_of_this_process_and_limits() -> None:
    held = os.open(__file__, os.O_RDONLY)
    (found,) = helped(lambda items: iter([[os.listdir("/proc/self/fd"), resource.getrlimit(resource.RLIMIT_AS)[0]]]))
    assert str(held) not in found[0]
    assert len(found[0]) == 4  # standard error, the two pipes, and the folder that is read
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    assert abs(found[1] - size - GIB) < 512 << 20
    os.close(held)


@pytest.mark.parametrize("code", [3, -9])
def test_a_process_that_ends_names_its_row(code: int) -> None:
    def ends(items: list[Any]) -> Iterator[Any]:
        yield "one"
        if code == -9:
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(code)

    with pytest.raises(ModelError, match="the chat template of mine ended its process at row 2"):
        helped(ends, 3)


def test_an_answer_that_describes_no_draft_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_answer", lambda drafter, row: ["draft", "p", 3, {}, None, [], 1, 2])
    with pytest.raises(ModelError, match="broke the process that renders it, at row 1"):
        drafted(tokenizer(), "a")


def test_more_rows_and_bytes_than_a_pipe_holds_come_in_order() -> None:
    answers = helped(lambda items: (str(i) * 3000 for i in items), 300)
    assert answers == [str(i) * 3000 for i in range(300)]
    assert helped(lambda items: iter([{"deep": json.dumps("é\ud83d")}])) == [{"deep": json.dumps("é\ud83d")}]


def test_the_end_of_a_turn_is_found_within_the_limits() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = tokenizer()
    assert made.convert_ids_to_tokens(turn_end(made)) == "<|im_end|>"
    assert turn_end(tokenizer("{% set n = 3000000000 %}{{ 'x' * n }}")) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
