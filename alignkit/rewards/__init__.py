"""Rewards, which score sampled completions, and judges, which compare two of them.

A spec (the setting `reward` or `judge`, see docs/rewards.md) is checked by `check_rewards` or `check_judge` before
anything is loaded, and built by `build_rewards` or `build_judge`.

spec.py        specs -> functions that are not loaded yet
functions.py   rewards and judges as functions
calls.py       calling them; event_loop.py async ones; limits.py when a call must end
probing.py     whether a function reads completions as text or as messages
combine.py     weighted sums and ensembles of rewards
judges.py      judges, and rewards as a judge (Bradley-Terry)
verifiers.py   rewards without a model; numeric.py numbers in answers; expressions.py expressions and words
models.py      reward models and pairwise preference models; classifier.py their scores, whole or sharded
llm.py         language models as rewards and judges; endpoint.py their HTTP client; judgements.py its cache;
               secrecy.py what it does not print
answers.py     the input and output of rewards
"""

from __future__ import annotations

from alignkit.rewards.answers import Answers, Scores
from alignkit.rewards.classifier import Shared
from alignkit.rewards.combine import Rewards, build_rewards, check_rewards, pays_by_environment, reward_folders
from alignkit.rewards.judges import Judge, build_judge, check_columns, check_judge, columns_read, judge_folders

__all__ = [
    "Answers", "Judge", "Rewards", "Scores", "Shared", "build_judge", "build_rewards",
    "check_columns", "check_judge", "check_rewards", "columns_read", "judge_folders", "pays_by_environment",
    "reward_folders",
]  # fmt: skip
