"""The installed methods that the demo can run, and the settings of its runs."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit import registry
from alignkit.advice import DataFacts
from alignkit.config import gathered, split
from alignkit.demo import world
from alignkit.demo.base import write_start
from alignkit.engine import Engine
from alignkit.errors import PluginError
from alignkit.plugin_checks import advice_of, demo_settings_of
from alignkit.rollout_settings import Sampling
from alignkit.unused import check_used

LENGTH = Sampling(max_new_tokens=40)  # twice the longest answer
SHARED: dict[str, Any] = {"batch_size": 16, "epochs": 2, "max_prompt_tokens": 64}
VERDICTS = {"reward": "alignkit.demo.verdict:reward", "judge": "alignkit.demo.verdict:judge"}


def offered() -> list[str]:
    """Return the methods that can align the demo's base: those that train a policy, except the base's own."""
    base = base_trainer()
    return [p.name for p in registry.plugins() if p.method and "policy" in p.method.trains and p.name != base]


def base_trainer() -> str:
    """Return the method that fine-tunes the base: one that declares `demo_base`, this project's before a third party's.

    Raises PluginError where no such method is installed.
    """
    able = [p for p in registry.plugins() if p.method and p.method.data == "text" and p.method.demo_base is not None]
    if not able:
        raise PluginError("the demo needs a method that can fine-tune its base; try: pip install alignkit-sft")
    return min(able, key=lambda p: (not p.distribution.startswith("alignkit-"), p.name)).name


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
        add = "pip install alignkit-dpo alignkit-reward"
        raise PluginError(f"the demo needs a method that trains a {role} on rows of the kind '{kind}'; try: {add}")
    return max(ranks, key=lambda name: ranks[name])


def recipe(method: str) -> dict[str, Any]:
    """Return the settings of a run on the demo's task, without model and data. Raises PluginError: one is wrong."""
    cls = registry.get(method)
    settings = {**SHARED, **demo_settings_of(cls)}
    if cls.data == "prompts":
        verdicts = {role: spec for role, spec in VERDICTS.items() if role in cls.uses}
        own = settings.get("sampling", {})
        own = own.model_dump(exclude_unset=True) if isinstance(own, Sampling) else own
        sampling = {**LENGTH.model_dump(), **own} if isinstance(own, Mapping) else own
        settings = {**verdicts, **settings, "sampling": sampling}
    return _checked(method, "demo_settings", settings)


def base_settings() -> dict[str, Any]:
    """Return the settings of the run that fine-tunes the base, without model and data. Raises PluginError."""
    method = base_trainer()
    return _checked(method, "demo_base", gathered(registry.get(method).demo_base or {}))


def _checked(method: str, attribute: str, settings: dict[str, Any]) -> dict[str, Any]:
    cls = registry.get(method)
    try:
        run, own = split({**settings, "method": method, "model": "-", "data": "-", "eval_data": "-"}, cls.Config)
        check_used(run, cls(own))
    except (Exception, SystemExit) as error:  # the validators are a third party's code
        raise PluginError(f"the {attribute} of '{method}' cannot be used: {error}") from None
    return settings


class Base(NamedTuple):
    """The fine-tuned model that is aligned. folder: where it is."""

    model: Any
    tokenizer: Any
    folder: Path


def train_base(engine: Engine, folder: Path, train: Sequence[world.Question], seed: int) -> Base:
    """Write the untrained model and rows in both styles to a folder, and fine-tune the model.

    The same base of an earlier demo is used again, from ALIGNKIT_DEMO or ~/.cache/alignkit/demo.
    """
    method, settings = base_trainer(), base_settings()
    rows = world.write_jsonl(folder / "texts.jsonl", world.sft_rows(train))
    start = write_start(folder / "start", [q.prompt + answer for q in train for answer in (q.brief, q.chatty)], seed)
    kept = _kept(method, settings, [rows, start / "model.safetensors", start / "tokenizer.json"], seed)
    if kept.is_dir():
        try:
            return Base(AutoModelForCausalLM.from_pretrained(kept), AutoTokenizer.from_pretrained(kept), kept)
        except (OSError, ValueError, SafetensorError):  # damaged
            shutil.rmtree(kept, ignore_errors=True)
    made = engine.run(method, model=str(start), data=str(rows), name=method, **settings)
    with suppress(OSError):  # the next demo then trains its own
        new = kept.with_name(f"{kept.name}-{os.getpid()}")
        shutil.copytree(made.folder / "model", new)
        new.rename(kept)
    return Base(made.model, made.tokenizer, made.folder / "model")


def _kept(method: str, settings: Mapping[str, Any], files: Sequence[Path], seed: int) -> Path:
    """Return the folder for a base that is made from these files with these settings."""
    made_by = [method, sorted(settings.items()), seed, torch.__version__, version("transformers"), version("alignkit")]
    digest = hashlib.sha256(repr(made_by).encode())
    for file in files:
        digest.update(file.read_bytes())
    parent = Path(os.environ.get("ALIGNKIT_DEMO") or "~/.cache/alignkit/demo").expanduser()
    return parent / digest.hexdigest()[:16]
