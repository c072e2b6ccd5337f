"""The settings of the demo's runs, by method.

A model of a million parameters wants rates a hundred times those of the billions that the defaults are for.
"""

from __future__ import annotations

from typing import Any

from alignkit import registry
from alignkit.config import Sampling

LENGTH = Sampling(max_new_tokens=40)  # twice the longest answer
SFT: dict[str, Any] = {"learning_rate": 2e-3, "epochs": 24, "batch_size": 32, "warmup_fraction": 0.05}
SHARED: dict[str, Any] = {"batch_size": 16, "epochs": 2, "max_prompt_tokens": 64, "max_completion_tokens": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"learning_rate": 1e-4},
    "ipo": {"learning_rate": 1e-4},
    "kto": {"learning_rate": 1e-4, "batch_size": 32},  # a pair is two examples
    "orpo": {"learning_rate": 1e-3, "lambda_": 0.5},
    "simpo": {"learning_rate": 1e-4},
    "cpo": {"learning_rate": 5e-4},
    "ppo": {"learning_rate": 2e-4, "batch_size": 32, "epochs": 4, "epochs_per_batch": 2, "beta": 0.1},
    "grpo": {"learning_rate": 3e-4, "group_size": 8, "beta": 0.01},
    "rloo": {"learning_rate": 2e-4, "batch_size": 32, "group_size": 4, "beta": 0.05, "epochs": 6},
    "nash": {"learning_rate": 2e-4, "batch_size": 32, "tau": 0.05, "epochs": 6},
}
OTHERS = {"learning_rate": 1e-4}
VERDICTS = {"reward": "alignkit.demo.verdict:reward", "judge": "alignkit.demo.verdict:judge"}


def recipe(method: str) -> dict[str, Any]:
    """Return the settings of a run on the demo's task, without model and data. Raises PluginError."""
    cls = registry.get(method)
    settings = {**SHARED, **SETTINGS.get(method, OTHERS)}
    if cls.data != "prompts":
        return settings
    asks = {role: VERDICTS[role] for role in VERDICTS if role in cls.uses}
    return {**settings, "sampling": LENGTH.model_dump(), **asks}
