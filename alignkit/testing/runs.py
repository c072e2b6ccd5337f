"""Checks with the real engine: interrupted runs, adapters, low precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from alignkit import registry
from alignkit.engine import Engine, Result
from alignkit.engine.loop import Loop
from alignkit.method import Method
from alignkit.runs.folder import read_metrics
from alignkit.testing.suite import Suite, one_thread
from alignkit.testing.world import tiny_model, tiny_rows, tiny_tokenizer

STEPS, STOPPED_AFTER = 2, 1
SAMPLING = {"max_new_tokens": 6}


class _InterruptedError(Exception):
    """Represents anything that ends a process between two steps."""


def vowels(completions: list[str], **_: Any) -> list[float]:
    """The kit's reward: the fraction of vowels in a completion."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


def more_vowels(first: list[str], second: list[str], **_: Any) -> list[float]:
    """The kit's judge: one half plus half the difference of the fractions of vowels."""
    return [0.5 + (a - b) / 2 for a, b in zip(vowels(first), vowels(second), strict=True)]


def train(method: type[Method[Any]], folder: Path, **settings: Any) -> Result:
    """Run the engine in the kit's small world and return its Result; the method need not be installed.

    folder: of runs and the reference cache. settings: of the run and of the method; they override the kit's (a new
    `tiny_model`, 12 `tiny_rows`, 2 steps of 4 rows, the CPU, float32, one checkpoint per step).
    """
    given = {
        "model": tiny_model(),
        "tokenizer": tiny_tokenizer(),
        "data": tiny_rows(method.data, columns=method.columns),
        "output": folder,
        "cache_file": folder / "reference.sqlite",
        "max_steps": STEPS,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_fraction": 0.0,
        "save_every": 1,
        "max_tokens": 128,
        "device": "cpu",
        "precision": "fp32",
    }
    if method.data == "prompts":
        given |= {"sampling": SAMPLING}
        given |= {role: f for role, f in (("reward", vowels), ("judge", more_vowels)) if role in method.uses}
    with one_thread(), mock.patch.object(registry, "get", return_value=method):
        return Engine(**{**given, **settings}).run(method.name)


@contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """Make the engine fail after this number of steps."""
    original = Loop.step

    def step(self: Loop, step: int, total: int) -> dict[str, float]:
        if step == steps:
            raise _InterruptedError
        return original(self, step, total)

    with mock.patch.object(Loop, "step", step), pytest.raises(_InterruptedError):
        yield


class RunChecks(Suite):
    """The part of the suite that trains."""

    def test_resume_full(self, config: dict[str, Any], tmp_path: Path) -> None:
        """A run that is interrupted and resumed has the weights of an uninterrupted run, bit for bit."""
        self._resumed_equals_uninterrupted(config, tmp_path, {})

    def test_resume_lora(self, config: dict[str, Any], tmp_path: Path) -> None:
        """The same with adapters, which do not change a bit of the base weights."""
        trained = self._resumed_equals_uninterrupted(config, tmp_path, {"lora": 4})
        base = {n.replace(".base_layer", ""): t for n, t in trained.get_base_model().state_dict().items()}
        for name, weight in tiny_model().state_dict().items():
            if name == "lm_head.weight" and name not in base:
                continue  # a classifier has its own head
            assert torch.equal(base[name], weight), f"training adapters changed the base weight {name}"

    def test_bf16(self, config: dict[str, Any], tmp_path: Path) -> None:
        """With weights and products in bfloat16 every step is finite, and the policy changes."""
        model = tiny_model(dtype=torch.bfloat16)
        before = {n: p.clone() for n, p in model.named_parameters()}
        settings = {"dtype": "bfloat16", "precision": "bf16", "learning_rate": 1e-2, "save_every": None}
        trained = train(self.method, tmp_path, **config, **settings, model=model, max_steps=2, name="run").model
        for line in read_metrics(tmp_path / "run"):
            assert math.isfinite(line["loss"]), f"in bfloat16: {line}"
            assert line["skipped"] == 0, f"in bfloat16: {line}"
        assert any(n in before and not torch.equal(before[n], p) for n, p in trained.named_parameters())

    def _resumed_equals_uninterrupted(self, config: dict[str, Any], folder: Path, settings: dict[str, Any]) -> Any:
        settings = {**config, **settings}
        whole = train(self.method, folder, name="whole", **settings)
        with interrupted_after(STOPPED_AFTER):
            train(self.method, folder, name="parts", **settings)
        parts = train(self.method, folder, name="parts", resume=True, **settings)
        want, got = whole.model.state_dict(), parts.model.state_dict()
        assert want.keys() == got.keys()
        different = [n for n, t in want.items() if not torch.equal(t, got[n])]
        assert not different, f"after a resume, these weights differ: {different[:4]}"
        assert _lines(folder / "whole") == _lines(folder / "parts")
        return parts.model


def _lines(folder: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_second", "seconds/")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in read_metrics(folder)]
