"""Judges: which of two completions is better, by functions, models, Bradley-Terry and language models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, chat_reply, chat_server
from classifiers import EOS, alone, ids_of, write_classifier
from hypothesis import given
from hypothesis import strategies as st

from alignkit.errors import ConfigError, RewardError
from alignkit.pairwise import PAIRWISE
from alignkit.rewards import Answers, build_judge, build_rewards, check_judge


def answers(*completions: Any, prompts: list[Any] | None = None, **columns: list[Any]) -> Answers:
    n = len(completions)
    rows = list(range(3, 3 + n))
    return Answers(
        prompts or ["Who? "] * n, list(completions), columns, rows, [len(c) for c in completions], [True] * n
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ------------------------------------------------------------------------------------------------------- functions


def longer(prompts: Any, first: Any, second: Any, **columns: Any) -> list[float]:
    return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]


def test_a_function() -> None:
    judge = build_judge(longer)
    assert judge.wins(answers("aa", "a", "aa"), answers("a", "aa", "aa")) == [1.0, 0.0, 0.5]
    assert judge.wins(answers(), answers()) == []
    judge.close()


def test_an_async_function_with_a_column_and_an_option() -> None:
    async def closer(first: Any, second: Any, target: Any, sharpness: float) -> list[float]:
        return [
            sigmoid(sharpness * (abs(len(b) - t) - abs(len(a) - t)))
            for a, b, t in zip(first, second, target, strict=True)
        ]

    wins = build_judge({"use": closer, "sharpness": 2.0}).wins(answers("abc", target=[3]), answers("a", target=[3]))
    assert wins == [pytest.approx(sigmoid(4.0))]


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ([1.5, 0.0], r"judge 'mine' returned 1.5 for row 3, prompt 'Who\? '; .* from 0 to 1"),
        ([0.5, -0.1], "judge 'mine' returned -0.1 for row 4"),
        ([None, 0.5], "judge 'mine' returned None for row 3"),
        ([0.5, math.nan], "judge 'mine' returned nan for row 4"),
        ([0.5], "judge 'mine' returned 1 values for 2"),
        (0.5, "judge 'mine' must return a list of 2 numbers, got 0.5"),
    ],
)
def test_what_is_no_probability_is_named(said: Any, says: str) -> None:
    judge = build_judge({"use": lambda first: said, "name": "mine"})
    with pytest.raises(RewardError, match=says):
        judge.wins(answers("a", "b"), answers("c", "d"))


# ---------------------------------------------------------------------------------------------------- Bradley-Terry


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=4), st.floats(0.1, 3))
def test_bradley_terry_by_hand(scores: list[tuple[float, float]], scale: float) -> None:
    values = {f"{side}{i}": pair[side] for i, pair in enumerate(scores) for side in (0, 1)}
    judge = build_judge({"bradley_terry": lambda completions: [values[c] for c in completions], "scale": scale})
    first, second = (answers(*(f"{side}{i}" for i in range(len(scores)))) for side in (0, 1))
    want = [sigmoid(scale * (a - b)) for a, b in scores]
    assert judge.wins(first, second) == pytest.approx(want, abs=1e-12)
    assert judge.wins(second, first) == pytest.approx([1 - p for p in want], abs=1e-12)


def test_bradley_terry_takes_any_reward(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "rm")
    first, second = answers("An owl", "no"), answers("a fox", "")
    a, b = (build_rewards(folder).score(x).total for x in (first, second))
    assert build_judge({"bradley_terry": folder}).wins(first, second) == pytest.approx(
        [sigmoid(x - y) for x, y in zip(a, b, strict=True)]
    )
    spec = {"bradley_terry": [{"use": "brevity", "limit": 10, "weight": 2}, {"use": "length", "max": 4}]}
    check_judge(spec)
    # 4 tokens against 10: 2 * (-0.4) + 1 and 2 * (-1) + 0
    assert build_judge(spec).wins(answers("aaaa"), answers("a" * 10)) == [pytest.approx(sigmoid(0.2 + 2))]


# ------------------------------------------------------------------------------------------------- preference models


def test_a_preference_model_in_both_orders(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "pm", **{PAIRWISE: True})
    check_judge(folder)
    first, second = answers("An owl", "x", "same", ""), answers("a fox", "A much longer answer", "same", "y")
    wins = build_judge({"use": folder, "max_tokens": 60}).wins(first, second)

    def want(a: str, b: str) -> float:
        prompt, a_ids, b_ids = (ids_of(text) for text in ("Who? ", a, b))
        there = alone(folder, [*prompt, *a_ids, EOS, *b_ids, EOS])
        return sigmoid(there - alone(folder, [*prompt, *b_ids, EOS, *a_ids, EOS]))

    assert wins == pytest.approx(
        [want("An owl", "a fox"), want("x", "A much longer answer"), 0.5, want("", "y")], abs=1e-5
    )
    assert wins[2] == 0.5
    assert build_judge(folder).wins(second, first) == pytest.approx([1 - p for p in wins], abs=1e-6)
    assert max(abs(p - 0.5) for p in wins) > 0.01


def test_a_chat_in_a_preference_model(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "pm", **{PAIRWISE: True})
    prompt = [{"role": "user", "content": "Who?"}]
    owl, fox = ([{"role": "assistant", "content": text}] for text in ("An owl", "a fox"))
    asked = [*ids_of("user:Who?"), EOS, *ids_of("assistant:")]
    a, b = [*ids_of("An owl"), EOS], [*ids_of("a fox"), EOS]
    want = sigmoid(alone(folder, [*asked, *a, *b]) - alone(folder, [*asked, *b, *a]))
    wins = build_judge(folder).wins(answers(owl, prompts=[prompt]), answers(fox, prompts=[prompt]))
    assert wins == [pytest.approx(want, abs=1e-5)]


def test_an_error_of_the_second_order_names_the_right_row(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "pm", "gpt2", **{PAIRWISE: True})
    with pytest.raises(RewardError, match=r"judge 'pm', row 4, .*: prompt and completion have"):
        build_judge(folder).wins(answers("a", "b" * 70), answers("a", "b"))


# --------------------------------------------------------------------------------------------------- language models


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


@pytest.fixture
def spec(chat: ChatServer, tmp_path: Path) -> dict[str, Any]:
    return {
        "use": "llm",
        "url": chat.url,
        "model": "m",
        "cache_file": tmp_path / "c.sqlite",
        "template": "$first|$second",
    }


def test_positions_are_swapped_and_averaged(chat: ChatServer, spec: dict[str, Any]) -> None:
    replies = {
        "good|bad": "Winner: A", "bad|good": "I think so.\nWinner: B",  # it means it
        "one|two": "**Winner: A**", "two|one": "a",  # it likes what stands first
        "this|that": "Winner: A or so. Winner: tie", "that|this": "B.",
    }  # fmt: skip
    chat.respond = lambda request: chat_reply(replies[request["messages"][0]["content"]])
    judge = build_judge(spec)
    assert judge.wins(answers("good", "bad", "one", "this"), answers("bad", "good", "two", "that")) == [1, 0, 0.5, 0.75]
    assert sorted(chat.questions) == sorted(replies)  # each order of a pair once
    judge.close()


def test_the_default_question_names_both_answers(chat: ChatServer, spec: dict[str, Any]) -> None:
    chat.script(chat_reply("Winner: A"))
    del spec["template"]
    assert build_judge(spec).wins(answers("xx"), answers("yy")) == [0.5]
    there = "<prompt>\nWho? \n</prompt>\n\n<answer_A>\nxx\n</answer_A>\n\n<answer_B>\nyy\n</answer_B>"
    assert sum(there in question for question in chat.questions) == 1
    assert len(chat.requests) == 2


def test_an_unreadable_verdict_names_the_pair(chat: ChatServer, spec: dict[str, Any]) -> None:
    chat.respond = lambda request: chat_reply(
        "Winner: A" if "fine" in request["messages"][0]["content"] else "Both are bad"
    )
    with pytest.raises(RewardError, match=r"judge 'llm', row 4, .*: cannot read the reply 'Both are bad'"):
        build_judge(spec).wins(answers("fine", "x"), answers("ok", "y"))
    assert build_judge(spec | {"fallback": 0.5}).wins(answers("fine", "x"), answers("ok", "y")) == [0.5, 0.5]


# ----------------------------------------------------------------------------------------------------------- specs


def test_wrong_specs_are_refused(tmp_path: Path) -> None:
    reward = write_classifier(tmp_path / "rm")
    for spec, problem in (
        (reward, r"scores single completions; as a judge it is `judge: {bradley_terry: .*rm}`"),
        ("llmm", r"no judge is called 'llmm'. Did you mean 'llm'\?"),
        ("exact", "no judge is called 'exact'"),
        ([longer], "must be one judge, got a list"),
        ({"use": longer, "weight": 2}, "a judge has no weight"),
        ({"bradley_terry": "exact", "scal": 2}, r"no option 'scal'. Did you mean 'scale'\?"),
        ({"bradley_terry": "exact", "scale": 0}, "scale is 0; give a number above 0"),
        ({"bradley_terry": "exactt"}, "no reward is called 'exactt'"),
        ({"bradley_tery": "exact"}, "Did you mean 'bradley_terry'"),
        (None, "judge: must be a function, .* got None"),
    ):
        with pytest.raises(ConfigError, match=problem):
            check_judge(spec)
