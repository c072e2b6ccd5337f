"""`torch_compile`: norms and feed-forward layers by torch.compile train what they train without it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import reds
from torch._dynamo.utils import counters
from zoo import fresh

import alignkit
from alignkit.errors import ConfigError
from alignkit.models.compiled import compile_parts
from alignkit.runs.folder import read_metrics
from helpers import make_rows

pytestmark = pytest.mark.slow


def losses(method: str, settings: dict[str, Any], rows: list[dict[str, Any]], **own: Any) -> tuple[list[Any], Path]:
    """The loss, gradient norm and accuracy of each step, and the run's folder."""
    given = {"max_steps": 4, "learning_rate": 1e-4, "quiet": True}
    folder = alignkit.run(method, data=rows, **settings | given | own).folder
    keys = ("loss", "grad_norm", "rewards/accuracy")
    return [line.get(key) for line in read_metrics(folder) for key in keys if "grad_norm" in line], folder


@pytest.mark.parametrize("own", [{}, {"lora": 4}, {"gradient_checkpointing": True}, {"layout": "padded"}], ids=str)
def test_it_trains_what_it_trains_without_it(own: dict[str, Any], settings: dict[str, Any]) -> None:
    rows = make_rows("pairs", 16)
    plain, _ = losses("dpo", settings, rows, **own)
    counters.clear()
    torch._dynamo.reset()
    compiled, _ = losses("dpo", settings, rows, torch_compile=True, **own)
    assert counters["stats"]["unique_graphs"] > 2
    assert compiled == pytest.approx(plain, abs=2e-6, rel=1e-4)


@pytest.mark.parametrize("own", [{"precision": "bf16"}, {"dtype": "bfloat16"}], ids=str)
def test_in_16_bits_the_policy_equals_its_reference_at_first(own: dict[str, Any], settings: dict[str, Any]) -> None:
    """Also where a run without `torch_compile` has left a cache of the same reference."""
    rows = make_rows("pairs", 16)
    plain, _ = losses("dpo", settings, rows, **own)
    found, _ = losses("dpo", settings, rows, torch_compile=True, **own)
    assert found[0] == pytest.approx(math.log(2), abs=1e-7)
    assert found[2] == plain[2] == 0.5
    assert found == pytest.approx(plain, abs=5e-3, rel=0.05)


def test_sampling_is_not_compiled(settings: dict[str, Any]) -> None:
    rows = [{"prompt": row["prompt"]} for row in make_rows("text", 8)]
    own = {"reward": reds, "group_size": 2, "beta": 0.1, "sampling": {"max_new_tokens": 8}, "precision": "bf16"}
    said = []
    for compiled in (False, True):
        _, folder = losses("grpo", settings, rows, torch_compile=compiled, learning_rate=1e-12, **own)
        lines = (folder / "completions.jsonl").read_text().splitlines()
        said.append([json.loads(line)["completion"] for line in lines])
    assert len(said[0]) > 8
    assert said[0] == said[1]


def test_a_resumed_run_is_the_uninterrupted_one(settings: dict[str, Any]) -> None:
    rows = make_rows("pairs", 16)
    given = {"torch_compile": True, "save_every": 2, "name": "whole"}
    whole, folder = losses("dpo", settings, rows, **given)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    torch._dynamo.reset()
    assert losses("dpo", settings, rows, **given, resume=True)[0] == whole


@pytest.mark.parametrize("name", ["gemma 3", "gpt 2", "mixtral", "mamba"])
def test_architectures_compute_what_they_compute_without_it(name: str) -> None:
    model, tokens = fresh(name).eval(), torch.arange(12)[None]
    before = model(tokens).logits.detach()
    torch._dynamo.reset()
    counters.clear()
    compile_parts(model, torch.device("cpu"))
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] > 0


def test_without_a_compiler_nothing_is_trained(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nplanted by the test")

    monkeypatch.setattr(torch, "compile", broken)
    words = (
        r"torch_compile: it does not work here \(RuntimeError: Failed to find C compiler.\); it needs a C\+\+ compiler"
    )
    with pytest.raises(ConfigError, match=words):
        losses("dpo", settings, make_rows("pairs", 8), torch_compile=True)
    with pytest.raises(ConfigError, match="this model has no norms or feed-forward layers that are known"):
        compile_parts(torch.nn.Linear(2, 2), torch.device("cpu"))
