"""What scores sampled completions: rewards, and judges that compare two of them.

A spec (a setting of a run) is checked by `check_rewards` or `check_judge` before anything is loaded, and built by
`build_rewards` or `build_judge`. docs/rewards.md has its forms.
"""

from __future__ import annotations

from alignkit.rewards.answers import Answers, Scores
from alignkit.rewards.combine import Rewards, build_rewards, check_rewards, reward_folders
from alignkit.rewards.judges import Judge, build_judge, check_columns, check_judge, judge_folders
from alignkit.rewards.models import PAIRWISE
from alignkit.rewards.running import RunningStats
from alignkit.rewards.sequences import pairwise_ids

__all__ = [
    "PAIRWISE", "Answers", "Judge", "Rewards", "RunningStats", "Scores", "build_judge", "build_rewards",
    "check_columns", "check_judge", "check_rewards", "judge_folders", "pairwise_ids", "reward_folders",
]  # fmt: skip
