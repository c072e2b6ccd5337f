"""A run of which a rank, or the server that samples, is killed ends as a run that nothing interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import PLACES, job_of, killed, resumed
from on_ranks import run_on
from server_faults import World

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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("served"), None)
    run_on(1, [world.job("whole")], world.folder / "whole-first")
    yield world
    world.close()


@pytest.mark.parametrize("place", ["sync", "network"])
def test_a_killed_server_or_a_network_that_refuses_costs_nothing_but_time(place: str, world: World) -> None:
    world.disturbed(place, place, seed=0, seconds=3)
    assert world.difference(place) == (0.0, 0.0)
