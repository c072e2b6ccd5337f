"""Two processes under torchrun train what one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from on_ranks import Job, run_on

import alignkit
from alignkit.errors import ConfigError
from alignkit.runs.folder import read_metrics
from helpers import make_rows, write_tiny

pytestmark = pytest.mark.slow


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "alignkit", *arguments], capture_output=True, text=True, env=env, timeout=240
    )


def flags_of(settings: dict[str, Any], data: str, **changes: Any) -> list[str]:
    given = {"output": settings["output"], "cache_file": settings["cache_file"], "model": settings["model"]}
    given |= {"data": data, "device": "cpu", "timeout_minutes": 0.5, "name": "two", **changes}
    return [part for key, value in given.items() for part in ("--set", f"{key}={value}")]


def test_a_step_that_is_not_finite_is_skipped_by_ranks_with_unequal_rows(
    settings: dict[str, Any], write_rows: Any
) -> None:
    data = write_rows(make_rows("text", 5))
    broken = {"batch_size": 5, "max_steps": 6, "learning_rate": 1e38, "warmup_fraction": 0, "max_skipped_steps": 2}
    done = torchrun(["run", "sft", *flags_of(settings, data, **broken)])
    assert "3 updates were not finite (max_skipped_steps 2)" in done.stderr, done.stderr[-3000:]
    rows = done.stderr.split("rows ")[-1].split(". Look")[0]
    assert sorted(rows.split(", ")) == ["1", "2", "3", "4", "5"]  # the rows of both ranks


def test_every_rank_has_a_part_of_what_is_held_out(settings: dict[str, Any], write_rows: Any) -> None:
    data, one = write_rows(make_rows("text", 7)), write_rows(make_rows("text", 1, seed=1), "one.jsonl")
    done = torchrun(["run", "sft", *flags_of(settings, data, batch_size=4, eval_data=one, name="other")])
    assert "1 held-out rows are too few: 'sft' on 2 ranks needs at least 2" in done.stderr, done.stderr[-3000:]


def test_sharding_over_one_process_is_an_error_not_a_silent_plain_run(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="fsdp needs several processes, but there is one; start it with `torchrun"):
        alignkit.run("sft", data=make_rows("pairs", 8), fsdp=True, **settings)


def test_two_processes_read_the_rows_of_one(settings: dict[str, Any], write_rows: Any) -> None:
    big, small = (write_rows(make_rows("pairs", n, seed=n), f"{n}.jsonl") for n in (9, 3))
    seven = write_rows(make_rows("text", 7))  # in steps of 4: the last would leave one rank a single row
    common = settings | {"batch_size": 5, "max_steps": 4, "learning_rate": 1e-4, "timeout_minutes": 0.5}
    mixture = [{"path": big, "weight": 1}, {"path": small, "weight": 2}]
    jobs: dict[str, Job] = {
        "mixed": ("dpo", common | {"data": mixture}),
        "streamed": ("dpo", common | {"data": big, "streaming": True, "shuffle_buffer": 4}),
        "minibatches": ("sft", common | {"data": seven, "batch_size": 4, "minibatches": 2}),
    }
    both = [(method, given | {"name": f"two-{name}"}) for name, (method, given) in jobs.items()]
    said = run_on(2, both, settings["output"] / "jobs")
    assert said.count("left: []") == 2
    for name, (method, given) in jobs.items():
        one = alignkit.run(method, **given | {"name": f"one-{name}"})
        a, b = read_metrics(one.folder), read_metrics(settings["output"] / f"two-{name}")
        assert len(a) == len(b) == 4
        for x, y in zip(a, b, strict=True):
            assert x["loss"] == pytest.approx(y["loss"], abs=1e-5)
            assert {k: v for k, v in x.items() if "rows" in k} == {k: v for k, v in y.items() if "rows" in k}
            assert ("rows_read" in x) == (name == "streamed")
            assert ("rows/3" in x) == (name == "mixed")


def test_the_routers_loss_is_that_of_all_ranks(settings: dict[str, Any], write_rows: Any) -> None:
    from transformers import MixtralConfig

    model = settings["output"].parent / "mixtral"
    write_tiny(
        model, MixtralConfig, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    settings |= {"model": str(model), "max_steps": 4, "learning_rate": 1e-3, "batch_size": 4, "eval_fraction": 0.2}
    settings["data"] = write_rows(make_rows("pairs", 13))
    jobs: list[Job] = []
    for max_tokens in (60, 8192):  # several passes of a rank, and one
        alignkit.run("dpo", **settings | {"max_tokens": max_tokens, "name": f"one-{max_tokens}"})
        for fsdp in (False, True):
            own = {"fsdp": fsdp, "max_tokens": max_tokens, "name": f"two-{max_tokens}-{fsdp}"}
            jobs.append(("dpo", settings | own | {"cache_file": f"{settings['cache_file']}-{own['name']}"}))
    run_on(2, jobs, settings["output"] / "jobs")
    for _, job in jobs:
        one = read_metrics(settings["output"] / f"one-{job['max_tokens']}")
        for a, b in zip(one, read_metrics(settings["output"] / job["name"]), strict=True):
            for name in a:
                if "router/" in name or name.endswith("loss") or name == "grad_norm":
                    assert b[name] == pytest.approx(a[name], rel=2e-4, abs=1e-6), (job["name"], a["step"], name)
