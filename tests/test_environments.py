"""Environments: whole trajectories, and runs that learn from them."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from environments import double, hangs, ids
from test_chat import assistant, user

import alignkit
from alignkit import Environment, Request, Sampled, Step
from alignkit.data.chat import Chat
from alignkit.environment_settings import EnvironmentSettings
from alignkit.environments.build import maker
from alignkit.environments.episodes import Episodes
from alignkit.environments.turns import Turns
from alignkit.errors import AlignkitError, ConfigError, ModelError, PluginError, RolloutError
from alignkit.rollout.completions import answers_of, with_completions
from alignkit.rollout_settings import Sampling
from alignkit.runs.folder import read_metrics
from alignkit.types import Batch, Example
from helpers import CHATML, killed_before, write_chatml

# ------------------------------------------------------------------------------------------------------- trajectories


class Counting(Environment):
    """Says the number of the turn; done after `row["turns"]` of them, each worth 1."""

    open = 0

    def __init__(self) -> None:
        self.turns = 0
        type(self).open += 1

    def reset(self, row: Any) -> None:
        self.last = row["turns"]

    def step(self, messages: Sequence[Any]) -> Step:
        self.turns += 1
        return Step([user(str(self.turns))], reward=1.0, done=self.turns >= self.last)

    def close(self) -> None:
        type(self).open -= 1


class Scripted(alignkit.Sampler):
    """Says "yes <|im_end|>", or what it is told; keeps the requests."""

    def __init__(self, tokenizer: Any, turns: Sequence[list[int]] = ()) -> None:
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.requests: list[Request] = []
        self.turn, self.end, self.script = [*ids(tokenizer, "yes"), end], end, list(turns)

    def sample(self, request: Request) -> list[list[Sampled]]:
        self.requests.append(request)
        turn = self.script.pop(0) if self.script else self.turn
        logps = [-0.5] * len(turn)
        return [[Sampled(turn, turn[-1] == self.end, logps) for _ in range(request.n)] for _ in request.prompts]

    def update(self, version: int, model: Any) -> None:
        self.version = version


def example(tokenizer: Any, turns: int, row: int = 1) -> Example:
    prompt = torch.tensor(ids(tokenizer, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"), dtype=torch.int32)
    return Example(prompt, (), row=row, asked=[user("q")], columns={"turns": turns})


def play(tokenizer: Any, examples: list[Example], n: int = 1, turns: Sequence[list[int]] = (), **given: Any) -> Any:
    sampler = Scripted(tokenizer, turns)
    settings = EnvironmentSettings(**{"use": Counting} | given)
    episodes = Episodes(sampler, maker(settings), settings, Turns(tokenizer, Chat()))
    prompts = [e.prompt.tolist() for e in examples]
    request = Request(prompts, Sampling(max_new_tokens=8), n, seed=3, numbers=[7, 9][: len(prompts)], examples=examples)
    return episodes.sample(request), sampler


def test_a_trajectory_is_what_was_sampled_and_what_was_read(chat_tokenizer: Any) -> None:
    ((one,),), sampler = play(chat_tokenizer, [example(chat_tokenizer, 3)])
    turn = sampler.turn

    def said(k: int) -> list[int]:
        return ids(chat_tokenizer, f"\n<|im_start|>user\n{k}<|im_end|>\n<|im_start|>assistant\n")

    assert one.tokens == [*turn, *said(1), *turn, *said(2), *turn]
    want = [
        *[True] * len(turn),
        *[False] * len(said(1)),
        *[True] * len(turn),
        *[False] * len(said(2)),
        *[True] * len(turn),
    ]
    assert one.trained == want
    assert (one.ended, one.earned, one.turns) == (True, 3.0, 3)
    assert len(one.logps) == one.n_sampled == 3 * len(turn)
    assert [m["role"] for m in one.messages] == ["user", "assistant", "user", "assistant", "user", "assistant", "user"]
    prompt = example(chat_tokenizer, 3).prompt.tolist()
    assert [r.prompts[0] for r in sampler.requests] == [
        prompt, [*prompt, *turn, *said(1)], [*prompt, *turn, *said(1), *turn, *said(2)],
    ]  # fmt: skip


def test_only_those_that_go_on_are_sampled_and_their_noise_is_their_own(chat_tokenizer: Any) -> None:
    made, sampler = play(chat_tokenizer, [example(chat_tokenizer, 1), example(chat_tokenizer, 2)], n=2)
    assert [[s.turns for s in some] for some in made] == [[1, 1], [2, 2]]
    first, second = sampler.requests
    assert (first.n, list(first.numbers), first.seed) == (2, [7, 9], 3)  # as without an environment
    assert (second.n, list(second.numbers)) == (1, [18, 19])
    assert second.seed != first.seed


@pytest.mark.parametrize(
    ("given", "turns", "ended"), [({"max_turns": 2}, 2, False), ({"max_tokens": 40}, 2, False), ({}, 5, True)]
)
def test_budgets_end_a_trajectory_before_what_nothing_follows(
    given: dict[str, int], turns: int, ended: bool, chat_tokenizer: Any
) -> None:
    ((one,),), _ = play(chat_tokenizer, [example(chat_tokenizer, 5)], **given)
    assert (one.turns, one.ended) == (turns, ended)
    assert one.trained[-1]
    assert len(one.tokens) <= given.get("max_tokens", 2048)


def test_a_turn_that_was_cut_ends_the_trajectory(chat_tokenizer: Any) -> None:
    ((one,),), _ = play(chat_tokenizer, [example(chat_tokenizer, 5)], turns=[ids(chat_tokenizer, "yes yes")])
    assert (one.turns, one.ended, one.earned) == (1, False, 0.0)
    assert Counting.open == 0


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda self, m: 1 / 0, r"row 4: Faulty failed: ZeroDivisionError: division by zero \(at .*test_environments"),
        (lambda self, m: time.sleep(3), r"row 4: Faulty gave no answer within 0.1 s \(environment.timeout\)"),
    ],
)
def test_an_environment_that_fails_is_named_with_its_row(step: Any, words: str, chat_tokenizer: Any) -> None:
    faulty = type("Faulty", (Environment,), {"step": step})
    settings = EnvironmentSettings(use=faulty, timeout=0.1)
    episodes = Episodes(Scripted(chat_tokenizer), maker(settings), settings, Turns(chat_tokenizer, Chat()))
    one = example(chat_tokenizer, 1, row=4)
    with pytest.raises(RolloutError, match=words):
        episodes.sample(Request([one.prompt.tolist()], Sampling(), examples=[one]))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (None, "must return an alignkit.Step, got NoneType"),
        (Step([user("x")], reward=None), "must give a finite number as reward, got None"),  # type: ignore[arg-type]
        (Step([user("x")], reward=float("nan")), "must give a finite number as reward, got nan"),
        (Step([user("x")], reward="1"), "must give a finite number as reward, got '1'"),  # type: ignore[arg-type]
        (Step(user("x")), "must give a list of messages, got dict"),  # type: ignore[arg-type]
        (Step("more"), "must give a list of messages, got str"),  # type: ignore[arg-type]
        (Step(["more"]), "must give messages with a role, got 'more'"),  # type: ignore[list-item]
        (Step([assistant("I")]), "must not speak as the assistant"),
        (Step(), "gave no message to go on with; set done=True"),
    ],
)
def test_a_wrong_step_is_named_with_its_row(step: Any, words: str, chat_tokenizer: Any) -> None:
    odd = type("Odd", (Environment,), {"step": lambda self, m: step})
    with pytest.raises(RolloutError, match=re.escape(f"environment: row 4: Odd.step {words}")):
        play(chat_tokenizer, [example(chat_tokenizer, 1, row=4)], use=odd)


def test_a_tool_that_hangs_is_an_answer_in_a_trajectory(chat_tokenizer: Any) -> None:
    call = '<tool_call>{"name": "hangs", "arguments": {"n": 1}}</tool_call>'
    end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    turns = [[*ids(chat_tokenizer, call), end], [*ids(chat_tokenizer, "yes"), end]]
    ((one,),), _ = play(chat_tokenizer, [example(chat_tokenizer, 1)], turns=turns, use=None, tools=[hangs], timeout=0.2)
    assert [m["content"] for m in one.messages if m["role"] == "tool"] == ["error: hangs gave no answer within 0.2 s"]
    assert (one.turns, one.ended) == (2, True)


class Keeping(Environment):
    """Has a task of its own, which must go on from turn to turn, and counts those that are closed."""

    closed: ClassVar[list[bool]] = []

    async def step(self, messages: Sequence[Any]) -> Step:
        if not hasattr(self, "task"):
            self.task = asyncio.create_task(asyncio.sleep(30))
            return Step([user("more")])
        return Step(reward=float(not self.task.done()), done=True)

    def close(self) -> None:
        self.closed.append(True)
        raise ValueError("closing")


def test_async_environments_keep_their_loop_also_inside_of_another(
    chat_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def notebook() -> Any:
        return play(chat_tokenizer, [example(chat_tokenizer, 1)], n=2, use=Keeping)

    ((one, two),), _ = asyncio.run(notebook())
    assert (one.earned, two.earned) == (1.0, 1.0)
    assert len(Keeping.closed) == 2  # although the first one fails
    assert "close failed: ValueError: closing" in caplog.text


def test_what_was_made_is_closed_where_the_next_cannot_be_made(chat_tokenizer: Any) -> None:
    made: list[Any] = []

    def factory() -> Environment:
        if len(made) == 2:
            raise ValueError("no more")
        made.append(Counting())
        return made[-1]

    with pytest.raises(RolloutError, match="cannot be made: ValueError"):
        play(chat_tokenizer, [example(chat_tokenizer, 1)], n=3, use=factory)
    assert Counting.open == 0


class OfTwo:
    """Stands for two ranks that share a policy; says what the other one has."""

    def __init__(self, *other: int) -> None:
        self.other, self.own = list(other), list[int]()

    def most(self, n: int) -> int:
        self.own.append(n)
        return max(n, self.other.pop(0))


def test_ranks_that_share_a_policy_play_as_many_turns_and_stop_where_one_fails(chat_tokenizer: Any) -> None:
    def episodes(other: OfTwo, use: Any) -> tuple[Scripted, Episodes]:
        settings = EnvironmentSettings(use=use)
        sampler = Scripted(chat_tokenizer)
        return sampler, Episodes(sampler, maker(settings), settings, Turns(chat_tokenizer, Chat()), other)  # type: ignore[arg-type]

    one = example(chat_tokenizer, 1)
    request = Request([one.prompt.tolist()], Sampling(max_new_tokens=8), examples=[one])
    slower = OfTwo(1, 1, 1, 0)
    sampler, longer = episodes(slower, Counting)
    assert longer.sample(request)[0][0].turns == 1
    assert slower.own == [1, 0, 0, 0]
    assert [len(r.prompts) for r in sampler.requests] == [1, 0, 0]  # it takes part in the other's turns
    failing = OfTwo(1, 2)
    sampler, stopped = episodes(failing, Counting)
    stopped.sample(request)  # the rank that failed says why, after this
    assert len(sampler.requests) == 1
    faulty = type("Faulty", (Environment,), {"step": lambda self, m: 1 / 0})
    told = OfTwo(1, 1)
    with pytest.raises(RolloutError, match="Faulty failed: ZeroDivisionError"):
        episodes(told, faulty)[1].sample(request)
    assert told.own == [1, 2]


def test_a_batch_learns_what_was_sampled_only(chat_tokenizer: Any) -> None:
    examples = [example(chat_tokenizer, 2)]
    made, sampler = play(chat_tokenizer, examples, n=2)
    from alignkit.models.packing import pack

    batch = with_completions(examples, made, Batch((), pack))
    assert batch.lengths.tolist() == [2 * len(sampler.turn)] * 2
    assert batch.targets.tolist() == sampler.turn * 4
    assert len(batch["sampler_logps"]) == len(batch.targets)
    answers = answers_of(chat_tokenizer, examples, made)
    assert [m["role"] for m in answers.completions[0]] == ["assistant", "user", "assistant", "user"]
    assert answers.lengths == batch.lengths.tolist()
    assert answers.earned == [2.0, 2.0]


# --------------------------------------------------------------------------------------------------------------- runs


class Guess(Environment):
    """Pays the share of "y" in a turn, and answers twice."""

    def __init__(self) -> None:
        self.turns = 0

    def step(self, messages: Sequence[Any]) -> Step:
        self.turns += 1
        text = messages[-1]["content"]
        return Step([user("more")], reward=text.count("y") / (1 + len(text)), done=self.turns == 2)


@pytest.fixture
def run(settings: dict[str, Any], chat_model: str) -> dict[str, Any]:
    rows = [{"prompt": [user(f"{i} yes or no?")]} for i in range(8)]
    sampling = {"max_new_tokens": 6, "batch_size": 8, "stop": ["o", "e"]}
    return settings | {
        "model": chat_model, "data": rows, "max_steps": 3, "sampling": sampling, "save_every": 1, "learning_rate": 3e-3,
        "environment": {"use": Guess, "max_tokens": 120},
    }  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_second", "seconds/")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in read_metrics(folder)]


ASKS: dict[str, dict[str, Any]] = {
    "grpo": {"group_size": 4, "epochs_per_batch": 2}, "rloo": {"group_size": 3}, "ppo": {"epochs_per_batch": 2},
    "reinforce": {}, "online_dpo": {"group_size": 3},
}  # fmt: skip


@pytest.mark.parametrize("method", list(ASKS))
def test_a_run_learns_from_trajectories_and_resumes_to_the_same_weights(method: str, run: dict[str, Any]) -> None:
    whole = alignkit.run(method, **run | ASKS[method], name="whole")
    with killed_before(2):
        alignkit.run(method, **run | ASKS[method], name="parts")
    parts = alignkit.run(method, **run | ASKS[method], name="parts", resume=True)
    assert lines(whole.folder) == lines(parts.folder)
    for (name, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    first = lines(whole.folder)[0]
    assert 1 <= first["environment/turns"] <= 2
    assert first["environment/earned"] == pytest.approx(first["reward/mean"], abs=1e-6)
    said = [json.loads(line) for line in (whole.folder / "completions.jsonl").read_text().splitlines()]
    assert {s["turns"] for s in said} == {1, 2}
    assert any(s["earned"] for s in said)
    assert "Guess" in (whole.folder / "config.yaml").read_text()


@pytest.mark.parametrize("changed", [{"max_tokens": 60}, {"layout": "padded"}, {"sampling.batch_size": 3}])
def test_the_result_does_not_depend_on_how_a_step_is_cut(changed: dict[str, Any], run: dict[str, Any]) -> None:
    one = alignkit.run("grpo", **run, group_size=4, name="one")
    other = alignkit.run("grpo", **run | changed, group_size=4, name="other")
    for a, b in zip(lines(one.folder), lines(other.folder), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["reward/mean"] == pytest.approx(b["reward/mean"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_tools_are_shown_to_the_model_and_a_reward_reads_the_messages(run: dict[str, Any]) -> None:
    seen: list[Any] = []

    def reward(completions: list[Any], completion_messages: list[Any], **_: Any) -> list[float]:
        seen.extend(completion_messages)
        return [float(len(c)) for c in completions]

    asks = run | {"environment": {"tools": [double], "max_tokens": 100}, "reward": reward, "max_steps": 1}
    result = alignkit.run("grpo", **asks, group_size=2)
    assert all(m["role"] in ("assistant", "tool") for one in seen for m in one)
    assert "name: double" in (result.folder / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("nash", {"judge": {"bradley_terry": "json"}}, "samples from a mixture, which has no environment"),
        (
            "grpo",
            {"rollout": {"ahead": 1, "backend": "vllm", "urls": ["http://127.0.0.1:1"]}},
            "rollout.ahead keeps completions of one turn only",
        ),
        ("grpo", {"environment": {"use": Guess, "max_tokens": 5}}, "of a turn, is 6, and environment.max_tokens"),
        ("grpo", {"environment": {"use": "no.such:Thing"}}, "environment: the module 'no.such'"),
        ("grpo", {"environment": {"use": 3}}, "'3' is no class and no function"),
        ("grpo", {"environment": {"tools": []}}, "environment needs one of `use` and `tools`"),
        ("grpo", {"environment": {"tools": [double]}}, "'grpo' needs a reward"),
        ("grpo", {"environment": {"use": dict}}, "must return an alignkit.Environment, got dict"),
        ("grpo", {"environment": None, "reward": ["environment", "json"]}, "there is none; set `environment`"),
        ("sft", {"environment": {"use": Guess}, "sampling": {}}, "'sft' does not sample completions"),
    ],
)
def test_settings_that_do_not_fit(method: str, changes: dict[str, Any], words: str, run: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, PluginError), match=words):
        alignkit.run(method, **run | changes)


def test_a_template_without_tools_is_refused_before_anything_is_sampled(run: dict[str, Any], tmp_path: Path) -> None:
    made = write_chatml(tmp_path / "mute")
    made.chat_template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    asks = run | {"environment": {"tools": [double], "max_tokens": 100}, "reward": "json", "tokenizer": made}
    with pytest.raises(ConfigError, match=r"cannot render what the environment says after a turn \(roles: tool\)"):
        alignkit.run("grpo", **asks, group_size=2)


def test_a_prompt_of_text_is_refused(run: dict[str, Any]) -> None:
    with pytest.raises(AlignkitError, match=r"the prompt of row \d+ is text; give it as messages"):
        alignkit.run("grpo", **run | {"data": [{"prompt": "yes"}] * 8}, group_size=2)


def test_the_pages_environment_plays(chat_tokenizer: Any) -> None:
    text = (Path(__file__).parents[1] / "docs/environments.md").read_text()
    space: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], space)
    guesses = [
        [*ids(chat_tokenizer, word), chat_tokenizer.convert_tokens_to_ids("<|im_end|>")] for word in ("no", "1", "7")
    ]
    settings = EnvironmentSettings(use=space["Hotter"])
    episodes = Episodes(Scripted(chat_tokenizer, guesses), maker(settings), settings, Turns(chat_tokenizer, Chat()))
    one = example(chat_tokenizer, 0)
    asked = Example(one.prompt, (), asked=one.asked, columns={"answer": 7})
    [[made]] = episodes.sample(Request([one.prompt.tolist()], Sampling(max_new_tokens=8), examples=[asked]))
    said = [m["content"].strip() for m in made.messages[1:]]
    assert said == ["no", "Say a number.", "1", "higher", "7"]
    assert (made.earned, made.ended) == (pytest.approx(0.9), True)


def test_a_trajectory_that_the_model_has_no_positions_for_names_its_limit(run: dict[str, Any]) -> None:
    asks = run | {"environment": {"use": Guess}}
    with pytest.raises(ModelError, match=r"lower max_prompt_tokens and environment.max_tokens to 256 in total"):
        alignkit.run("grpo", **asks, group_size=2)
