"""alignkit: align language models from preferences, with methods as plugins.

import alignkit
result = alignkit.run(method="dpo", model="path-or-name", data="prefs.jsonl", beta=0.1)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignkit.advice import Advice, Choice, DataFacts
    from alignkit.alarms import Alarm, RunView
    from alignkit.engine import Engine, Result, resume, run
    from alignkit.environments.contract import Environment, Step
    from alignkit.errors import AlignkitError
    from alignkit.hookspecs import hookimpl
    from alignkit.method import Context, Method, MethodConfig, Models
    from alignkit.metrics import kl_metric, log_ratios, pair_metrics, rollout_metrics, rounding, wins
    from alignkit.pairwise import pairwise_ids
    from alignkit.rollout.sampler import Request, Sampled, Sampler, Setup
    from alignkit.running import RunningStats
    from alignkit.types import Batch, Completion, Example, Outputs, Term, metric

__version__ = "0.1.0"

_HOMES = {
    "alignkit.advice": ("Advice", "Choice", "DataFacts"),
    "alignkit.alarms": ("Alarm", "RunView"),
    "alignkit.engine": ("Engine", "Result", "resume", "run"),
    "alignkit.environments.contract": ("Environment", "Step"),
    "alignkit.errors": ("AlignkitError",),
    "alignkit.hookspecs": ("hookimpl",),
    "alignkit.method": ("Context", "Method", "MethodConfig", "Models"),
    "alignkit.metrics": ("kl_metric", "log_ratios", "pair_metrics", "rollout_metrics", "rounding", "wins"),
    "alignkit.pairwise": ("pairwise_ids",),
    "alignkit.rollout.sampler": ("Request", "Sampled", "Sampler", "Setup"),
    "alignkit.running": ("RunningStats",),
    "alignkit.types": ("Batch", "Completion", "Example", "Outputs", "Term", "metric"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Advice",
    "Alarm",
    "AlignkitError",
    "Batch",
    "Choice",
    "Completion",
    "Context",
    "DataFacts",
    "Engine",
    "Environment",
    "Example",
    "Method",
    "MethodConfig",
    "Models",
    "Outputs",
    "Request",
    "Result",
    "RunView",
    "RunningStats",
    "Sampled",
    "Sampler",
    "Setup",
    "Step",
    "Term",
    "hookimpl",
    "kl_metric",
    "log_ratios",
    "metric",
    "pair_metrics",
    "pairwise_ids",
    "resume",
    "rollout_metrics",
    "rounding",
    "run",
    "wins",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # torch is imported when a name is used, not when the package is: `alignkit --help` answers at once
    if name not in _HOME_OF:
        raise AttributeError(f"module 'alignkit' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
