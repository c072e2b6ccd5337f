"""Checks that a run's rewards, judge and sampling settings fit its method."""

from __future__ import annotations

from typing import Any

from alignkit.config import RunConfig
from alignkit.errors import ConfigError
from alignkit.method import Method
from alignkit.rewards import check_judge, check_rewards, pays_by_environment
from alignkit.rollout.backends import check_backend


def check_online(config: RunConfig, method: Method[Any]) -> None:
    """Raise ConfigError where the settings that sample and score do not fit the method; loads nothing."""
    needs = method.roles() if method.data == "prompts" else frozenset[str]()
    for role, check in (("reward", check_rewards), ("judge", check_judge)):
        given = getattr(config, role)
        if role in needs and given is None:
            raise ConfigError(
                f"'{method.name}' needs a {role}: set `{role}` to a function such as `my_module:my_{role}`, the folder "
                f"of a reward model, or the name of a built-in {role}; see docs/rewards.md"
            )
        if given is not None:
            check(given)
    _check_ahead(config)
    if config.environment is not None:
        _check_environment(config, needs)
    elif config.reward is not None and pays_by_environment(config.reward):
        raise ConfigError("reward: environment is what an environment pays, and there is none; set `environment`")
    if "judge" in needs and config.patience is not None:
        raise ConfigError(
            f"'{method.name}' plays against an opponent that changes, so its evaluations cannot be compared; "
            "remove patience"
        )
    if method.data == "prompts":
        check_backend(config, mixes="judge" in needs)


def _check_environment(config: RunConfig, needs: frozenset[str]) -> None:
    settings, longest = config.environment, config.sampling.max_new_tokens
    assert settings is not None
    if "judge" in needs:
        raise ConfigError(f"'{config.method}' samples from a mixture, which has no environment; remove `environment`")
    if config.rollout.ahead:
        raise ConfigError("rollout.ahead keeps completions of one turn only; remove it, or `environment`")
    if longest > settings.max_tokens:
        raise ConfigError(
            f"sampling.max_new_tokens, of a turn, is {longest}, and environment.max_tokens, of a trajectory, "
            f"{settings.max_tokens}; lower the first or raise the second"
        )


def _check_ahead(config: RunConfig) -> None:
    if config.rollout.ahead and (config.streaming or config.fsdp):
        other = "streaming reads each step's rows once" if config.streaming else "fsdp shards the weights"
        raise ConfigError(
            f"rollout.ahead reads the next step's rows and keeps a copy of the weights, but {other}; remove one of them"
        )
