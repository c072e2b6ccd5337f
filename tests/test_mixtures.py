"""Mixtures of sources with weights, and rows in the order of a column: which rows a step reads, alone and in a run."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import alignkit
from alignkit.data import FaultyRowsError
from alignkit.data.stream import Stream, quotas, seeded
from alignkit.engine.phases import Run
from alignkit.errors import ConfigError, DataError
from alignkit.types import Completion, Example
from helpers import make_rows

ANSWER = (Completion(torch.tensor([1], dtype=torch.int32)),)


def made(sources: str, orders: list[float] | None = None) -> list[Example]:
    """Examples numbered by row: a letter is the source of one."""
    prompt = torch.tensor([7], dtype=torch.int32)
    return [
        Example(prompt, ANSWER, row=i, source=name, order=orders[i] if orders else None)
        for i, name in enumerate(sources)
    ]


def read(stream: Stream, steps: range) -> list[Example]:
    return [e for step in steps for e in stream[step]]


# ---- weights --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.floats(0.2, 5.0)), min_size=1, max_size=4),
    st.integers(1, 7),
    st.integers(0, 99),
)
def test_an_epoch_holds_the_quota_of_each_source_and_every_row_equally_often(
    sources: list[tuple[int, float]], batch_size: int, seed: int
) -> None:
    names = "abcd"[: len(sources)]
    examples = made("".join(name * n for name, (n, _) in zip(names, sources, strict=True)))
    weights = {name: weight for name, (_, weight) in zip(names, sources, strict=True)}
    total = sum(weights.values())
    if any(len(examples) * w / total < 1 for w in weights.values()):
        return  # a quota of 0 is refused, see below
    stream = Stream(examples, batch_size, seed, weights=weights)
    assert sum(stream.quotas.values()) == len(examples)
    assert all(abs(stream.quotas[k] - len(examples) * w / total) < 1 for k, w in weights.items())
    seen: Counter[int] = Counter()
    for epoch in range(3):
        rows = read(stream, range(epoch * stream.steps_per_epoch, (epoch + 1) * stream.steps_per_epoch))
        assert Counter(e.source for e in rows) == stream.quotas
        seen.update(e.row for e in rows)
    for name in names:  # a row is not repeated before its source has been read to the end
        times = [seen[e.row] for e in examples if e.source == name]
        assert max(times) - min(times) <= 1
        assert sum(times) == 3 * stream.quotas[name]


def test_shares_by_hand() -> None:
    assert quotas({"a": 0.7, "b": 0.3}, 10, "ab") == {"a": 7, "b": 3}
    assert quotas({"a": 2, "b": 1}, 10, "ab") == {"a": 7, "b": 3}  # 6.67 and 3.33
    assert quotas({"a": 1, "b": 1, "c": 1}, 11, "abc") == {"a": 4, "b": 4, "c": 3}


def test_a_weight_is_the_probability_of_a_row_in_any_place_of_a_step() -> None:
    examples = made("a" * 20 + "b" * 80)
    places = torch.zeros(10)
    for seed in range(200):
        stream = Stream(examples, 10, seed, weights={"a": 3, "b": 1})
        places += torch.tensor([e.source == "a" for e in stream[0]])
    # 200 draws with p = 0.75 have a standard deviation of 0.031
    assert (places / 200 - 0.75).abs().max() < 4 * 0.031


def test_a_mixture_is_a_function_of_seed_and_step() -> None:
    examples, weights = made("aaabbbbbbb"), {"a": 0.6, "b": 0.4}
    forwards, backwards = (Stream(examples, 3, seed=5, weights=weights) for _ in range(2))
    forward = [[e.row for e in forwards[step]] for step in range(12)]
    torch.manual_seed(3)
    assert [[e.row for e in backwards[step]] for step in reversed(range(12))] == forward[::-1]
    other = Stream(examples, 3, seed=6, weights=weights)
    assert [[e.row for e in other[step]] for step in range(12)] != forward


def test_without_weights_sources_are_read_as_one() -> None:
    rows = [e.row for e in read(Stream(made("aabbb"), 5, seed=4), range(3))]
    expected = [i for epoch in range(3) for i in torch.randperm(5, generator=seeded(4, 0, epoch)).tolist()]
    assert rows == expected == [e.row for e in read(Stream(made(" " * 5), 5, seed=4), range(3))]


def test_how_often_a_source_is_read_is_said() -> None:
    assert Stream(made("aabbbbbbbb"), 2, 0, weights={"a": 0.7, "b": 0.3}).lines() == [
        "a: 2 rows, 70.0% of the rows of a step, read 3.5 times an epoch",
        "b: 8 rows, 30.0% of the rows of a step, read 0.38 times an epoch",
    ]
    assert Stream(made("abb"), 1, 0).lines() == ["a: 1 of 3 rows", "b: 2 of 3 rows"]
    assert Stream([Example(e.prompt, e.completions) for e in made("abb")], 1, 0).lines() == []


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (
            {"a": 1, "b": 99},
            "the source 'a' would have no row in an epoch of 4 rows, with the weight 1 of 100; raise",
        ),
        ({"a": 1, "c": 1}, "the source 'c' has no row to train on; lower eval_fraction"),
    ],
)
def test_a_source_that_would_never_be_read(weights: dict[str, float], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Stream(made("aabb"), 1, 0, weights=weights)


# ---- order ----------------------------------------------------------------------------------------------------------


def test_rows_come_in_their_order_and_ties_are_shuffled_anew() -> None:
    orders = [3.0, 1.0, 2.0, 1.0, -5.0, 1.0, 2.0, 1.0, 1.0, 1.0]
    stream = Stream(made("a" * 10, orders), 5, seed=1)
    epochs = [[e.row for e in read(stream, range(2 * k, 2 * k + 2))] for k in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
        assert [orders[i] for i in epoch] == sorted(orders)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [e.row for e in Stream(made("a" * 10, orders), 5, seed=1)[3]] == epochs[1][5:]


def test_each_source_of_a_mixture_has_its_order() -> None:
    orders = [float(-i) for i in range(12)]
    stream = Stream(made("a" * 4 + "b" * 8, orders), 4, seed=2, weights={"a": 1, "b": 1})
    rows = [e.row for e in read(stream, range(3))]
    assert [row for row in rows if row < 4] == [3, 2, 1, 0, 3, 2]
    assert [row for row in rows if row >= 4] == [11, 10, 9, 8, 7, 6]


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(write_rows: Callable[..., str]) -> list[dict[str, Any]]:
    """Two files of different forms, pairs and rankings, with weights."""
    pairs = make_rows("pairs", 16)
    ranked = [
        {"question": r["prompt"], "completions": [r["rejected"], r["chosen"]], "scores": [0, 1]} for r in pairs[12:]
    ]
    return [
        {"path": write_rows(pairs[:12], "pairs.jsonl"), "weight": 1},
        {"path": write_rows(ranked, "ranked.jsonl"), "weight": 3, "columns": {"prompt": "question"}},
    ]


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def test_a_run_on_a_mixture_counts_its_sources_and_resumes(
    settings: dict[str, Any], mixture: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "alignkit")
    given = settings | {"data": mixture, "max_steps": 8, "save_every": 2, "keep_checkpoints": 9}
    whole = metrics(alignkit.run("dpo", **given, name="whole").folder)
    assert "ranked: 4 rows, 75.0% of the rows of a step, read 3 times an epoch" in caplog.messages
    counts = [(line["rows/pairs"], line["rows/ranked"]) for line in whole[:4]]
    assert sum(a for a, _ in counts) == 4  # an epoch is four steps of four rows
    assert sum(b for _, b in counts) == 12
    folder = settings["output"] / "whole"
    written = json.loads(json.dumps(alignkit.config.read_yaml(folder / "config.yaml")))
    assert written["data"] == [{**one, "weight": float(one["weight"])} for one in mixture]
    for step in (6, 8):
        for path in folder.glob(f"checkpoints/*{step}"):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    assert metrics(alignkit.run(**{**written, "resume": True, "name": "whole"}).folder)[-4:] == whole[-4:]
    changed = [{**mixture[0], "weight": 2.0}, mixture[1]]
    with pytest.raises(ConfigError, match="was started with other settings: data was"):
        alignkit.run("dpo", **{**given, "data": changed, "resume": True, "name": "whole"})


def test_other_places_of_the_same_rows_are_other_data(settings: dict[str, Any]) -> None:
    def digest(factor: int, order_by: str | None) -> str:
        rows = [{**row, "level": factor * i} for i, row in enumerate(make_rows("pairs", 8))]
        run = Run("dpo", **settings | {"data": rows, "order_by": order_by})
        return run.read().digest

    assert digest(1, None) == digest(2, None)
    assert len({digest(1, None), digest(1, "level"), digest(2, "level"), digest(1, "-level")}) == 4


def test_a_run_reads_a_curriculum(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from alignkit.engine.step import StepContext

    seen: list[int] = []
    collect = StepContext.collect
    monkeypatch.setattr(
        StepContext, "collect", lambda ctx: (seen.extend(e.row for e in ctx.step_examples), collect(ctx))[1]
    )
    rows = [{**row, "level": (5 * i) % 12} for i, row in enumerate(make_rows("pairs", 12))]
    alignkit.run("dpo", **settings | {"data": rows, "order_by": "-level", "max_steps": 3})
    assert [rows[row - 1]["level"] for row in seen] == list(range(11, -1, -1))


@pytest.mark.parametrize(
    ("order_by", "error", "said"),
    [
        (
            "levle",
            DataError,
            r"no column 'levle', which `order_by` names\. Did you mean 'level'\? Columns that ",
        ),
        ("-chosen", DataError, "no column 'chosen'"),
        ("half", FaultyRowsError, r"row 2, column 'half': found None; give a finite number"),
    ],
)
def test_an_order_that_cannot_be_used(
    order_by: str, error: type[DataError], said: str, settings: dict[str, Any]
) -> None:
    rows = [{**row, "level": i, **({"half": 1} if i != 1 else {})} for i, row in enumerate(make_rows("pairs", 8))]
    with pytest.raises(error, match=said):
        alignkit.run("dpo", **settings | {"data": rows, "order_by": order_by})


def test_held_out_sources_have_no_weight(settings: dict[str, Any], mixture: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="held-out rows are scored once each, so their sources have no weight"):
        alignkit.run("dpo", **settings | {"data": mixture, "eval_data": mixture})
