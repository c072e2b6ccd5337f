"""From the setting `environment` to environments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from alignkit.config import RunConfig
from alignkit.data.chat import Chat
from alignkit.environment_settings import EnvironmentSettings
from alignkit.environments.contract import Environment
from alignkit.environments.episodes import Episodes
from alignkit.environments.tools import Tools
from alignkit.environments.turns import Turns
from alignkit.errors import ConfigError, PluginError, RolloutError, at_place
from alignkit.models.ranks import Ranks
from alignkit.rollout.sampler import Sampler
from alignkit.user_code import NAMED, imported, of_file


def maker(settings: EnvironmentSettings) -> Callable[[], Environment]:
    """Return what makes an environment for each trajectory. Raises ConfigError: there is no such class or tool."""
    if settings.tools:
        functions = [_object(tool) for tool in settings.tools]
        _check_schemas(functions)
        return lambda: Tools(functions, settings.timeout)
    factory = _object(settings.use)
    return lambda: _made(factory)


def prepared(config: RunConfig, roles: Collection[str]) -> RunConfig:
    """Return the settings of a run with what its environment brings: tools for the prompts, and the reward.

    roles: those that the method needs. Raises ConfigError or PluginError where the environment cannot be made.
    """
    settings = config.environment
    if settings is None:
        return config
    made = maker(settings)()
    made.close()
    found: dict[str, Any] = {}
    if config.tools is None and made.schemas:
        found["tools"] = [dict(schema) for schema in made.schemas]
    if config.reward is None and settings.use is not None and "reward" in roles:
        found["reward"] = "environment"
    return config.model_copy(update=found)


def episodes(turns: Sampler, config: RunConfig, tokenizer: Any, ends: Sequence[int], ranks: Ranks) -> Sampler:
    """Return the sampler of trajectories by the sampler of turns, which it is itself without an environment.

    ends: tokens that end a turn. Raises ConfigError for a chat template that cannot show what tools say.
    """
    if config.environment is None:
        return turns
    text = Turns(tokenizer, Chat.of(config))
    if config.environment.tools:
        _check_template(text, ends)
    return Episodes(turns, maker(config.environment), config.environment, text, ranks if config.fsdp else None)


def _check_template(text: Turns, ends: Sequence[int]) -> None:
    """Raise ConfigError where the template shows no answer of a tool, whatever token ends the turn with the call."""
    said = {"role": "tool", "name": "tool", "content": "word", "tool_call_id": "call00001"}
    for end in ends:
        try:
            text.tokens(end, [said])
        except RolloutError as error:
            problem = str(error)
        else:
            return
    raise ConfigError(problem)


def _check_schemas(functions: list[Any]) -> None:
    _ = Tools(functions).schemas


def _object(spec: Any) -> Any:
    """Return a class or a function by its name, or as it is given."""
    if not isinstance(spec, str):
        found = spec
    elif (match := NAMED.fullmatch(spec)) is not None:
        found = imported(match[1], match[2], "environment")
    else:
        found = of_file(spec, "environment")
    if found is None or not callable(found):
        raise ConfigError(
            f"environment: '{spec}' is no class and no function; name it as my_module:MyEnvironment or file.py:name"
        )
    return found


def _made(factory: Callable[[], Any]) -> Environment:
    try:
        made = factory()
    except Exception as error:
        raise PluginError(f"environment: {factory!r} cannot be made: {error!r}{at_place(error)}") from error
    if not isinstance(made, Environment):
        raise PluginError(f"environment: {factory!r} must return an alignkit.Environment, got {type(made).__name__}")
    return made
