"""Rows that are read while the run goes on: which rows a step reads, what is in memory, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import alignkit
from alignkit.data import Dataset, FaultyRowsError, Report, load
from alignkit.data.sources import Lazy, open_rows, read_rows
from alignkit.data.streaming import PEEKED, Streamed
from alignkit.errors import ConfigError, DataError
from alignkit.runs.folder import read_metrics
from alignkit.types import Completion, Example
from helpers import make_rows, write_tiny

TOKEN = torch.tensor([1], dtype=torch.int32)


def encode(dataset: Dataset) -> tuple[list[Example], Report]:
    """Make an example of each row whose prompt does not begin with "long", and report the others."""
    report, kept = Report(len(dataset)), []
    for row in dataset:
        if str(row.prompt).startswith("long"):
            report.drop("too long", row.row)
        else:
            kept.append(Example(TOKEN, tuple(Completion(TOKEN) for _ in row.completions), row.numbers, row.row))
    return kept, report


def streamed(source: Any, kind: Any = "pairs", batch_size: int = 4, seed: int = 0, buffer: int = 5) -> Streamed:
    return Streamed(open_rows(source), kind, None, encode, batch_size, seed, buffer)


def rows(stream: Streamed, steps: int) -> list[int]:
    """Read `steps` more steps and return the numbers of their rows."""
    first = stream.state_dict()["step"]
    return [e.row for step in range(first, first + steps) for e in stream[step]]


@pytest.fixture
def path(write_rows: Callable[..., str]) -> str:
    """A file of 20 pairs, two of which are dropped: row 7 is a tie, row 13 too long."""
    pairs = make_rows("pairs", 20)
    pairs[6]["rejected"] = pairs[6]["chosen"]
    pairs[12]["prompt"] = "long " + pairs[12]["prompt"]
    return write_rows(pairs)


KEPT = [n for n in range(1, 21) if n not in (7, 13)]


def test_a_pass_reads_every_row_once_and_the_next_in_another_order(path: str) -> None:
    stream = streamed(path, batch_size=6, seed=3)
    first, second = rows(stream, 3), rows(stream, 3)  # 18 of 20 rows are kept
    assert sorted(first) == sorted(second) == KEPT
    assert first != second
    assert first != sorted(first)
    assert rows(streamed(path, batch_size=6, seed=3), 6) == first + second
    assert rows(streamed(path, batch_size=6, seed=4), 6) != first + second


def test_a_buffer_of_one_row_keeps_the_order_of_the_file(path: str) -> None:
    assert rows(streamed(path, batch_size=3, buffer=1), 12) == KEPT * 2


def test_a_row_waits_in_the_buffer_and_is_not_used_before_it_is_read(path: str) -> None:
    order = rows(streamed(path, batch_size=2, buffer=5), 9)
    places = {row: place for place, row in enumerate(order)}
    # when the k-th row is used, k + 5 rows have been read; two of them may have been dropped
    assert all(row <= place + 1 + 5 + 2 for row, place in places.items())


def test_only_the_buffer_and_a_block_are_read_ahead() -> None:
    taken = 0

    def items() -> Iterator[tuple[int, object]]:
        nonlocal taken
        for number in itertools.count(1):
            taken += 1
            yield number, {"text": "x"}

    stream = Streamed(Lazy("endless", items), "text", None, encode, 10, 0, 100)
    assert taken == PEEKED
    for step in range(50):
        assert len(stream[step]) == 10
    assert taken == PEEKED + 100 + 500


@pytest.mark.parametrize("kind", ["pairs", "unpaired"])
@pytest.mark.parametrize("done", [0, 1, 4, 7, 11])
def test_a_stream_continues_where_it_was_left(kind: str, done: int, path: str) -> None:
    whole, begun = streamed(path, kind, seed=1), streamed(path, kind, seed=1)
    expected = rows(whole, 14)
    rows(begun, done)
    state = json.loads(json.dumps(begun.state_dict()))
    resumed = streamed(path, kind, seed=1)
    rows(resumed, 2)  # the position before does not matter
    resumed.load_state_dict(state)
    assert rows(resumed, 14 - done) == expected[4 * done :]
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.metrics(13, ()) == whole.metrics(13, ())


def test_what_was_read_and_dropped_is_counted(path: str) -> None:
    stream = streamed(path, batch_size=4, buffer=1)
    rows(stream, 9)  # 36 examples: rows 1 to 20 twice, two dropped in each pass
    assert stream.metrics(8, ()) == {"epoch": 1, "rows_read": 40, "rows_dropped": 4}
    with pytest.raises(IndexError, match="step 3 was asked for, but the stream is at step 9"):
        stream[3]


def test_a_source_smaller_than_a_step_is_repeated(write_rows: Callable[..., str]) -> None:
    stream = streamed(write_rows(make_rows("pairs", 3)), batch_size=8)
    assert Counter(rows(stream, 3)) == {1: 8, 2: 8, 3: 8}


# ---- sources --------------------------------------------------------------------------------------------------------


def test_every_source_gives_the_rows_that_are_read_as_a_whole(tmp_path: Path) -> None:
    made = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(5)]
    table = datasets.Dataset.from_list(made)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "a.json").write_text(json.dumps(made))
    (tmp_path / "shards").mkdir()
    for name, part in (("1", made[:2]), ("2", made[2:])):
        (tmp_path / f"shards/{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    for source in ("a.parquet", "a.csv", "saved", "a.json", "shards", "shards/*.jsonl"):
        whole = read_rows(tmp_path / source)
        lazy = open_rows(tmp_path / source)
        assert lazy.name == whole.source
        assert lazy.textual == whole.textual
        for _ in range(2):
            assert [(n, str(n), cells) for n, cells in lazy.items()] == [(n, str(n), cells) for n, cells in whole.rows]  # type: ignore[misc]
    iterable = table.to_iterable_dataset()
    assert [row for _, row in open_rows(iterable).items()] == [row for _, row in open_rows(table).items()] == made  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"is a datasets\.IterableDataset, .*: streaming: true"):
        load(iterable, "text")


def test_a_repository_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - {split: train, path: train-*.jsonl}\n---\n"
    )
    for name in ("1", "2"):
        (folder / f"train-{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    lazy = open_rows(f"{folder}:en:train")
    for _ in range(2):
        assert list(lazy.items()) == [(1, {"text": "1"}), (2, {"text": "2"})]
    with pytest.raises(DataError, match=r"cannot load .*, configuration 'en', split 'train\[:1\]'"):
        open_rows(f"{folder}:en:train[:1]")


# ---- faults and refusals --------------------------------------------------------------------------------------------


def test_faults_at_the_beginning_come_at_once_and_later_ones_when_they_are_reached(tmp_path: Path) -> None:
    good, bad = '{"text": "x"}\n', "{broken\n" + '{"text": 5}\n'
    (tmp_path / "early.jsonl").write_text(good + bad)
    with pytest.raises(FaultyRowsError) as error:
        streamed(tmp_path / "early.jsonl", "text")
    assert [fault.row for fault in error.value.faults] == [2, 3]
    (tmp_path / "late.jsonl").write_text(good * 300 + bad)
    stream = streamed(tmp_path / "late.jsonl", "text", batch_size=10, buffer=1)
    rows(stream, 30)
    with pytest.raises(FaultyRowsError, match="row 301: not JSON"):
        stream[30]


@pytest.mark.parametrize(
    ("lines", "kind", "said"),
    [
        ("", "text", "holds no rows"),
        ('{"text": " "}', "text", "no usable row among the first; dropped 1 of 1 rows: 1 empty answer"),
        ('{"prompt": "q", "response": "a", "helpfulness": 3}', "pairs", "rated rows become pairs by joining"),
    ],
)
def test_sources_without_a_usable_row(lines: str, kind: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(lines)
    with pytest.raises(DataError, match=said):
        streamed(tmp_path / "rows.jsonl", kind)


def test_a_source_that_gives_nothing_more() -> None:
    passes = itertools.count()

    def once() -> Iterator[tuple[int, object]]:
        if next(passes) < 2:  # one to look at the first rows, one to read
            yield 1, {"text": "x"}

    stream = Streamed(Lazy("once", once), "text", None, encode, 1, 0, 1)
    assert rows(stream, 1) == [1]
    with pytest.raises(DataError, match="once: no row in pass 2; it cannot be read again"):
        stream[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_steps": None}, "streaming needs max_steps"),
        ({"eval_fraction": 0.1}, "streaming cannot hold out a fraction of rows .*; give eval_data"),
        ({"order_by": "level"}, "streaming cannot sort rows"),
        ({"data": ["a.jsonl", "b.jsonl"]}, "streaming reads one source; give one folder or glob"),
        ({"max_prompt_tokens": None}, "streaming needs max_prompt_tokens and max_completion_tokens"),
        ({"reference": "cached"}, "reference: cached scores all rows before the first step"),
        ({"data": make_rows("pairs", 4)}, "these rows are in memory already; remove streaming"),
    ],
)
def test_what_needs_all_rows_is_refused(
    changes: dict[str, Any], said: str, settings: dict[str, Any], path: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        alignkit.run("dpo", **{**settings, "data": path, "streaming": True, **changes})


def test_a_plan_of_rows_that_are_not_held_is_refused(settings: dict[str, Any], path: str) -> None:
    from alignkit.insight.plan import plan

    with pytest.raises(ConfigError, match="a plan counts all rows"):
        plan({**settings, "method": "dpo", "data": path, "streaming": True})


# ---- runs -----------------------------------------------------------------------------------------------------------


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_run_streams_and_resumes(method: str, settings: dict[str, Any], path: str) -> None:
    given = settings | {"data": path, "streaming": True, "shuffle_buffer": 6, "max_steps": 6, "save_every": 1}
    given |= {"eval_data": make_rows("pairs", 4), "keep_checkpoints": 9}
    folder = alignkit.run(method, **given, name="run").folder
    whole = metrics(folder)
    last = [line for line in whole if "loss" in line][-1]
    assert last["rows_read"] > 0
    assert "eval/loss" in whole[0]
    for checkpoint in folder.glob("checkpoints/*"):
        if checkpoint.name > "step-00000003":
            shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "model")
    assert metrics(alignkit.run(method, **given, name="run", resume=True).folder) == whole
    assert not settings["cache_file"].exists()
    session = json.loads((folder / "sessions.json").read_text())[-1]
    assert session["facts"]["rows"] is None


def test_a_run_on_a_stream_is_that_on_its_rows(settings: dict[str, Any], path: str) -> None:
    """Without shuffling, six steps of three rows are one epoch in the order of the file."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    ordered = [{**row, "level": i} for i, row in enumerate(rows) if i != 6][:18]
    given = settings | {"batch_size": 3, "max_steps": 6, "reference_cache": False}
    wanted = alignkit.run("dpo", **given, data=ordered, order_by="level", name="whole")
    found = alignkit.run("dpo", **given, data=path, streaming=True, shuffle_buffer=1, name="stream")
    losses = [[line["loss"] for line in metrics(run.folder)] for run in (wanted, found)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_late_fault_keeps_the_steps_before_it(settings: dict[str, Any], write_rows: Any) -> None:
    rows: list[dict[str, Any]] = make_rows("pairs", 400)
    good = write_rows(rows, "good.jsonl")
    bad = write_rows([{**row, "chosen": None} if i == 300 else row for i, row in enumerate(rows)], "rows.jsonl")
    settings |= {"streaming": True, "shuffle_buffer": 1, "batch_size": 8, "max_steps": 40}
    whole = alignkit.run("sft", data=good, name="whole", **settings)
    with pytest.raises(FaultyRowsError, match=r"row 301, column 'chosen'[\s\S]*Stopped after step 37; continue with"):
        alignkit.run("sft", data=bad, name="late", **settings)
    Path(bad).write_text(Path(good).read_text())
    late = alignkit.run("sft", data=bad, name="late", resume=True, **settings)
    losses = [[line["loss"] for line in read_metrics(run.folder)] for run in (late, whole)]
    assert losses[0] == losses[1]


def test_a_late_row_that_is_too_long_for_the_model_is_named(
    settings: dict[str, Any], write_rows: Any, tmp_path: Path
) -> None:
    from transformers import GPT2Config

    write_tiny(tmp_path / "gpt2", GPT2Config)
    rows: list[dict[str, Any]] = make_rows("pairs", 400)
    rows[350]["prompt"] = "red blue " * 300
    settings |= {"model": str(tmp_path / "gpt2"), "streaming": True, "shuffle_buffer": 1, "batch_size": 8}
    with pytest.raises(DataError, match=r"longer than the model's 256 positions, the longest \d+ tokens \(row 351\)"):
        alignkit.run("sft", data=write_rows(rows), **settings | {"max_steps": 50})
