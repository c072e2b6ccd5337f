"""Completions are text for a reward or a judge, or messages where it was written for those: a probe finds out."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import alignkit
from alignkit.errors import ConfigError, RewardError
from alignkit.rewards import Answers, build_judge, build_rewards, check_rewards
from alignkit.rewards.probing import MADE_UP

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def chats(*texts: str, **columns: list[Any]) -> Answers:
    n = len(texts)
    prompts: list[Any] = [[{"role": "user", "content": f"what is {i}?"}] for i in range(n)]
    said: list[Any] = [[{"role": "assistant", "content": text}] for text in texts]
    return Answers(prompts, said, columns, list(range(1, n + 1)), [3] * n, [True] * n)


def of_readme(completions: Any, answer: Any, **columns: Any) -> list[float]:
    return [float(a in text) for a, text in zip(answer, completions, strict=True)]


def of_trl(completions: Any, answer: Any, **columns: Any) -> list[float]:
    return [float(a in c[0]["content"]) for a, c in zip(answer, completions, strict=True)]


def broken(completions: Any, **columns: Any) -> list[float]:
    return [columns["solution"][0] for _ in completions]


@pytest.mark.parametrize("reward", [of_readme, of_trl])
def test_both_kinds_of_functions_read_chats(reward: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "alignkit")
    rewards = build_rewards(reward)
    for _ in range(2):
        assert rewards.score(chats("it is 4", "it is 5", answer=["4", "4"])).total == [1.0, 0.0]
    told = [r.message for r in caplog.records]
    assert told == ["reward 'of_trl' gets completions as messages: it cannot read text (TypeError: string indices must "
                    "be integers, not 'str')"] * (reward is of_trl)  # fmt: skip


def test_a_reward_of_trl_itself() -> None:
    said = chats("<think>\n4\n</think>\n4", "4")
    assert build_rewards("trl.rewards:think_format_reward").score(said).total == [1.0, 0.0]


def test_text_holds_the_tool_calls() -> None:
    asked = chats("", "hi")
    asked.completions[0] = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    seen: list[Any] = []
    build_rewards(lambda completions: seen.append(completions) or [0.0] * len(completions)).score(asked)
    assert seen == [list(MADE_UP), [json.dumps(CALL["function"]), "hi"]]


def test_messages_have_a_name_of_their_own() -> None:
    seen: list[Any] = []

    def reward(completions: Any, completion_messages: Any) -> list[float]:
        seen.append((completions, completion_messages))
        return [0.0] * len(completions)

    build_rewards(reward).score(chats("hi"))
    build_rewards(reward).score(Answers(["?"], ["hi"], {}, [1], [1], [True]))
    assert seen[1:] == [(["hi"], [[{"role": "assistant", "content": "hi"}]])] * 2  # the first call is the probe


def test_judges_likewise() -> None:
    first, second = chats("a", "bb"), chats("aa", "b")

    def as_text(first: Any, second: Any) -> list[float]:
        return [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]

    def as_messages(first: Any, second: Any) -> list[float]:
        return as_text([a[-1]["content"] for a in first], [b[-1]["content"] for b in second])

    def named(first: Any, completion_messages: Any, second_completion_messages: Any) -> list[float]:
        return as_messages(completion_messages, second_completion_messages)

    for judge in (
        as_text,
        as_messages,
        named,
        {"bradley_terry": lambda completions: [len(c) * 99 for c in completions]},
    ):
        assert build_judge(judge).wins(first, second) == pytest.approx([0.0, 1.0]), judge


def test_a_function_that_can_read_neither_is_named_before_the_run() -> None:
    rewards = build_rewards({"use": broken, "name": "mine"})
    says = (
        r"reward 'mine' failed in a probe.* made-up .*'The answer is 42\.'.* to row 1, prompt 'what is 0\?'.*"
        "as text: KeyError: 'solution'; as messages: KeyError.*probe: false"
    )
    with pytest.raises(RewardError, match=says):
        rewards.probe(chats("x", "y", answer=["4", "4"]))
    with pytest.raises(RewardError, match="'mine' failed on row 1"):  # the run's own call
        build_rewards({"use": broken, "name": "mine", "probe": False}).score(chats("x"))


@pytest.mark.parametrize("error", [AssertionError, ValueError])
def test_a_judgement_of_the_made_up_text_decides_nothing(error: type[Exception]) -> None:
    def strict(completions: Any) -> list[float]:
        if any(text in MADE_UP for text in completions):
            raise error("no such answer")
        return [float(len(text)) for text in completions]

    assert build_rewards(strict).score(chats("abc")).total == [3.0]


def test_what_is_never_called_with_made_up_completions() -> None:
    calls: list[Any] = []

    def reward(completions: Any) -> list[float]:
        calls.append(completions)
        return [0.0] * len(completions)

    async def waiting(completions: Any) -> list[float]:
        return reward(completions)

    class Waiting:
        async def __call__(self, completions: Any) -> list[float]:
            return reward(completions)

    for spec in ({"use": reward, "probe": False}, waiting, Waiting):
        build_rewards(spec).score(chats("hi"))
    build_rewards(reward).score(Answers(["?"], ["hi"], {}, [1], [1], [True]))  # text has one form only
    assert calls == [["hi"]] * 4


def test_a_row_is_not_changed_by_the_probe() -> None:
    def emptied(completions: Any, answer: Any) -> list[float]:
        return [float(a.pop()) for a in answer]

    assert build_rewards(emptied).score(chats("hi", "ho", answer=[[1], [2]])).total == [1.0, 2.0]


def test_probe_is_a_switch_of_functions_only() -> None:
    with pytest.raises(ConfigError, match="reward 'of_readme': probe is 'no'; give true or false"):
        check_rewards({"use": of_readme, "probe": "no"})
    with pytest.raises(ConfigError, match="'exact' has no option 'probe'"):
        check_rewards({"use": "exact", "probe": False})


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


@pytest.fixture
def chat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a short GRPO run on rows of messages."""
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    tokenizer.chat_template = TEMPLATE
    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": "e"} for i in range(4)]
    own = {"data": rows, "tokenizer": tokenizer, "max_steps": 1, "sampling": {"max_new_tokens": 12}, "beta": 0.0}
    return settings | own | {"method": "grpo", "group_size": 4, "batch_size": 4}


