"""Runs and caches of an earlier build (tests/before): they resume, and the cache answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import alignkit

BEFORE = Path(__file__).with_name("before")


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the runs were started in, as the killed processes left it."""
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    (tmp_path / "killed").rename(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resumed(run: str) -> list[dict[str, Any]]:
    from alignkit.config import read_yaml

    settings = read_yaml(Path("runs") / run / "config.yaml")
    folder = alignkit.run(**{**settings, "resume": True}).folder
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("run", ["dpo", "moving", "kto", "ppo", "grpo"])
def test_a_killed_run_of_an_earlier_build_continues_as_it_would_have(killed: Path, run: str) -> None:
    # the numbers were computed on another processor, whose rounding differs; a state that is lost differs by far more
    expected = json.loads((killed / "expected.json").read_text())[run]
    found = [line for line in resumed(run) if line["step"] > 2]
    assert [line["step"] for line in found] == [3, 4, 4]
    for line, wanted in zip(found, expected, strict=True):
        assert {k: line[k] for k in wanted} == pytest.approx(wanted, rel=1e-2, abs=1e-3)


def test_a_cache_of_an_earlier_build_knows_every_value(killed: Path) -> None:
    resumed("dpo")
    session = json.loads(Path("runs/dpo/sessions.json").read_text())[-1]
    assert session["from_step"] == 2
    assert session["facts"]["reference"]["values_read"] > 0
    assert session["facts"]["reference"]["values_computed"] == 0
