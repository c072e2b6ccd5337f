"""Judges, which compare two completions: functions, preference models, language models, and Bradley-Terry rewards."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch

from alignkit.data.rows import shown
from alignkit.errors import ConfigError, RewardError, nearest
from alignkit.rewards.answers import Answers
from alignkit.rewards.calls import TIMEOUT, Functions
from alignkit.rewards.classifier import Shared
from alignkit.rewards.combine import (
    Rewards,
    build_rewards,
    check_reward_columns,
    check_rewards,
    reward_columns,
    reward_folders,
)
from alignkit.rewards.functions import Function, known_of
from alignkit.rewards.spec import JUDGE, Device, leaf, number


class Judge(Protocol):
    """Compares completions; `build_judge` creates it."""

    def wins(self, first: Answers, second: Answers) -> list[float]:
        """Return P(first wins) of S pairs of answers to the same prompts, from 0 to 1. Raises RewardError."""
        ...

    def check_columns(self, there: Collection[str]) -> None:
        """Raise RewardError where rows with these columns lack one that the judge requires."""
        ...

    def probe(self, answers: Answers) -> None:
        """See `Functions.probe`; `wins` does the same with its own answers."""
        ...

    def close(self) -> None:
        """Close the judge's files and connections."""
        ...


class FunctionJudge:
    """A judge that is a function `judge(prompts, first, second, **columns)`."""

    def __init__(self, function: Function, timeout: float | None = TIMEOUT) -> None:
        self._name, self._functions = function.name, Functions([function], timeout)

    def wins(self, first: Answers, second: Answers) -> list[float]:
        """See `Judge.wins`."""
        # `made` is `first`, or the made-up answers of a probe, which are compared with themselves
        (values,) = self._functions.call(first, lambda made: _given(made, second if made is first else made))
        return [self._probability(first, i, p) for i, p in enumerate(values)]

    def check_columns(self, there: Collection[str]) -> None:
        """See `Judge.check_columns`."""
        self._functions.check_columns(there)

    def probe(self, answers: Answers) -> None:
        """See `Judge.probe`."""
        self._functions.probe(answers, lambda made: _given(made, made))

    def close(self) -> None:
        """See `Judge.close`."""
        self._functions.close()

    def _probability(self, answers: Answers, i: int, p: float | None) -> float:
        if p is None or not 0 <= p <= 1:
            raise RewardError(
                f"judge '{self._name}' returned {shown(p)} for {answers.place(i)}; "
                f"it must be the probability that the first wins, from 0 to 1"
            )
        return p


class BradleyTerry:
    """Rewards as a judge: P(first wins) = sigmoid(scale * (r(first) - r(second)))."""

    def __init__(self, rewards: Rewards, scale: float) -> None:
        self._rewards, self._scale = rewards, scale

    def wins(self, first: Answers, second: Answers) -> list[float]:
        """See `Judge.wins`."""
        totals = [self._rewards.score(answers).total for answers in (first, second)]
        # an answer that no reward applies to cannot be compared
        gaps = [0.0 if a is None or b is None else self._scale * (a - b) for a, b in zip(*totals, strict=True)]
        return torch.sigmoid(torch.tensor(gaps, dtype=torch.float64)).tolist()  # type: ignore[no-any-return]

    def check_columns(self, there: Collection[str]) -> None:
        """See `Judge.check_columns`."""
        self._rewards.check_columns(there)

    def probe(self, answers: Answers) -> None:
        """See `Judge.probe`."""
        self._rewards.probe(answers)

    def close(self) -> None:
        """See `Judge.close`."""
        self._rewards.close()


def build_judge(
    spec: Any, device: Device = "cpu", timeout: float | None = TIMEOUT, shared: Shared | None = None
) -> Judge:
    """Load the judge of a spec (see docs/rewards.md), models onto `device`. Raises as `check_judge`, and ModelError.

    timeout, shared: see `build_rewards`.
    """
    if (found := _bradley_terry(spec)) is not None:
        rewards, scale = found
        return BradleyTerry(build_rewards(rewards, device, timeout, shared), scale)
    return FunctionJudge(leaf(spec, JUDGE).build(device, shared), timeout)


def check_judge(spec: Any) -> None:
    """Raise ConfigError for a spec that cannot work, PluginError for a broken plugin; loads no model."""
    if (found := _bradley_terry(spec)) is not None:
        check_rewards(found[0])
    else:
        leaf(spec, JUDGE)


def check_columns(reward: Any, judge: Any, there: Collection[str]) -> None:
    """Raise RewardError where rows with these columns lack one that the specs' functions require; loads no model.

    reward, judge: None without one. A user's class is not checked: it would have to be created. Also raises as
    `check_rewards` and `check_judge`.
    """
    if reward is not None:
        check_reward_columns(reward, there)
    if judge is not None and (found := _bradley_terry(judge)) is not None:
        check_reward_columns(found[0], there)
    elif judge is not None:
        leaf(judge, JUDGE).check_columns(there)


def columns_read(reward: Any, judge: Any, there: Collection[str]) -> frozenset[str]:
    """Return the columns, of those that are there, that reward and judge may read; None without one. Loads no model."""
    found = frozenset[str]() if reward is None else reward_columns(reward, there)
    if judge is None:
        return found
    compared = _bradley_terry(judge)
    return found | (leaf(judge, JUDGE).reads(there) if compared is None else reward_columns(compared[0], there))


def judge_folders(spec: Any) -> list[str]:
    """Return the folders of a spec's models without loading them. Raises as `check_judge`."""
    if (found := _bradley_terry(spec)) is not None:
        return reward_folders(found[0])
    return [folder] if (folder := leaf(spec, JUDGE).folder) else []


def _given(first: Answers, second: Answers) -> dict[str, Any]:
    given = {"prompts": first.prompts, "first": first.completions, "second": second.completions}
    return given | known_of(second, "second_")


def _bradley_terry(spec: Any) -> tuple[Any, float] | None:
    """Return the rewards' spec and the scale of a Bradley-Terry judge, None for another one."""
    if isinstance(spec, list | tuple):
        raise ConfigError(
            "judge: must be one judge, got a list; to use several rewards as one judge: {bradley_terry: [...]}"
        )
    if isinstance(spec, Mapping) and "weight" in spec:
        raise ConfigError("judge: a judge has no weight")
    if not isinstance(spec, Mapping) or "bradley_terry" not in spec:
        return None
    for key in spec:
        if key not in ("bradley_terry", "scale"):
            raise ConfigError(f"judge: bradley_terry has no option '{key}'.{nearest(key, ['scale'])} Options: scale")
    scale = number(spec.get("scale", 1.0), "judge: scale")
    if scale <= 0:
        raise ConfigError(f"judge: scale is {scale:g}; give a number above 0")
    return spec["bradley_terry"], scale
