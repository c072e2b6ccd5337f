"""Rewards as users write them: functions, weights, ensembles; and errors that name reward, row and prompt."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from alignkit.errors import AlignkitError, ConfigError, RewardError
from alignkit.rewards import Answers, build_judge, build_rewards, check_rewards
from alignkit.rewards.answers import text_of
from alignkit.rollout import Sampled
from alignkit.rollout.completions import answers_of
from alignkit.rollout.tool_calls import tool_calls
from alignkit.running import RunningStats
from alignkit.types import Example


def answers(n: int = 3, **columns: list[Any]) -> Answers:
    """n answers of 1, 2, ... tokens; the last one was cut."""
    return Answers(
        [f"what is {i}?" for i in range(n)],
        [f"it is {i}" for i in range(n)],
        columns,
        [10 * (i + 1) for i in range(n)],
        list(range(1, n + 1)),
        [i < n - 1 for i in range(n)],
    )


def constant(*values: Any) -> Any:
    return lambda completions: list(values)


# ------------------------------------------------------------------------------------------------------- functions


def test_a_function_gets_what_it_names() -> None:
    seen: list[dict[str, Any]] = []

    def named(prompts: Any, completions: Any, answer: Any) -> list[float]:
        seen.append(locals().copy())
        return [0.0] * len(prompts)

    def every(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.append({"columns": columns})
        return [0.0] * len(prompts)

    def lengths_only(*, lengths: Any, ended: Any, other: Any = "default") -> list[float]:
        seen.append({"lengths": lengths, "ended": ended, "other": other})
        return [0.0] * len(lengths)

    build_rewards([named, every, lengths_only]).score(answers(2, answer=["a", "b"], level=[1, 2]))
    prompts, completions = ["what is 0?", "what is 1?"], ["it is 0", "it is 1"]
    assert seen[0] == {"prompts": prompts, "completions": completions, "answer": ["a", "b"], "seen": seen}
    assert seen[1] == {"columns": {"answer": ["a", "b"], "level": [1, 2]}}
    assert seen[2] == {"lengths": [1, 2], "ended": [True, False], "other": "default"}


def test_options_go_to_the_function_and_win_over_columns() -> None:
    def reward(completions: Any, level: float, **columns: Any) -> list[float]:
        return [level] * len(completions)

    scores = build_rewards({"use": reward, "level": 3.0}).score(answers(2, level=[1, 2]))
    assert scores.total == [3.0, 3.0]


def test_lists_tensors_arrays_and_booleans_are_numbers() -> None:
    rewards = build_rewards(
        [
            {"use": constant(True, 1, 2.5), "name": "list"},
            {"use": lambda completions: torch.tensor([1.0, 2.0, 3.0]), "name": "tensor"},
            {"use": lambda completions: np.array([1, 2, 3]), "name": "array"},
            {"use": constant(np.float32(1), torch.tensor(2.0), np.int64(3)), "name": "scalars"},
        ]
    )
    scores = rewards.score(answers())
    assert scores.total == [4.0, 7.0, 11.5]
    assert all(type(v) is float for values in scores.parts.values() for v in values)


def test_none_does_not_apply() -> None:
    scores = build_rewards([{"use": constant(None, 1.0, 2.0), "name": "a", "weight": 2}]).score(answers())
    assert scores.total == [None, 2.0, 4.0]
    assert scores.parts == {"a": [None, 1.0, 2.0]}
    assert scores.numbers == [0.0, 2.0, 4.0]
    two = [{"use": constant(None, 1.0, None), "name": "a"}, {"use": constant(3.0, 1.0, None), "name": "b"}]
    assert build_rewards(two).score(answers()).total == [3.0, 2.0, None]  # the sum of those that apply


def test_async_functions_wait_together() -> None:
    arrived: list[str] = []

    async def met(name: str, others: int) -> list[float]:
        arrived.append(name)
        for _ in range(100):  # ends only when both are on their way
            if len(arrived) > others:
                return [1.0, 2.0]
            await asyncio.sleep(0)
        raise AssertionError("they did not wait together")

    async def one(completions: Any) -> list[float]:
        return await met("one", 1)

    class Two:
        async def __call__(self, completions: Any) -> list[float]:
            return await met("two", 1)

    def plain(completions: Any) -> list[float]:
        return [10.0, 20.0]

    scores = build_rewards([one, plain, {"use": Two(), "name": "two"}]).score(answers(2))
    assert scores.total == [12.0, 24.0]
    assert list(scores.parts) == ["one", "plain", "two"]


_ONE_AT_A_TIME = asyncio.Semaphore(1)  # belongs to the first event loop in which somebody waits for it


async def _in_turn(completions: Any) -> list[float]:
    async def one(_: Any) -> float:
        async with _ONE_AT_A_TIME:
            await asyncio.sleep(0)
            return 1.0

    return list(await asyncio.gather(*map(one, completions)))


def test_every_call_has_the_same_event_loop() -> None:
    rewards = build_rewards(_in_turn)
    assert [rewards.score(answers()).total for _ in range(2)] == [[1.0, 1.0, 1.0]] * 2
    rewards.close()


def test_a_failure_ends_what_waits_beside_it() -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    ended: list[str] = []

    async def endless(completions: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("endless")
        return []

    rewards = build_rewards([endless, _slow_failure])
    with pytest.raises(RewardError, match="'_slow_failure' failed on row 10") as caught:
        rewards.score(answers())
    assert isinstance(caught.value.__cause__, ValueError)
    assert ended == ["endless"]
    assert not loops[0].is_closed()
    rewards.close()
    rewards.close()
    assert loops[0].is_closed()


def test_nothing_is_asked_about_nothing() -> None:
    def never(completions: Any) -> list[float]:
        raise AssertionError

    assert build_rewards(never).score(answers(0)).total == []


# ---------------------------------------------------------------------------------------------------------- errors


async def _slow_failure(completions: Any) -> list[float]:
    raise ValueError("no luck")


def _failure(completions: Any) -> list[float]:
    raise ValueError("no luck")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (_failure, r"failed on row 10, prompt 'what is 0\?' and 2 more: ValueError: no luck"),
        (_slow_failure, r"failed on row 10, prompt 'what is 0\?' and 2 more: ValueError: no luck"),
        (constant(1.0), r"returned 1 values for 3 completions, \[1.0\] \(first: row 10, prompt 'what .*one for each"),
        (constant(1, 2, 3, 4), "returned 4 values for 3 completions"),
        (constant(1.0, math.nan, 1.0), r"returned nan for row 20, prompt 'what is 1\?'; it must be a number"),
        (constant(1.0, 1.0, math.inf), r"returned inf for row 30, prompt 'what is 2\?'"),
        (constant(1.0, 10**400, 1.0), "returned 1000+... for row 20"),
        (constant(torch.tensor([1.0, 2.0]), 1.0, 1.0), r"returned tensor\(\[1., 2.\]\) for row 10"),
        (constant("0.5", 1.0, 1.0), "returned '0.5' for row 10"),
        (constant([1.0], 1.0, 1.0), r"returned \[1.0\] for row 10"),
        (lambda completions: 1.0, r"must return a list of 3 numbers, got 1.0 \(first: row 10, prompt 'what is 0\?'\)"),
        (
            lambda completions: None,
            r"must return a list of 3 numbers, got None \(first: row 10, prompt 'what is 0\?'\)",
        ),
        (lambda completions: (float(i) for i in range(3)), "must return a list of 3 numbers, got <generator"),
        (lambda answr: [0.0] * 3, r"needs the column 'answr'; the rows have answer. Did you mean 'answer'\?"),
    ],
)
def test_what_is_no_reward_is_named(function: Any, says: str) -> None:
    rewards = build_rewards({"use": function, "name": "mine"})
    with pytest.raises(RewardError, match=f"^reward 'mine' {says}"):
        rewards.score(answers(answer=[1, 2, 3]))


def test_the_error_keeps_its_cause_and_shortens_the_prompt() -> None:
    asked = Answers(["x" * 500], ["y"], {}, [1], [1], [True])
    with pytest.raises(RewardError) as caught:
        build_rewards(_failure).score(asked)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "x" * 30 in str(caught.value)
    assert "x" * 100 not in str(caught.value)


def test_ctrl_c_inside_of_a_reward_is_ctrl_c() -> None:
    def interrupted(completions: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_rewards(interrupted).score(answers())


# ------------------------------------------------------------------------------------------- weights and ensembles


def test_values_are_clipped_before_they_are_weighted() -> None:
    wild, member = constant(-7.0, 0.5, 9.0), {"use": constant(-7.0, None, 9.0), "name": "m", "clip": [-2, 3]}
    scores = build_rewards([{"use": wild, "name": "a", "clip": [-1, 2], "weight": 10}]).score(answers())
    assert (scores.total, scores.parts) == ([-10.0, 5.0, 20.0], {"a": [-1.0, 0.5, 2.0]})
    mean = build_rewards({"ensemble": [member, {"use": wild, "name": "a"}]}).score(answers())
    assert mean.total == [(-2 - 7) / 2, 0.5, (3 + 9) / 2]


NUMBERS = st.floats(-100, 100, allow_nan=False)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=5), st.floats(0, 3))
def test_weights_and_ensembles_by_hand(rows: list[tuple[float, float, float]], k: float) -> None:
    members: list[dict[str, Any]] = [
        {"use": constant(*column), "name": f"m{j}"} for j, column in enumerate(zip(*rows, strict=True))
    ]
    asked = answers(len(rows))

    def total(spec: Any) -> list[float]:
        return build_rewards(spec).score(asked).total

    weighted = [{**m, "weight": w} for m, w in zip(members, (2, -1, 0.5), strict=True)]
    assert total(weighted) == pytest.approx([2 * a - b + 0.5 * c for a, b, c in rows], abs=1e-9)
    array = np.array(rows)
    assert total({"ensemble": members}) == pytest.approx(array.mean(1).tolist(), abs=1e-9)
    assert total({"ensemble": members, "combine": "min"}) == array.min(1).tolist()
    cautious = {"ensemble": members, "combine": "mean-std", "k": k, "weight": 3}
    assert total(cautious) == pytest.approx((3 * (array.mean(1) - k * array.std(1))).tolist(), abs=1e-6)


def test_the_members_of_an_ensemble_are_seen() -> None:
    members = [{"use": constant(1.0, 3.0, None), "name": "a"}, {"use": constant(2.0, 1.0, None), "name": "b"}]
    scores = build_rewards({"ensemble": members, "combine": "min", "weight": 10}).score(answers())
    assert scores.parts == {
        "ensemble": [1.0, 1.0, None],
        "ensemble/a": [1.0, 3.0, None],
        "ensemble/b": [2.0, 1.0, None],
    }
    assert scores.total == [10.0, 10.0, None]


# ------------------------------------------------------------------------------------------------ what was sampled


def test_rewards_see_what_was_sampled_as_it_was(tiny: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    text = '<|call|>red <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    example = Example(torch.tensor([5]), (), asked="say red", row=1)
    sampled = answers_of(tokenizer, [example], [[Sampled(ids, True)]])
    seen: dict[str, Any] = {}

    def reward(completions: Any, completion_ids: Any, raw_completions: Any, tool_calls: Any) -> list[float]:
        seen.update(locals())
        return [0.0]

    build_rewards(reward).score(sampled)
    assert seen["completion_ids"] == [ids]
    assert seen["raw_completions"] == [text]
    assert "<|call|>" not in seen["completions"][0]
    assert seen["tool_calls"] == [[{"name": "add", "arguments": {"a": 1}}]]
    other = replace(sampled, raw_completions=["second"])

    def judge(first: Any, second: Any, raw_completions: Any, second_raw_completions: Any) -> list[float]:
        assert (raw_completions, second_raw_completions) == ([text], ["second"])
        return [1.0]

    assert build_judge(judge).wins(sampled, other) == [1.0]
    with pytest.raises(RewardError, match="needs `completion_ids`, which only sampled completions have"):
        build_rewards(reward).score(answers(1))


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"a": {"b": 1}}}\n</tool_call>', [("f", {"a": {"b": 1}})]),
        (
            '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g"}</tool_call>',
            [("f", {}), ("g", {})],
        ),
        ("<tool_call>\n<function=f>\n<parameter=a>\n7\n</parameter>\n</function>\n</tool_call>", [("f", {"a": 7})]),
        ("\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x y</arg_value>\n</tool_call>", [("f", {"a": "x y"})]),
        (' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>', [("f", {"a": 1})]),
        ('{"name": "f", "parameters": {"a": 1}}<|eot_id|>', [("f", {"a": 1})]),
        ("I call f.", []),
        ("<tool_call>{broken}</tool_call>", []),
        ('<tool_call>{"name": 1}</tool_call>', []),
        ('{"answer": 4}', []),
    ],
)
def test_the_calls_in_what_models_write(text: str, calls: list[tuple[str, Any]]) -> None:
    assert [(call["name"], call["arguments"]) for call in tool_calls(text)] == calls


def test_judges_read_tool_calls() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    assert text_of(messages) == 'user: q\n\nassistant: {"name": "add", "arguments": {"a": 1}}\n\ntool: 2'


# ----------------------------------------------------------------------------------------------------------- specs


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module beside the user's configuration, with a name of its own in every test."""
    name = f"rewards_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "from os import system\n"
        "not_a_function = 3\n"
        "def words(completions, **columns):\n    return [float(len(c.split())) for c in completions]\n"
        "class Weighted:\n"
        "    def __init__(self, factor):\n        self.factor = factor\n"
        "    def __call__(self, lengths):\n        return [self.factor * n for n in lengths]\n"
    )
    (tmp_path / f"{name}_broken.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def test_a_function_of_a_module_in_the_working_folder(module: str) -> None:
    assert build_rewards(f"{module}:words").score(answers()).parts == {"words": [3.0, 3.0, 3.0]}
    assert sys.path[-1] == str(Path.cwd())  # last: nothing here may shadow an installed module


def test_a_class_of_a_module_takes_options(module: str) -> None:
    assert build_rewards({"use": f"{module}:Weighted", "factor": 2}).score(answers()).total == [2.0, 4.0, 6.0]
    with pytest.raises(ConfigError, match=r"'Weighted': missing a required argument: 'factor'; .* Weighted\(\.\.\.\)"):
        check_rewards(f"{module}:Weighted")


def test_specs_from_yaml(module: str) -> None:
    spec = yaml.safe_load(
        f"""
        - {{use: "{module}:words", weight: 1e-1, name: words}}
        - {{use: length, max: 2, slack: 2}}
        - ensemble: [{{use: brevity, limit: 4}}, {{use: length, max: 1}}]
          combine: min
        """
    )
    check_rewards(spec)
    scores = build_rewards(spec).score(answers())
    assert scores.parts["length"] == [1.0, 1.0, 0.5]
    assert scores.parts["ensemble"] == [-0.25, -0.5, -0.75]
    assert scores.total == pytest.approx([0.3 + 1 - 0.25, 0.3 + 1 - 0.5, 0.3 + 0.5 - 0.75])


def by_position(completions: Sequence[str], /) -> list[float]:
    return [0.0] * len(completions)


def plain(completions: Sequence[str], scale: float = 1.0) -> list[float]:
    return [scale] * len(completions)


def open_to_columns(completions: Sequence[str], scale: float = 1.0, **columns: Any) -> list[float]:
    return [scale] * len(completions)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("lenght", r"no reward is called 'lenght'. Did you mean 'length'\? Names: brevity, environment, exact, format"),
        ("no/such/folder", "the folder 'no/such/folder' does not exist"),
        ("no_such_module:f", "'no_such_module:f' cannot be imported: ModuleNotFoundError"),
        ("MODULE:wrds", r"has no 'wrds'. Did you mean 'words'\?"),
        ("MODULE:not_a_function", "must be a function or a class, got 3"),
        ("MODULE_broken:f", "cannot be imported: RuntimeError: at import"),
        (3, "reward: must be a function, .* got 3"),
        (None, "reward: must be a function, .* got None"),
        ("", "reward: must be a function, .* got ''"),
        ([], "the list is empty"),
        ({"weight": 2}, "has no `use`; write {use: "),
        ({"ues": "exact"}, "Did you mean 'use'"),
        ({"use": "exact", "weight": "heavy"}, "weight is 'heavy'; give a finite number"),
        ({"use": "exact", "clip": 3}, r"clip is 3; give \[low, high\]"),
        ({"use": "exact", "clip": [2, 1]}, r"clip is \[2, 1\]; give \[low, high\]"),
        ({"use": "exact", "clip": [0, "many"]}, "clip is 'many'; give a finite number"),
        ({"use": "exact", "weight": math.nan}, "weight is nan; give a finite number"),
        ({"use": "exact", "weight": True}, "weight is True; give a finite number"),
        ({"use": "length"}, "'length': max: Field required"),
        ({"use": "length", "max": 3, "slck": 1}, r"no option 'slck'. Did you mean 'slack'\? Options: min, max, slack"),
        (by_position, "'by_position' takes 'completions' by position"),
        ({"use": plain, "scal": 2}, r"'plain' has no option 'scal'. Did you mean 'scale'\?"),
        ({"use": open_to_columns, "wieght": 0.1}, r"'open_to_columns' has no option 'wieght'.*parameters: .*scale"),
        ({"use": open_to_columns, "scal": 0.1}, r"has no option 'scal'. Did you mean 'scale'\?"),
        ({"use": "os:system", "command": "exit 7"}, "'os:system' belongs to Python's standard library"),
        ("os.path:exists", "'os.path:exists' belongs to Python's standard library"),
        ("builtins:print", "'builtins:print' belongs to Python's standard library"),
        ("MODULE:system", "system' belongs to Python's standard library"),
        ({"use": plain, "completions": 2}, "'plain' has no option 'completions'"),
        (["exact", "exact"], "two rewards have the name 'exact'; name them"),
        ({"ensemble": ["exact"]}, "an ensemble must be a list of at least two rewards"),
        ({"ensemble": "exact"}, "an ensemble must be a list of at least two rewards"),
        ({"ensemble": ["exact", "exact"]}, "two members of the ensemble have the name 'exact'"),
        ({"ensemble": ["exact", "numeric"], "combine": "mim"}, r"combine is 'mim'. Did you mean 'min'\?"),
        ({"ensemble": ["exact", "numeric"], "k": 2}, "k is used with combine: mean-std"),
        ({"ensemble": ["exact", "numeric"], "wieght": 2}, r"no 'wieght'. Did you mean 'weight'\?"),
        ({"ensemble": ["exact", {"use": "numeric", "weight": 2}]}, "cannot have a weight"),
    ],
)
def test_a_wrong_spec_is_refused_before_anything_is_loaded(spec: Any, says: str, module: str) -> None:
    if isinstance(spec, str):
        spec = spec.replace("MODULE", module)
    with pytest.raises(ConfigError, match=says):
        check_rewards(spec)


