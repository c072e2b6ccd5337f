"""One process, two, two with sharded models and four with replicas of shards train the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import write_classifier
from on_ranks import ODD, REDDER, REDS, ROUNDS, Job, run_on
from safetensors.torch import load_file

from alignkit.pairwise import PAIRWISE
from alignkit.runs.folder import read_metrics
from helpers import make_rows, write_chatml, write_tiny

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
    "dpo, moving": ("dpo", {"reference": "full", "sync_every": 2, "sync_alpha": 0.6}),
    "dpo, lora": ("dpo", {"lora": 4}),
    "dpo, lora, bf16": ("dpo", {"lora": 4, "dtype": "bfloat16"}),
    "dpo, compiled": ("dpo", {"torch_compile": True}),
    "kto": ("kto", {}),
    "kto, lora": ("kto", {"lora": 4}),
    "bco": ("bco", {}),
    "reward": ("reward", {}),
    "grpo": ("grpo", {"reward": REDS, "group_size": 3, "epochs_per_batch": 2, "beta": 0.05, "sampling": SAMPLING}),
    "rloo, reward model": (
        "rloo",
        {"reward": [REDS, {"use": "@scorer", "max_tokens": 60}], "group_size": 2, "sampling": SAMPLING},
    ),
    "rloo, environment": (
        "rloo",
        {
            "environment": {"use": ROUNDS, "max_tokens": 80},
            "group_size": 2,
            "model": "@chatty",
            "data": "@asked.jsonl",
            "sampling": SAMPLING | {"stop": ["e", "o"]},
        },
    ),
    "online_dpo": ("online_dpo", {"reward": REDS, "group_size": 3, "sync_every": 2, "sampling": SAMPLING}),
    "ppo": ("ppo", {"reward": REDS, "epochs_per_batch": 2, "minibatches": 2, "sampling": SAMPLING}),
    "ppo, shared": (
        "ppo",
        {"adam_epsilon": 1e-6, "reward": REDS, "critic": "shared", "critic_warmup_steps": 1, "sampling": SAMPLING},
    ),
    "nash": ("nash", {"judge": REDDER, "sampling": SAMPLING}),
    "nash, lora, judge model": ("nash", {"judge": "@judge", "lora": 4, "sampling": SAMPLING}),
}

RESUMED = ("dpo, moving", "dpo, lora", "ppo")
OF_REPLICAS = (*RESUMED, "kto", "nash, lora, judge model")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and rows of each kind."""
    folder = tmp_path_factory.mktemp("sharded")
    write_tiny(folder / "base")
    write_classifier(folder / "scorer")
    write_classifier(folder / "judge", seed=1, **{PAIRWISE: True})
    write_chatml(folder / "chatty")
    asked = [{"prompt": [{"role": "user", "content": f"{i} yes or no?"}]} for i in range(20)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in asked))
    for kind in ("pairs", "unpaired", "text"):
        rows = make_rows(kind, 20)
        rows = [{"prompt": r["prompt"]} for r in rows] if kind == "text" else rows
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def jobs_of(place: Path, name: str, *titles: str, **more: Any) -> list[Job]:
    """The jobs, of these titles or all, in the folder `name`, with a cache of its own."""
    kinds = {"kto": "unpaired", "bco": "unpaired"} | dict.fromkeys(
        ("grpo", "rloo", "online_dpo", "ppo", "nash"), "text"
    )
    made = []
    for title in titles or JOBS:
        method, own = JOBS[title]
        data = place / f"{kinds.get(method, 'pairs')}.jsonl"
        given = {"model": place / "base", "data": data, "output": place / name, "name": folder_of(title)}
        given |= {"cache_file": place / name / f"{title}.sqlite", "save_every": 2}
        made.append((method, COMMON | given | own | more))
    return json.loads(json.dumps(made, default=str).replace("@", f"{place}/"))


def completions(folder: Path) -> list[Any]:
    """What all ranks of a run sampled, sorted."""
    said = [json.loads(line) for file in folder.glob("completions*.jsonl") for line in file.read_text().splitlines()]
    return sorted([s["step"], s["training"], s["row"], s["completion"]] for s in said)


def folder_of(title: str) -> str:
    return title.replace(", ", "-").replace(" ", "-")


