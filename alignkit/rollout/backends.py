"""The sampler of a run, by the name of its backend: this process, servers, or a plugin's."""

from __future__ import annotations

from typing import Any

from alignkit import registry
from alignkit.config import RunConfig
from alignkit.errors import ConfigError, PluginError, at_place, nearest
from alignkit.rollout.sampler import Sampler, Setup
from alignkit.rollout.sampling import Local
from alignkit.rollout.vllm import Vllm
from alignkit.rollout_settings import LOCAL

BACKENDS = (*LOCAL, "vllm")


def build_sampler(setup: Setup) -> Sampler:
    """Return the sampler that `rollout.backend` names. Raises ConfigError, PluginError, RolloutError."""
    name = setup.settings.backend
    if name in LOCAL:
        return Local(setup, name)
    if name == "vllm":
        return Vllm(setup)
    return _of_plugin(name, setup)


def check_backend(config: RunConfig, mixes: bool) -> None:
    """Raise ConfigError where no backend has the name, or it cannot do what the run needs; loads no model.

    mixes: the run samples from mixtures of two models.
    """
    name = config.rollout.backend
    if name not in BACKENDS:
        _factory(name)
    if mixes and name == "continuous":
        raise ConfigError(
            f"'{config.method}' samples from a mixture, which backend: {name} does not support; use backend: generate"
        )


def _factory(name: str) -> Any:
    known = registry.names(registry.SAMPLERS)
    if name not in known:
        every = [*BACKENDS, *known]
        raise ConfigError(f"rollout.backend: no backend is called '{name}'.{nearest(name, every)} It is one of {every}")
    return registry.sampler(name)


def _of_plugin(name: str, setup: Setup) -> Sampler:
    factory = _factory(name)
    try:
        made = factory(setup, **setup.settings.options)
    except PluginError:
        raise
    except Exception as error:
        raise PluginError(f"sampler '{name}' cannot be built: {error!r}{at_place(error)}") from error
    if not isinstance(made, Sampler):
        raise PluginError(f"sampler '{name}' must be an alignkit.Sampler, got {type(made).__name__}")
    return made
