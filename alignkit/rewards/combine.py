"""Several rewards combined into one number: weighted sums, and ensembles against reward hacking."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.data.rows import shown
from alignkit.errors import ConfigError, nearest
from alignkit.rewards.answers import Answers, Scores
from alignkit.rewards.calls import TIMEOUT, Functions
from alignkit.rewards.classifier import Shared
from alignkit.rewards.functions import Values
from alignkit.rewards.spec import REWARD, Device, Leaf, leaf, number
from alignkit.rewards.verifiers import Earned

_COMBINE: dict[str, Callable[[Sequence[float], float], float]] = {
    "mean": lambda scores, _: statistics.fmean(scores),
    "min": lambda scores, _: min(scores),
    "mean-std": lambda scores, k: statistics.fmean(scores) - k * statistics.pstdev(scores),
}


@dataclass(frozen=True)
class Ensemble:
    """Rewards that score the same answers and are combined into one number.

    combine: "mean"; "min" (2310.02743, worst-case optimisation); "mean-std", the mean minus k population standard
    deviations, which lowers the reward of answers that only some members prefer.
    """

    name: str
    weight: float
    members: tuple[Leaf, ...]
    combine: str = "mean"
    k: float = 1.0

    def combined(self, values: Sequence[Values]) -> Values:
        """Return one value for each answer, from the members that apply to it."""
        rows = [[v for v in row if v is not None] for row in zip(*values, strict=True)]
        return [_COMBINE[self.combine](row, self.k) if row else None for row in rows]


class Rewards:
    """All rewards of a run; `build_rewards` creates it."""

    def __init__(self, parts: Sequence[Leaf | Ensemble], built: Functions) -> None:
        self._parts, self._functions = list(parts), built
        self.names = [part.name for part in parts]

    @property
    def model_folder(self) -> str | None:
        """The folder of the first reward model, from which a critic can start; None without one."""
        return next((f.folder for part in self._parts for f in _leaves(part) if f.folder), None)

    def check_columns(self, there: Collection[str]) -> None:
        """Raise RewardError where rows with these columns lack one that a reward requires."""
        self._functions.check_columns(there)

    def probe(self, answers: Answers) -> None:
        """See `Functions.probe`; `score` does the same with its own answers."""
        self._functions.probe(answers, _given)

    def score(self, answers: Answers) -> Scores:
        """Score S completions. Raises RewardError naming the reward, the row and what it returned."""
        results: Iterator[Values] = iter(self._functions.call(answers, _given))
        total: Values = [None] * len(answers)
        parts: dict[str, Values] = {}
        for part in self._parts:
            values = [one.clipped(next(results)) for one in _leaves(part)]
            whole = part.combined(values) if isinstance(part, Ensemble) else values[0]
            parts[part.name] = whole
            total = [t if v is None else (t or 0.0) + part.weight * v for t, v in zip(total, whole, strict=True)]
            if isinstance(part, Ensemble):
                parts |= {f"{part.name}/{m.name}": v for m, v in zip(part.members, values, strict=True)}
        return Scores(total, parts)

    def close(self) -> None:
        """Close the rewards' files and connections."""
        self._functions.close()


def build_rewards(
    spec: Any, device: Device = "cpu", timeout: float | None = TIMEOUT, shared: Shared | None = None
) -> Rewards:
    """Load the rewards of a spec (docs/rewards.md), models onto `device`. Raises as `check_rewards`, and ModelError.

    timeout: seconds for a call of one function, None for no limit. shared: the ranks over which models are sharded;
    all of them must then call `score` equally often, with answers or without.
    """
    parts = _parts(spec)
    return Rewards(parts, Functions([f.build(device, shared) for part in parts for f in _leaves(part)], timeout))


def check_rewards(spec: Any) -> None:
    """Raise ConfigError for a spec that cannot work, PluginError for a broken plugin; loads no model."""
    _parts(spec)


def check_reward_columns(spec: Any, there: Collection[str]) -> None:
    """Raise RewardError as `alignkit.rewards.check_columns` does, for rewards only."""
    for part in _parts(spec):
        for one in _leaves(part):
            one.check_columns(there)


def reward_columns(spec: Any, there: Collection[str]) -> frozenset[str]:
    """Return the columns, of those that are there, that the rewards of a spec may read. Raises as `check_rewards`."""
    return frozenset(name for part in _parts(spec) for one in _leaves(part) for name in one.reads(there))


def pays_by_environment(spec: Any) -> bool:
    """Return whether a spec has the reward `environment`. Raises as `check_rewards`."""
    leaves = (one for part in _parts(spec) for one in _leaves(part))
    return any(one.ready is not None and isinstance(one.ready.call, Earned) for one in leaves)


def reward_folders(spec: Any) -> list[str]:
    """Return the folders of a spec's models without loading them. Raises as `check_rewards`."""
    return [f.folder for part in _parts(spec) for f in _leaves(part) if f.folder]


def _parts(spec: Any) -> list[Leaf | Ensemble]:
    specs = list(spec) if isinstance(spec, list | tuple) else [spec]
    if not specs:
        raise ConfigError("reward: the list is empty")
    parts = [_ensemble(s) if isinstance(s, Mapping) and "ensemble" in s else leaf(s, REWARD) for s in specs]
    _differ(parts, "rewards")
    return parts


def _ensemble(spec: Mapping[str, Any]) -> Ensemble:
    given = dict(spec)
    name = str(given.pop("name", "ensemble"))
    weight = number(given.pop("weight", 1.0), "reward: weight")
    members, combine = given.pop("ensemble"), given.pop("combine", "mean")
    if not isinstance(members, list | tuple) or len(members) < 2:
        raise ConfigError(f"reward: an ensemble must be a list of at least two rewards, got {shown(members)}")
    if not isinstance(combine, str) or combine not in _COMBINE:
        raise ConfigError(
            f"reward: combine is {shown(combine)}.{nearest(str(combine), _COMBINE)} One of {', '.join(_COMBINE)}"
        )
    if "k" in given and combine != "mean-std":
        raise ConfigError(f"reward: k is used with combine: mean-std, not with {combine}")
    k = number(given.pop("k", 1.0), "reward: k")
    if given:
        unknown = next(iter(given))
        known = ("ensemble", "combine", "k", "weight", "name")
        raise ConfigError(f"reward: an ensemble has no '{unknown}'.{nearest(unknown, known)} It has {', '.join(known)}")
    if any(isinstance(m, Mapping) and ("weight" in m or "ensemble" in m) for m in members):
        raise ConfigError("reward: a member of an ensemble cannot have a weight or be an ensemble itself")
    leaves = tuple(leaf(m, REWARD) for m in members)
    _differ(leaves, "members of the ensemble")
    return Ensemble(name, weight, leaves, combine, k)


def _differ(parts: Sequence[Leaf | Ensemble], what: str) -> None:
    names = [part.name for part in parts]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise ConfigError(f"reward: two {what} have the name '{twice}'; name them: {{use: ..., name: ...}}")


def _given(answers: Answers) -> dict[str, Any]:
    return {"prompts": answers.prompts, "completions": answers.completions}


def _leaves(part: Leaf | Ensemble) -> tuple[Leaf, ...]:
    return part.members if isinstance(part, Ensemble) else (part,)
