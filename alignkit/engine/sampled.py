"""The metrics of sampled completions: lengths, ends, and the rewards of those that were scored, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.rollout import Sampled
from alignkit.rollout.completions import distinct


def sampled_metrics(
    total: Callable[[Tensor], Tensor], sampled: Sequence[Sequence[Sampled]], scored: Mapping[str, Sequence[Any]], n: int
) -> dict[str, float]:
    """Return the metrics of this step's completions. total: sums a tensor over the ranks. n: completions of a prompt.

    scored: "wins" and rewards, a number for each completion or None.
    """
    flat = [s for some in sampled for s in some]
    numbers = {k: v for k, v in scored.items() if k == "wins" or k.startswith("reward")}
    sums: list[float] = [len(flat), sum(s.n_sampled for s in flat), sum(s.ended for s in flat)]
    sums += distinct(sampled)
    for values in numbers.values():
        there = [x for x in values if x is not None]
        sums += [len(there), sum(there), sum(x * x for x in there)]
    groups = [numbers["reward"][i : i + n] for i in range(0, len(flat), n)] if "reward" in numbers else []
    sums.append(sum(all(x is None for x in group) for group in groups))
    count, tokens, ended, different, bigrams, *moments = total(torch.tensor(sums, dtype=torch.float64)).tolist()
    logged = {"completion/length": tokens / count, "completion/eos_rate": ended / count}
    logged["completion/distinct_2"] = different / max(bigrams, 1)
    unscored_groups = moments.pop()
    for name, there, added, squares in zip(numbers, moments[0::3], moments[1::3], moments[2::3], strict=True):
        if there:  # a mean over the completions that it applies to
            logged[f"{name}/mean"] = added / there
        if name == "reward":
            mean = added / max(there, 1)
            logged["reward/std"] = max(squares / max(there, 1) - mean**2, 0.0) ** 0.5
            if there < count:
                logged |= {"reward/unscored": count - there, "reward/unscored_groups": unscored_groups}
    return logged


def trajectory_metrics(total: Callable[[Tensor], Tensor], sampled: Sequence[Sequence[Sampled]]) -> dict[str, float]:
    """Return the means over all trajectories of a step: turns, tokens that were read, and what was earned.

    total: sums a tensor over the ranks.
    """
    flat = [s for some in sampled for s in some]
    sums: list[float] = [len(flat), sum(s.turns for s in flat), sum(len(s.tokens) - s.n_sampled for s in flat)]
    sums.append(sum(s.earned or 0.0 for s in flat))
    n, *parts = total(torch.tensor(sums, dtype=torch.float64)).tolist()
    return {f"environment/{name}": part / n for name, part in zip(("turns", "read", "earned"), parts, strict=True)}


def trajectory_lines(sampled: Sequence[Sequence[Sampled]]) -> dict[str, Sequence[Any]]:
    """Return what completions.jsonl has of trajectories: their turns, and what they earned."""
    flat = [s for some in sampled for s in some]
    return {"turns": [s.turns for s in flat], "earned": [s.earned for s in flat]}
