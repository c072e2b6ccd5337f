"""What a plugin can hook into. A plugin is a module named by an entry point in one of four groups:

    [project.entry-points.alignkit]
    mine = "my_module"              # the entry point's name is the method's name

    [project.entry-points."alignkit.rewards"]
    fluency = "my_module"           # the reward's name; judges in "alignkit.judges"

    [project.entry-points."alignkit.listeners"]
    watch = "my_module"             # a listener of every run

and the module implements the hooks below with `alignkit.hookimpl`.
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
    """Return the method classes (`alignkit.Method`) that this module brings."""


@hookspec
def register_rewards() -> dict[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """Return the rewards that this module brings, by name.

    A reward is a function `reward(prompts, completions, **columns) -> list[float]`, or a class whose objects are such
    functions; options that a user gives go to the function's keywords, or to the class.
    """


@hookspec
def register_judges() -> dict[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """Return the judges that this module brings, by name.

    A judge is a function `judge(prompts, first, second, **columns) -> list[float]` of P(first wins), or such a class.
    """


@hookspec
def on_metrics(run: RunView, step: int, metrics: Mapping[str, float]) -> list[Alarm]:  # type: ignore[empty-body]
    """Look at a line of metrics before it is written, and return what is wrong; of each name the first alarm is said.

    Asked on the main process alone, in the order of the lines; those of an evaluation begin with "eval/". When it is
    asked, the run's folder holds all lines before this one, and the completions of this step.
    """
