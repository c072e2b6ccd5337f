"""Two processes under torchrun train what one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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


@pytest.mark.parametrize(
    ("method", "lora", "fsdp", "dtype"),
    [
        ("sft", None, False, "float32"),
        ("dpo", 4, False, "float32"),
        ("kto", None, False, "float32"),
        ("dpo", None, True, "float32"),
        ("dpo", 4, True, "bfloat16"),  # of the frozen weights; adapters are of 32 bits
    ],
)
def test_two_processes_give_the_losses_and_weights_of_one(
    method: str, lora: int | None, fsdp: bool, dtype: str, settings: dict[str, Any], write_rows: Any
) -> None:
    # 13 rows in steps of 4: the last step of an epoch is cut unevenly
    data = write_rows(make_rows("pairs", 13))
    settings |= {
        "max_steps": 6,
        "learning_rate": 1e-4,
        "max_tokens": 60,
        "eval_fraction": 0.2,
        "lora": lora,
        "dtype": dtype,
    }
    one = alignkit.run(method, data=data, **settings)

    flags = ["--output", str(settings["output"]), "--name", "two", "--batch-size", "4", "--max-steps", "6"]
    flags += [
        "--learning-rate",
        "1e-4",
        "--set",
        "max_tokens=60",
        "--eval-fraction",
        "0.2",
        "--model",
        settings["model"],
    ]
    flags += ["--set", f"cache_file={settings['cache_file']}-two", "--set", "device=cpu", "--data", data]
    done = torchrun(
        [
            "run",
            method,
            *flags,
            *(["--lora", str(lora)] if lora else []),
            "--set",
            f"fsdp={fsdp}",
            "--set",
            f"dtype={dtype}",
        ]
    )
    assert done.returncode == 0, done.stderr[-3000:]

    folder = Path(settings["output"]) / "two"
    a, b = read_metrics(one.folder), read_metrics(folder)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for x, y in zip(a, b, strict=True):
        for name in set(x) - {"tokens_per_second"}:
            assert x[name] == pytest.approx(y[name], abs=1e-5, rel=1e-5), name
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    ours, theirs = load_file(one.folder / "model" / file), load_file(folder / "model" / file)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


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


def test_every_rank_has_every_minibatch_and_a_part_of_what_is_held_out(
    settings: dict[str, Any], write_rows: Any
) -> None:
    data = write_rows(make_rows("text", 7))  # in steps of 4: the last would leave one rank a single row
    done = torchrun(["run", "sft", *flags_of(settings, data, batch_size=4, max_steps=4, minibatches=2)])
    assert done.returncode == 0, done.stderr[-3000:]
    one = write_rows(make_rows("text", 1, seed=1), "one.jsonl")
    done = torchrun(["run", "sft", *flags_of(settings, data, batch_size=4, eval_data=one, name="other")])
    assert "1 held-out rows are too few: 'sft' on 2 ranks needs at least 2" in done.stderr, done.stderr[-3000:]


def test_sharding_over_one_process_is_an_error_not_a_silent_plain_run(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="fsdp needs several processes, but there is one; start it with `torchrun"):
        alignkit.run("sft", data=make_rows("pairs", 8), fsdp=True, **settings)


@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_read_the_rows_of_one(streaming: bool, settings: dict[str, Any], write_rows: Any) -> None:
    big, small = (write_rows(make_rows("pairs", n, seed=n), f"{n}.jsonl") for n in (9, 3))
    data = big if streaming else f"[{{path: {big}, weight: 1}}, {{path: {small}, weight: 2}}]"
    changes = {"batch_size": 5, "max_steps": 4, "learning_rate": 1e-4}
    if streaming:
        changes |= {"streaming": True, "shuffle_buffer": 4}
    named = big if streaming else [{"path": big, "weight": 1}, {"path": small, "weight": 2}]
    one = alignkit.run("dpo", **{**settings, **changes, "data": named, "timeout_minutes": 0.5})
    done = torchrun(["run", "dpo", *flags_of(settings, data, **changes)])
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = read_metrics(one.folder), read_metrics(settings["output"] / "two")
    assert len(a) == len(b) == 4
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-5)
        assert {k: v for k, v in x.items() if "rows" in k} == {k: v for k, v in y.items() if "rows" in k}
        assert ("rows_read" in x) == streaming
        assert ("rows/3" in x) != streaming


@pytest.mark.parametrize("fsdp", [False, True])
def test_the_routers_loss_is_that_of_all_ranks(fsdp: bool, settings: dict[str, Any], write_rows: Any) -> None:
    from transformers import MixtralConfig

    model = settings["output"].parent / "mixtral"
    write_tiny(
        model, MixtralConfig, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    data = write_rows(make_rows("pairs", 13))
    settings |= {"model": str(model), "max_steps": 4, "learning_rate": 1e-3, "batch_size": 4, "eval_fraction": 0.2}
    for max_tokens in (60, 8192):  # several passes of a rank, and one
        one = alignkit.run("dpo", data=data, max_tokens=max_tokens, **settings)
        flags = {
            "output": settings["output"], "name": f"two-{max_tokens}", "batch_size": 4, "max_steps": 4, "fsdp": fsdp,
            "learning_rate": 1e-3, "eval_fraction": 0.2, "model": model, "data": data, "max_tokens": max_tokens,
            "cache_file": f"{settings['cache_file']}-{max_tokens}", "device": "cpu",
        }  # fmt: skip
        done = torchrun(["run", "dpo", *(part for k, v in flags.items() for part in ("--set", f"{k}={v}"))])
        assert done.returncode == 0, done.stderr[-3000:]
        for a, b in zip(read_metrics(one.folder), read_metrics(settings["output"] / f"two-{max_tokens}"), strict=True):
            for name in a:
                if "router/" in name or name.endswith("loss") or name == "grad_norm":
                    assert b[name] == pytest.approx(a[name], rel=2e-4, abs=1e-6), (a["step"], name)
