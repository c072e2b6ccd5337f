"""The installed methods that the demo can run, and the settings of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit import registry
from alignkit.advice import DataFacts, advice_of
from alignkit.config import Sampling
from alignkit.demo import world
from alignkit.demo.base import write_start
from alignkit.engine import Engine, Result
from alignkit.errors import PluginError

LENGTH = Sampling(max_new_tokens=40)  # twice the longest answer
SFT: dict[str, Any] = {"learning_rate": 2e-3, "epochs": 24, "batch_size": 32, "warmup_fraction": 0.05}
SHARED: dict[str, Any] = {"batch_size": 16, "epochs": 2, "max_prompt_tokens": 64, "max_completion_tokens": 64}
VERDICTS = {"reward": "alignkit.demo.verdict:reward", "judge": "alignkit.demo.verdict:judge"}


def offered() -> list[str]:
    """Return the methods that can align the demo's base: those that train a policy, except the base's own."""
    base = best("text")
    return [p.name for p in registry.plugins() if p.method and "policy" in p.method.trains and p.name != base]


def best(kind: str, role: str = "policy") -> str:
    """Return the installed method with the highest rank by its own advice that trains a role on rows of a kind.

    Raises PluginError where no such method is installed.
    """
    facts, ranks = DataFacts(rows={kind: 1}), {}
    for plugin in registry.plugins():
        if plugin.method and plugin.method.data == kind and role in plugin.method.trains:
            try:
                ranks[plugin.name] = advice_of(plugin.method, facts).rank or 0
            except PluginError:  # its advice is broken, which `recommend` reports
                continue
    if not ranks:
        add = "pip install alignkit-sft alignkit-dpo alignkit-reward"
        raise PluginError(f"the demo needs a method that trains a {role} on rows of the kind '{kind}'; try: {add}")
    return max(ranks, key=lambda name: ranks[name])


def recipe(method: str) -> dict[str, Any]:
    """Return the settings of a run on the demo's task, without model and data. Raises PluginError."""
    cls = registry.get(method)
    settings = {**SHARED, **cls.demo_settings}
    if cls.data != "prompts":
        return settings
    verdicts = {role: spec for role, spec in VERDICTS.items() if role in cls.uses}
    return {**settings, "sampling": LENGTH.model_dump(), **verdicts}


def train_base(engine: Engine, folder: Path, train: Sequence[world.Question], seed: int) -> Result:
    """Write the untrained model and rows in both styles to a folder, fine-tune the model, and return the Result."""
    rows = world.write_jsonl(folder / "texts.jsonl", world.sft_rows(train))
    start = write_start(folder / "start", [q.prompt + answer for q in train for answer in (q.brief, q.chatty)], seed)
    method = best("text")
    return engine.run(method, model=str(start), data=str(rows), name=method, **SFT)
