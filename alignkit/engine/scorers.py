"""The rewards and the judge of a run, loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignkit.config import RunConfig
from alignkit.method import Method
from alignkit.models.ranks import Ranks
from alignkit.models.sharding import mesh_of
from alignkit.rewards import Judge, Rewards, Shared, build_judge, build_rewards
from alignkit.rollout.completions import unanswered
from alignkit.types import Example


@dataclass
class Scorers:
    """The rewards and the judge of a run. columns: of its rows, for their arguments."""

    rewards: Rewards | None
    judge: Judge | None
    columns: tuple[str, ...] = ()

    @classmethod
    def of_run(
        cls, config: RunConfig, method: Method[Any], examples: Sequence[Example], device: torch.device, ranks: Ranks
    ) -> Scorers | None:
        """Load them, with `fsdp` each rank its shards; None for a method that does not sample.

        examples: all of the run. Raises RewardError.
        """
        if method.data != "prompts":
            return None
        shared = Shared(ranks, mesh_of(device.type, ranks.n, config.fsdp_replicas)) if config.fsdp else None
        how = device, config.reward_timeout, shared
        rewards = build_rewards(config.reward, *how) if config.reward is not None else None
        judge = build_judge(config.judge, *how) if config.judge is not None else None
        columns = tuple(dict.fromkeys(name for e in examples for name in e.columns))
        asked = unanswered(examples[:64], columns)
        for one in (rewards, judge):
            if one is not None:
                one.check_columns(columns)
                one.probe(asked)
        return cls(rewards, judge, columns)
