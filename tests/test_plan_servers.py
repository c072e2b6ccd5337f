"""Plans of runs whose completions are sampled by vLLM servers: their memory, and that of the ranks that train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_plan import of, work_of
from transformers import LlamaConfig
from typer.testing import CliRunner

from alignkit.cli.app import app
from alignkit.errors import ConfigError
from alignkit.insight.plan import plan, remedies
from alignkit.insight.plan.memory import memory
from helpers import write_tiny


@pytest.fixture
def model(tmp_path: Path) -> str:
    write_tiny(
        tmp_path / "base", LlamaConfig, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, vocab_size=300,
    )  # fmt: skip
    return str(tmp_path / "base")


def run_of(model: str, **more: Any) -> dict[str, Any]:
    return of("grpo", model, **{"rollout": {"backend": "vllm"}} | more)


def test_servers_have_weights_and_keys_and_values_counted_by_hand(model: str) -> None:
    found = plan(run_of(model), limit=2 * 10**6, gpu=True, remedies=False, servers=2, server_gpus=2).servers
    assert found is not None
    embedding, attention, mlp = 300 * 64, 64 * 64 * 2 + 64 * 16 * 2, 3 * 64 * 128  # q and o of 8 heads; k and v of 2
    numbers = 2 * embedding + 3 * (attention + mlp + 2 * 64) + 64  # two norms a layer, and the last one
    assert found.weights == 2 * numbers // 2  # in 16 bits, over two GPUs
    assert found.per_token == 2 * 3 * 2 * 1 * 8  # bytes, layers, keys and values, one head of 8 on each GPU
    assert found.fit == int((0.92 * 2e6 - found.weights) // (found.per_token * found.length))
    assert found.fit > 0
    four = plan(run_of(model), gpu=True, remedies=False, servers=1, server_gpus=4).servers
    assert four is not None
    assert four.per_token == found.per_token  # a head cannot be cut, so that two GPUs hold the same one
    assert four.fit is None


def test_a_rank_holds_no_keys_and_values_and_no_whole_policy(model: str) -> None:
    def sampling(**more: Any) -> dict[str, int]:
        given = run_of(model, fsdp=True, precision="fp32", **more)
        return plan(given, gpu=True, processes=4, remedies=False).memory.phases["sampling"]

    by_servers, here = sampling(), sampling(rollout={"backend": "generate"})
    assert "rollouts" not in by_servers
    assert by_servers["weights"] == here["weights"]
    every = 4 * here["weights"]
    assert here["gathered"] == pytest.approx(every, rel=1e-3)
    # two embeddings and the last norm stay gathered, and three blocks come and go: here these are all of them
    assert by_servers["gathered"] <= here["gathered"]
    halves = sampling(fsdp_replicas=2)
    assert halves["weights"] == pytest.approx(2 * here["weights"], rel=1e-3)


def test_a_sharded_reference_is_not_quantised(model: str) -> None:
    """However little memory there is: `reference: int8` is refused with fsdp."""
    scarce = {"limit": 10**4, "gpu": True, "processes": 4, "remedies": False}
    assert plan(run_of(model, fsdp=True), **scarce).reference == "full"
    assert plan(run_of(model), **scarce).reference == "int8"


def test_the_command_tells_how_many_sequences_fit(model: str, tmp_path: Path) -> None:
    rows, config = tmp_path / "rows.jsonl", tmp_path / "run.yaml"
    rows.write_text('{"prompt": "2 red:"}\n' * 8)
    config.write_text(
        f"method: grpo\nmodel: {model}\ndata: {rows}\nbatch_size: 4\nreward: {{use: length, max: 5}}\n"
        "rollout: {backend: vllm}\n"
    )
    asked = ["plan", str(config), "--gpu", "--memory", "2GB", "--servers", "2", "--server-gpus", "2"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "2 vLLM servers of 2 GPUs: on each GPU" in done.output
    assert "sequences of" in done.output


def test_what_cannot_be_is_named(model: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.backend is generate; add --set rollout\.backend=vllm"):
        plan(of("grpo", model), gpu=True, servers=1)
    with pytest.raises(ConfigError, match="the model's 8 attention heads cannot be split; give a divisor"):
        plan(run_of(model), gpu=True, servers=1, server_gpus=3)


def test_no_remedy_is_tried_that_a_run_refuses(model: str) -> None:
    """`reference: int8` is refused with fsdp, and fsdp with `rollout.ahead`."""

    def tried(**more: Any) -> set[str]:
        work = work_of("grpo", model, **{"beta": 0.1, "reference": "full", "rollout": {"backend": "vllm"}} | more)
        found = memory(work := replace(work, processes=4))
        everything = {name: dict.fromkeys(parts | {"reference": 1}, 10**9) for name, parts in found.phases.items()}
        return {name for change in remedies._changes(work, replace(found, phases=everything)) for name in change}

    assert {"fsdp", "reference"} <= tried()
    assert "reference" not in tried(fsdp=True)
    assert "fsdp" not in tried(rollout={"backend": "vllm", "ahead": 1})
