"""Files that hold rows: every format, what is wrong with one, and where in it."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from alignkit.data import load, read_rows
from alignkit.errors import ConfigError, DataError

USER = {"role": "user", "content": "2 + 2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
ROWS = [{"prompt": f"q{i}", "chosen": "täglich, \u2028 'x'\n", "rejected": "[1, 2]"} for i in range(3)]


def written(folder: Path, suffix: str, rows: list[dict]) -> Path:
    path = folder / f"rows{suffix}"
    table = datasets.Dataset.from_list(rows)
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8-sig")
    elif suffix == ".parquet":
        table.to_parquet(path)
    elif suffix == ".csv":
        table.to_csv(path)
    else:
        table.save_to_disk(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ""])
def test_every_file_gives_the_same_rows(tmp_path, suffix):
    dataset = load(written(tmp_path, suffix, ROWS), "pairs")
    assert dataset.rows == load(ROWS, "pairs").rows
    assert [row.row for row in dataset] == [1, 2, 3]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ""])
def test_messages_come_through_files(tmp_path, suffix):
    rows = [{"messages": [USER, FOUR]}, {"messages": [{"role": "system", "content": "s"}, USER, FIVE]}]
    assert load(written(tmp_path, suffix, rows), "text").rows == load(rows, "text").rows


def test_objects_of_datasets(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    assert load(table.with_format("numpy"), "pairs").rows == load(ROWS, "pairs").rows
    labelled = [{"prompt": "q", "completion": "c", "label": True}]
    assert load(datasets.Dataset.from_list(labelled).with_format("numpy"), "unpaired").rows[0].numbers == {
        "desirable": 1
    }
    assert len(load(datasets.DatasetDict(train=table), "pairs")) == 3
    with pytest.raises(ConfigError, match="splits test"):
        load(datasets.DatasetDict(test=table), "pairs")


def test_a_csv_cell_may_hold_messages_lists_and_labels(tmp_path):
    path = tmp_path / "rows.csv"
    cell = json.dumps([USER]).replace('"', '""')
    path.write_text(f'prompt,completion,label\n"{cell}",4,true\n[2 + 2],5,0\n')
    rows = load(path, "unpaired").rows
    assert [(r.prompt, r.completions) for r in rows] == [([USER], ([FOUR],)), ("[2 + 2]", ("5",))]
    assert [r.numbers["desirable"] for r in rows] == [1.0, 0.0]
    path.write_text('prompt,completions,scores\nq,"[""x"", ""y""]","[0.5, 1]"\n')
    assert load(path, "pairs").rows[0].completions == ("y", "x")
    path.write_text("prompt,chosen,rejected,margin\nq,x,y,0.25\n")
    assert load(path, "pairs").rows[0].numbers == {"margin": 0.25}


def test_csv_rows_of_the_wrong_length_are_faults(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected\nq,x,y\nq,x\nq,x,y,z,w\n" + f'q,"{"long " * 50_000}",y\n')
    faults = read_rows(path).faults
    assert [(fault.row, fault.found) for fault in faults] == [
        (2, "2 cells under 3 column names"),
        (3, "5 cells under 3 column names"),
    ]
    path.write_text('prompt,completion\nq,x\nq,"not closed\n')
    assert [fault.row for fault in read_rows(path).faults] == [2]


def test_jsonl_counts_lines_with_any_encoding_fault(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "\xff"}\r\n{"text": "b"}')
    raw = read_rows(path)
    assert [number for number, _ in raw] == [1, 4]
    assert [(f.row, f.fix) for f in raw.faults] == [(3, "save the file as UTF-8")]


def test_a_json_file_may_hold_jsonl(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [r.completions for r in load(path, "text")] == [("a",), ("b",)]
    path.write_text("3")
    with pytest.raises(DataError, match="must hold a list of objects"):
        load(path, "text")


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no such file: .*pair\.jsonl\. Did you mean 'pairs\.jsonl'\?.*holds: pairs"):
        load(tmp_path / "pair.jsonl", "pairs")
    with pytest.raises(DataError, match="does not exist either"):
        load(tmp_path / "nowhere" / "pair.jsonl", "pairs")
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        load(tmp_path / "a.csv", "pairs") if (tmp_path / "pairs.jsonl").unlink() is None else None


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(DataError, match=r"cannot read '\.txt' files; give one of \.jsonl"):
        load(tmp_path / "rows.txt", "text")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match="not a complete parquet file"):
        load(tmp_path / "rows.parquet", "text")
    with pytest.raises(DataError, match=r"rows\.parquet: not a complete parquet file"):
        load(tmp_path, "text")


def test_hub_names_go_to_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, split))
        if path == "org/away":
            raise ConnectionError("no route")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load("org/pairs", "pairs")) == len(load("org/pairs.v2:test", "pairs")) == 3
    assert asked == [("org/pairs", "train"), ("org/pairs.v2", "test")]
    with pytest.raises(DataError, match=r"cannot load 'org/away', split 'train', from the hub: 'no route'"):
        load("org/away", "pairs")
    with pytest.raises(DataError, match="no such file"):
        load("org/pairs.jsonl", "pairs")