@settings(max_examples=40)
@given(st.recursive(st.none() | st.text(max_size=5) | st.integers(), lambda s: st.lists(s) | st.dictionaries(
    st.sampled_from(["use", "ensemble", "weight", "combine", "name", "k"]), s), max_leaves=6))  # fmt: skip
def test_no_spec_raises_anything_else(spec: Any) -> None:
    with contextlib.suppress(AlignkitError):
        check_rewards(spec)


# ------------------------------------------------------------------------------------------------- running moments


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=6), min_size=1, max_size=6))
def test_running_moments_are_those_of_all_values(parts: list[list[float]]) -> None:
    moments = RunningStats()
    for part in parts:
        mean = float(np.mean(part)) if part else 0.0
        moments.update(len(part), mean, float(np.sum((np.array(part) - mean) ** 2)))
    every = np.array([v for part in parts for v in part])
    if len(every) > 1:
        assert moments.mean == pytest.approx(every.mean(), abs=1e-9)
        assert moments.std == pytest.approx(every.std(), rel=1e-9, abs=1e-6)
        want = (every - every.mean()) / (every.std() + 1e-8)
        if every.std() > 1e-3:
            assert moments.normalise(torch.tensor(every)).numpy() == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_running_moments_by_hand() -> None:
    moments = RunningStats()
    assert (moments.std, moments.normalise(3.0)) == (1.0, pytest.approx(3.0))
    moments.update(2, 2.0, 2.0)  # 1 and 3
    moments.update(2, 6.0, 2.0)  # 5 and 7
    assert (moments.mean, moments.std) == (4.0, pytest.approx(math.sqrt(5)))
    assert moments.normalise(6.0) == pytest.approx(2 / math.sqrt(5))
    equal = RunningStats()
    equal.update(4, 0.5, 0.0)
    assert equal.normalise(torch.tensor([0.5])).tolist() == [0.0]


def test_running_moments_survive_json() -> None:
    import json

    moments, again = RunningStats(), RunningStats()
    moments.update(3, 1 / 3, 0.1)
    again.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    assert (again.count, again.mean, again.m2) == (3, 1 / 3, 0.1)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "a", "arguments": {"x": "<function=b><parameter=y>1</parameter></function>"}}</tool_call>',
        '{"name": "a", "arguments": {"x": "<function=b><parameter=y>1</parameter></function>"}}',
        '<function=a><parameter=x><tool_call>{"name": "b", "arguments": {}}</tool_call></parameter></function>',
    ],
)
def test_what_an_argument_spells_out_is_no_call(text: str) -> None:
    assert [call["name"] for call in tool_calls(text)] == ["a"]
