"""Whether a run's rewards, judge and sampling settings can serve its method; loads nothing."""

from __future__ import annotations

from typing import Any

from alignkit.config import RunConfig
from alignkit.errors import ConfigError
from alignkit.method import Method
from alignkit.rewards import check_judge, check_rewards


def check_online(config: RunConfig, method: Method[Any]) -> None:
    """Raise ConfigError where what samples and scores cannot serve the method; loads nothing."""
    needs = method.roles() if method.data == "prompts" else frozenset[str]()
    for role, check in (("reward", check_rewards), ("judge", check_judge)):
        given = getattr(config, role)
        if role in needs and given is None:
            raise ConfigError(
                f"'{method.name}' needs a {role}: give `{role}`, such as a function `my_module:my_{role}`, the folder "
                f"of a reward model, or one that ships with alignkit; see docs/rewards.md"
            )
        if role not in needs and given is not None:
            raise ConfigError(f"'{method.name}' asks no {role}; leave out `{role}`")
        if given is not None:
            check(given)
    if "judge" in needs and config.patience is not None:
        raise ConfigError(
            f"'{method.name}' plays against an opponent that moves, so patience cannot tell; leave it out"
        )
    if "judge" in needs and config.sampling.backend == "continuous":
        raise ConfigError(f"'{method.name}' samples from a mixture, which backend: continuous cannot; use generate")
    if method.data == "prompts" and config.fsdp:
        raise ConfigError(f"'{method.name}' samples, which a policy sharded by fsdp cannot do yet; leave out fsdp")
