"""A run of two sharded processes of which one is killed ends as a run that nothing interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults import PLACES, job_of, killed, resumed
from on_ranks import run_on

from helpers import make_rows, write_tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_tiny(folder / "base")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows("pairs", 20)))
    run_on(2, [job_of(folder / "base", folder / "pairs.jsonl", folder / "whole")], folder / "start")
    return folder


@pytest.mark.parametrize("where", PLACES)
def test_a_killed_rank_costs_nothing_but_time(where: str, place: Path) -> None:
    run = place / where
    job = job_of(place / "base", place / "pairs.jsonl", run)
    said = killed(job, run, where, seed=0)
    assert "SIGKILL" in said
    assert not (run / "model").exists()
    assert resumed(job, run, place / "whole")
