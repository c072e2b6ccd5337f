"""A call of a method's `ctx.rollouts`: what it asks for, checked."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from alignkit.config import validated
from alignkit.errors import ConfigError, PluginError, nearest
from alignkit.rollout_settings import Sampling

CHANGEABLE = ("max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "stop")
_DRAWN = ("temperature", "top_p", "top_k")  # of a distribution, which a greedy completion is not drawn from


@dataclass(frozen=True)
class Draw:
    """What one call of `ctx.rollouts` samples.

    sampling: the run's settings with the call's changes. n: completions of each prompt. mixture: the reference's weight
    in the opponent's distribution, or None. greedy: take the most likely token. name: of the call in metrics and
    completions. number: of the call in its step, from 0. logps: score the tokens with the models.
    """

    sampling: Sampling
    n: int = 1
    mixture: float | None = None
    greedy: bool = False
    name: str = ""
    number: int = 0
    logps: bool = True

    @property
    def prefix(self) -> str:
        """What the names of the call's metrics begin with."""
        return f"{self.name}/" if self.name else ""


def checked(
    run: Sampling,
    before: Collection[str],
    n: int = 1,
    mixture: float | None = None,
    *,
    greedy: bool = False,
    sampling: Mapping[str, Any] | None = None,
    name: str = "",
    logps: bool = True,
) -> Draw:
    """Return a call as a Draw. run: the run's settings. before: the names of the step's earlier calls.

    Raises PluginError where the call contradicts itself, or a setting cannot be changed or has an invalid value.
    """
    if mixture is not None and (n != 1 or greedy):
        raise PluginError(f"rollouts(mixture=...) compares single samples; it was called with n={n}, greedy={greedy}")
    if greedy and n != 1:
        raise PluginError(f"rollouts(greedy=True) gives the same completion every time; n is {n}, leave it out")
    if name in before or not re.fullmatch(r"[A-Za-z0-9_-]*", name):
        taken = ", ".join(repr(one) for one in before) or "none"
        raise PluginError(
            f"rollouts(name={name!r}): each call of a step needs a name of its own, of letters, digits, _ and -, for "
            f"its metrics; names of earlier calls: {taken}. Write name='baseline', for example"
        )
    changed = _changed(run, dict(sampling or {}), greedy)
    return Draw(changed, n, mixture, greedy, name, len(before), logps)


def _changed(run: Sampling, changes: dict[str, Any], greedy: bool) -> Sampling:
    """Return the settings with a call's changes."""
    for name in changes:
        if name not in CHANGEABLE:
            raise PluginError(
                f"rollouts(sampling=...) cannot change '{name}'.{nearest(name, CHANGEABLE)} It can change "
                f"{', '.join(CHANGEABLE)}"
            )
        if greedy and name in _DRAWN:
            raise PluginError(f"rollouts(greedy=True) draws nothing, so it has no '{name}'; remove it from `sampling`")
    try:
        made = validated(Sampling, {**run.model_dump(), **changes})
    except ConfigError as error:
        raise PluginError(f"rollouts(sampling=...): {error}") from None
    if made.max_new_tokens > run.max_new_tokens:
        raise PluginError(
            f"rollouts(sampling=...): max_new_tokens {made.max_new_tokens} is more than the run's "
            f"sampling.max_new_tokens {run.max_new_tokens}, for which the model was checked; use "
            "min(..., ctx.max_new_tokens)"
        )
    return made
