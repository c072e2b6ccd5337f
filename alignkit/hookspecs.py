"""The hooks of plugins. A plugin is a module that an entry point names, in one of five groups:

    [project.entry-points.alignkit]
    mine = "my_module"              # the entry point's name is the method's name

    [project.entry-points."alignkit.rewards"]
    fluency = "my_module"           # the reward's name; judges in "alignkit.judges"

    [project.entry-points."alignkit.listeners"]
    watch = "my_module"             # a listener of every run

    [project.entry-points."alignkit.samplers"]
    mine = "my_module"              # the name of the backend, as in `rollout: {backend: mine}`

and the module implements the hooks below with `alignkit.hookimpl`. A listener of a single run needs no entry point:
it is given by the setting `callbacks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pluggy

from alignkit.alarms import Alarm, RunView

hookspec = pluggy.HookspecMarker("alignkit")
hookimpl = pluggy.HookimplMarker("alignkit")


@hookspec
def register_methods() -> list[type[Any]]:  # type: ignore[empty-body]
    """Return the method classes (`alignkit.Method`) of this module."""


@hookspec
def register_rewards() -> dict[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """Return the rewards of this module, by name.

    A reward is a function `reward(prompts, completions, **columns) -> list[float]`, or a class whose objects are such
    functions; a user's options are passed as keywords to the function, or to the class.
    """


@hookspec
def register_judges() -> dict[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """Return the judges of this module, by name.

    A judge is a function `judge(prompts, first, second, **columns) -> list[float]` of P(first wins), or such a class.
    """


@hookspec
def register_samplers() -> dict[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """Return the samplers of this module, by name.

    A sampler is a subclass of `alignkit.Sampler`, or a function that returns one. It is called with an
    `alignkit.Setup`, and with `rollout.options` as keywords.
    """


@hookspec
def on_metrics(run: RunView, step: int, metrics: Mapping[str, float]) -> list[Alarm]:  # type: ignore[empty-body]
    """Check a line of metrics before it is written, and return alarms; only the first alarm of each name is reported.

    Called on the main process only, in the order of the lines; metrics of an evaluation start with "eval/". At each
    call the run's folder holds all lines before this one, and the completions of this step.
    """