def test_the_reward_of_the_readme_pays_on_chat_rows(chat: dict[str, Any]) -> None:
    specs = [{"use": reward, "name": "right"} for reward in (of_readme, of_trl)]
    folders = [alignkit.run(**chat, reward=spec).folder for spec in specs]
    said = [[json.loads(line) for line in (f / "completions.jsonl").read_text().splitlines()] for f in folders]
    for rows in said:
        assert [row["reward"] for row in rows] == [float("e" in row["completion"]) for row in rows]
        assert 0 < sum(row["reward"] for row in rows) < len(rows)
    assert said[0] == said[1]


def test_a_reward_that_reads_nothing_ends_the_run_before_it_samples(chat: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="reward 'broken' failed in a probe"):
        alignkit.run(**chat, reward=broken)
    assert not list(tmp_path.rglob("completions.jsonl"))


def test_a_probe_has_the_time_of_a_call_and_names_what_quits() -> None:
    def hangs(completions: Any) -> list[float]:
        time.sleep(30)
        return []

    def quits(completions: Any) -> list[float]:
        sys.exit(0)

    for reward, words in (
        (hangs, r"'hangs' failed on row 1.* within 0\.3 s"),
        (quits, r"'quits' failed.*SystemExit: 0"),
    ):
        with pytest.raises(RewardError, match=words):
            build_rewards(reward, timeout=0.3).probe(chats("what?"))