def same(one: Path, other: Path) -> None:
    """Compare metrics and weights of two runs."""
    a, b = read_metrics(one), read_metrics(other)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in {k for k in x if not k.startswith(PER_RANK)}:
            assert y[key] == pytest.approx(x[key], abs=1e-5, rel=1e-5), (x["step"], key)
    assert completions(one) == completions(other)
    file = next((one / "model").glob("*model.safetensors")).name
    ours, theirs = load_file(one / "model" / file), load_file(other / "model" / file)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def runs(place: Path) -> Path:
    """The folder of the runs: one, two, fsdp, hsdp."""
    run_on(1, jobs_of(place, "one"), place / "one")
    run_on(2, jobs_of(place, "two"), place / "two")
    said = run_on(2, jobs_of(place, "fsdp", fsdp=True), place / "fsdp")
    assert said.count("each rank gathers the whole policy") == sum("sampling" in own for _, own in JOBS.values())
    assert said.count("each rank reads its own parts of the weights") >= len(JOBS)
    run_on(4, jobs_of(place, "hsdp", *OF_REPLICAS, fsdp=True, fsdp_replicas=2), place / "hsdp")
    return place


@pytest.mark.parametrize(
    ("title", "name"),
    [(title, name) for name in ("two", "fsdp") for title in JOBS] + [(title, "hsdp") for title in OF_REPLICAS],
)
def test_ranks_train_what_one_process_trains(title: str, name: str, runs: Path) -> None:
    same(runs / "one" / folder_of(title), runs / name / folder_of(title))


def test_the_runs_learn(runs: Path) -> None:
    for title in JOBS:
        lines = read_metrics(runs / "one" / folder_of(title))
        assert any(line.get("grad_norm", 0.0) > 1e-4 for line in lines)


@pytest.mark.parametrize(("title", "call"), [("rloo, reward model", 3), ("nash, lora, judge model", 7)])
def test_a_reward_that_fails_on_one_rank_ends_all_of_them_where_they_share_a_model(
    title: str, call: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others do not wait for it inside of the model: the time-out is a minute. A judge calls it twice a step."""
    monkeypatch.setenv("ODD_CALL", str(call))
    rewards = [ODD, {"use": "@scorer"}]
    own = {"reward": rewards} if title.startswith("rloo") else {"judge": {"bradley_terry": rewards}}
    (job,) = jobs_of(place, "odd", title, **own, max_steps=3, fsdp=True)
    with pytest.raises(AssertionError):
        run_on(2, [job], place / "odd", timeout=50)
    assert "rank 1: reward 'odd' failed" in (place / "odd" / "said").read_text()  # as the other one says it
    saved = sorted(path.name for path in (place / "odd" / job[1]["name"] / "checkpoints").iterdir())
    assert saved[-1] == ("step-00000001" if title.startswith("rloo") else "step-00000002")


def damaged(checkpoint: Path, ranks: int) -> str:
    """Change a byte of a shard whose sum the main rank does not compute; return what it then says."""
    names = list(json.loads((checkpoint / "manifest.json").read_text())["files"])
    at, name = next((i, n) for i, n in enumerate(names) if n.startswith("shard-") and i % ranks)
    raw = bytearray((checkpoint / name).read_bytes())
    raw[-1] ^= 1
    (checkpoint / name).write_bytes(raw)
    return f"step-00000004 is damaged (rank {at % ranks}: {name} has changed since it was written"


@pytest.mark.parametrize(("before", "after"), [("fsdp", 4), ("hsdp", 2), ("fsdp", 1), ("one", 2)], ids=lambda x: str(x))
def test_any_number_of_ranks_resumes_what_another_wrote(before: str, after: int, runs: Path) -> None:
    name, finder = f"{before}-on-{after}", ""
    for title in RESUMED:
        folder = runs / name / folder_of(title)
        shutil.copytree(runs / before / folder_of(title), folder)
        if (before, after) == ("fsdp", 4):
            finder = damaged(folder / "checkpoints" / "step-00000004", after)
        else:
            shutil.rmtree(folder / "checkpoints" / "step-00000004")
        shutil.rmtree(folder / "model")
        assert bool([*folder.glob("checkpoints/step-00000002/shard-*")]) == (before != "one")
    more = {"resume": True, "fsdp": after > 1, "fsdp_replicas": max(after // 2, 1)}
    said = run_on(after, jobs_of(runs, name, *RESUMED, **more), runs / name)
    assert said.count("resumed from") == len(RESUMED)
    assert said.count(finder) >= len(RESUMED)
    for title in RESUMED:
        same(runs / "one" / folder_of(title), runs / name / folder_of(title))
