"""One process, two, two with sharded models and four with replicas of shards train the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import REDDER, REDS, Job, run_on
from safetensors.torch import load_file

from alignkit.runs.folder import read_metrics
from helpers import make_rows, write_tiny

pytestmark = pytest.mark.slow

SAMPLING = {"max_new_tokens": 8, "batch_size": 8}
# what every method is run with: steps of 5 rows, so that ranks have unequal shares, in parts of 60 tokens
COMMON = {
    "batch_size": 5, "max_steps": 4, "learning_rate": 1e-4, "max_tokens": 60, "eval_fraction": 0.25, "device": "cpu",
    "timeout_minutes": 1,
}  # fmt: skip
# n-grams are counted on each rank, and time is not repeated
PER_RANK = ("tokens_per_second", "seconds/", "completion/distinct", "eval/completion/distinct")
# AdamW turns the rounding of gradients next to 0 into whole steps, unless its epsilon is above it
JOBS: dict[str, Job] = {
    "dpo": ("dpo", {}),
    "dpo, full": ("dpo", {"reference": "full", "reference_cache": False}),
    "dpo, lora": ("dpo", {"lora": 4}),
    "kto": ("kto", {}),
    "kto, lora": ("kto", {"lora": 4}),
    "reward": ("reward", {}),
    "grpo": ("grpo", {"reward": REDS, "group_size": 3, "epochs_per_batch": 2, "beta": 0.05, "sampling": SAMPLING}),
    "ppo": ("ppo", {"reward": REDS, "epochs_per_batch": 2, "minibatches": 2, "sampling": SAMPLING}),
    "ppo, shared": (
        "ppo",
        {"adam_epsilon": 1e-6, "reward": REDS, "critic": "shared", "critic_warmup_steps": 1, "sampling": SAMPLING},
    ),
    "nash": ("nash", {"judge": REDDER, "sampling": SAMPLING}),
    "nash, lora": ("nash", {"judge": REDDER, "lora": 4, "sampling": SAMPLING}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and rows of each kind."""
    folder = tmp_path_factory.mktemp("sharded")
    write_tiny(folder / "base")
    for kind in ("pairs", "unpaired", "text"):
        rows = make_rows(kind, 20)
        rows = [{"prompt": r["prompt"]} for r in rows] if kind == "text" else rows
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def jobs_of(place: Path, name: str, **more: Any) -> list[Job]:
    """Every job, in runs called `name`, with the cache of its own."""
    kinds = {"kto": "unpaired", "grpo": "text", "ppo": "text", "nash": "text"}
    made = []
    for title, (method, own) in JOBS.items():
        data = place / f"{kinds.get(method, 'pairs')}.jsonl"
        given = {"model": place / "base", "data": data, "output": place / name, "name": title.replace(", ", "-")}
        made.append((method, COMMON | given | own | more | {"cache_file": place / name / f"{title}.sqlite"}))
    return json.loads(json.dumps(made, default=str))


@pytest.fixture(scope="module")
def runs(place: Path) -> Path:
    """The folder of the runs: one, two, fsdp, hsdp."""
    run_on(1, jobs_of(place, "one"), place / "one")
    run_on(2, jobs_of(place, "two"), place / "two")
    said = run_on(2, jobs_of(place, "fsdp", fsdp=True), place / "fsdp")
    assert said.count("each rank gathers the whole policy") >= 5
    run_on(4, jobs_of(place, "hsdp", fsdp=True, fsdp_replicas=2), place / "hsdp")
    return place


@pytest.mark.parametrize("name", ["two", "fsdp", "hsdp"])
@pytest.mark.parametrize("title", JOBS)
def test_ranks_train_what_one_process_trains(title: str, name: str, runs: Path) -> None:
    one, other = (runs / kind / title.replace(", ", "-") for kind in ("one", name))
    a, b = read_metrics(one), read_metrics(other)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in {k for k in x if not k.startswith(PER_RANK)}:
            assert y[key] == pytest.approx(x[key], abs=1e-5, rel=1e-5), (x["step"], key)
    file = "adapter_model.safetensors" if "lora" in title else "model.safetensors"
    ours, theirs = load_file(one / "model" / file), load_file(other / "model" / file)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], rtol=0, atol=1e-5)


def test_the_runs_learn(runs: Path) -> None:
    for title in JOBS:
        assert any(
            abs(line["grad_norm"]) > 1e-4
            for line in read_metrics(runs / "one" / title.replace(", ", "-"))
            if "grad_norm" in line
        )
