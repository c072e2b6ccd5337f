"""Tokenised rows that are kept on disk: the same examples and lines, shared, and never in the way."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import time
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from families import tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import examples, shown
from transformers import AutoTokenizer

import alignkit
from alignkit import registry
from alignkit.config import RunConfig
from alignkit.data import Report, kept, shelf
from alignkit.data.blocks import Encoded
from alignkit.data.rows import RowNumber
from alignkit.data.sources import lazy_parts
from alignkit.data.store import Examples
from alignkit.engine import reading
from alignkit.types import Example
from helpers import make_rows


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "LEAST", 1)


def config_of(tmp_path: Path, data: Any, **more: Any) -> RunConfig:
    return RunConfig(**{"method": "dpo", "model": "-", "data": data, "output": tmp_path / "runs"} | more)


def read(config: RunConfig, tokenizer: Any, method: str = "dpo") -> Any:
    cls = registry.get(method)
    return reading.read(config, cls(cls.Config()), tokenizer, keep=True)


def entries(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "runs/.rows"
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


@settings(max_examples=40, deadline=None)
@given(st.lists(examples(), max_size=5))
def test_what_is_kept_comes_back(tmp_path_factory: pytest.TempPathFactory, made: list[Example]) -> None:
    report = Report(9, {"ties": [2, RowNumber(7, 3, "b.jsonl")]}, {"cut": [1]}, {"id": None})
    folder = tmp_path_factory.mktemp("kept") / "entry"
    kept.write(folder, Encoded(Examples(made), [], report, {"x": 0.5}))
    found = kept.read(folder)
    assert [shown(e) for e in found.examples] == [shown(e) for e in made]
    assert all(type(e.row) is type(m.row) for e, m in zip(found.examples, made, strict=True))
    assert found.lines() == report.lines()
    assert (found.report, found.weights) == (report, {"x": 0.5})
    assert reading.digest(found.examples, [], {}) == reading.digest(made, [], {})


def test_a_second_run_reads_nothing_and_prints_the_same(
    tiny: str, tmp_path: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, rows = AutoTokenizer.from_pretrained(tiny), make_rows("pairs", 30)
    rows[4]["rejected"] = rows[4]["chosen"]
    config = config_of(tmp_path, write_rows(rows), max_completion_tokens=2, eval_fraction=0.2)
    caplog.set_level(logging.INFO)
    first = read(config, tokenizer)
    lines = [*caplog.messages]
    assert any("dropped 1 of 30 rows" in line for line in lines)
    caplog.clear()
    monkeypatch.setattr(reading, "encoded", list)  # called, it would fail
    second = read(config, tokenizer)
    assert [line for line in caplog.messages if "kept by an earlier run" not in line] == lines
    assert len(caplog.messages) == len(lines) + 1
    assert second.digest == first.digest
    for before, after in ((first.train, second.train), (first.held_out, second.held_out)):
        assert [shown(e) for e in before] == [shown(e) for e in after]
    cls = registry.get("dpo")
    monkeypatch.undo()
    assert reading.read(config, cls(cls.Config()), tokenizer).digest == first.digest  # without keeping


def test_prompts_keep_what_they_were_given(tiny: str, tmp_path: Path, write_rows: Any) -> None:
    rows = [{"prompt": f"{i} + 1 =", "answer": i + 1, "more": {"deep": [None, 0.5, "é"]}} for i in range(5)]
    config = config_of(tmp_path, write_rows(rows), method="grpo")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for splits in (read(config, tokenizer, "grpo"), read(config, tokenizer, "grpo")):
        assert [(e.asked, e.columns) for e in splits.train] == [
            (row["prompt"], {"answer": row["answer"], "more": row["more"]}) for row in rows
        ]
    assert len(entries(tmp_path)) == 1


def test_rows_that_json_would_change_are_not_kept(tiny: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    data = Dataset.from_list([{"prompt": f"p{i}", "on": datetime(2026, 1, 1, tzinfo=UTC)} for i in range(3)])
    splits = read(config_of(tmp_path, data, method="grpo"), AutoTokenizer.from_pretrained(tiny), "grpo")
    assert all(e.columns["on"].year == 2026 for e in splits.train)
    assert not (tmp_path / "runs/.rows").exists()
    assert "such as dates" in caplog.text
    assert kept.is_json({"a": [1, "x", None, 0.5, True]})
    assert not any(map(kept.is_json, [(1,), {1: 2}, {"a": date.today()}, b"", "\ud83d"]))


def test_the_key_follows_everything_that_changes_examples(tiny: str, tmp_path: Path, write_rows: Any) -> None:
    tokenizer, path = AutoTokenizer.from_pretrained(tiny), write_rows(make_rows("pairs", 9))

    def key(
        kind: Any = "pairs",
        tokenizer: Any = tokenizer,
        data: Any = path,
        order: Any = None,
        wanted: Any = None,
        **more: Any,
    ) -> Any:
        return shelf.key_of(lazy_parts(data), kind, config_of(tmp_path, data, **more), tokenizer, order, wanted)

    first = key(wanted={})
    tokenizer("a b c", truncation=True, max_length=2)
    assert key() == key(batch_size=3, seed=5, output=tmp_path, template_date="2020-01-01") == first
    added, templated = (AutoTokenizer.from_pretrained(tiny) for _ in range(2))
    added.add_special_tokens({"additional_special_tokens": ["<new>"]})
    templated.chat_template = "{{ messages[0].content }}"
    dated = tokenizer_of("llama3_2")
    others = [
        key("unpaired"), key(tokenizer=added), key(tokenizer=templated), key(order="x"), key(max_prompt_tokens=5),
        key(max_completion_tokens=None), key(train_on="last"), key(special_tokens_in_text=True),
        key(columns={"prompt": "prompt"}), key(data={"path": path, "columns": {"prompt": "prompt"}}),
        key(data=write_rows(make_rows("pairs", 9), "other.jsonl")), key(data=[path, path]),
        key(data=[{"path": path, "weight": 1}, {"path": path, "weight": 2}]), key(tools=[{"name": "f"}]),
        key(tokenizer=dated, template_date="2020-01-01"), key(tokenizer=dated, template_date="2020-01-02"),
        key(wanted={"a": float}), key(wanted={"a": int}), key(wanted={"b": float}),
        key(wanted={"a": float, "b": int}), key(wanted={"b": int, "a": float}),
    ]  # fmt: skip
    assert len({first, *others}) == 1 + len(others)
    write_rows(make_rows("pairs", 10))
    assert key() != first
    rows = make_rows("pairs", 9)
    assert key(data=Dataset.from_list(rows)) == key(data=Dataset.from_list(rows)) != first
    assert key(data=Dataset.from_list(rows[1:])) != key(data=Dataset.from_list(rows))
    assert key(data=rows) is None


def test_small_sources_are_not_kept(
    tiny: str, tmp_path: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "LEAST", 2**20)
    read(config_of(tmp_path, write_rows(make_rows("pairs", 9))), AutoTokenizer.from_pretrained(tiny))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("harm", ["bytes", "short", "json", "missing", "names"])
def test_a_damaged_entry_is_set_aside(
    harm: str, tiny: str, tmp_path: Path, write_rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = config_of(tmp_path, write_rows(make_rows("pairs", 9)))
    first = read(config, tokenizer)
    (entry,) = entries(tmp_path)
    rows, about = entry / "rows.bin", entry / "about.json"
    content = bytearray(rows.read_bytes())
    content[3] ^= 1
    new = {"bytes": content, "short": content[:-1]}.get(harm)
    if new is not None:
        rows.unlink()  # the first run has it mapped
        rows.write_bytes(new)
    elif harm == "missing":
        rows.unlink()
    else:
        about.write_text("{" if harm == "json" else json.dumps({**json.loads(about.read_text()), "arrays": {}}))
    assert read(config, tokenizer).digest == first.digest
    assert "is set aside, and the rows are read again" in caplog.text
    assert [e.name.split("-")[0] for e in entries(tmp_path)] == [entry.name, f"{entry.name}.damaged"]
    caplog.clear()
    assert read(config, tokenizer).digest == first.digest
    assert not caplog.text


def test_a_full_disk_and_a_folder_of_others_are_one_warning(
    tiny: str, tmp_path: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = config_of(tmp_path, write_rows(make_rows("pairs", 9)))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(kept, "sha256", full)
        assert len(read(config, tokenizer).train) == 9
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text
    assert not (tmp_path / "runs/.rows").exists()
    caplog.clear()
    (tmp_path / "runs").rmdir()
    (tmp_path / "runs").write_text("")  # as in a folder in which nothing may be written
    assert len(read(config, tokenizer).train) == 9
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def test_faulty_rows_leave_nothing(tiny: str, tmp_path: Path, write_rows: Any) -> None:
    with pytest.raises(alignkit.errors.DataError):
        read(config_of(tmp_path, write_rows([{"prompt": 5}])), AutoTokenizer.from_pretrained(tiny))
    assert not (tmp_path / "runs/.rows").exists()


def test_the_newest_entries_stay(tiny: str, tmp_path: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "MOST", 2)
    tokenizer, path = AutoTokenizer.from_pretrained(tiny), write_rows(make_rows("pairs", 9))
    dead = tmp_path / "runs/.rows/.abc.999999999"
    dead.mkdir(parents=True)
    made = []
    for limit in (3, 4, 3, 5):  # the one with 3 is used again before the third is kept
        read(config_of(tmp_path, path, max_prompt_tokens=limit), tokenizer)
        made += [entry for entry in entries(tmp_path) if entry not in made]
        time.sleep(0.02)
    assert set(entries(tmp_path)) == {made[0], made[2]}
    assert sorted(p.name for p in (tmp_path / "runs/.rows").glob("*.lock")) == sorted(
        f"{e.name}.lock" for e in entries(tmp_path)
    )


WORKER = """
import logging, sys
from transformers import AutoTokenizer
from alignkit.data import shelf, blocks
from alignkit import registry
from alignkit.config import RunConfig
from alignkit.engine import reading
shelf.LEAST = 1
real = reading.encoded
def slow(*a):
    import time; time.sleep(1.5); print("made", flush=True); return real(*a)
reading.encoded = slow
cls = registry.get("dpo")
config = RunConfig(method="dpo", model="-", data=sys.argv[1], output=sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[3])
print(reading.read(config, cls(cls.Config()), tokenizer, keep=True).digest)
"""


def test_one_of_several_processes_reads_for_all(tiny: str, tmp_path: Path, write_rows: Any) -> None:
    command = [sys.executable, "-c", WORKER, write_rows(make_rows("pairs", 9)), str(tmp_path / "runs"), tiny]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [job.communicate(timeout=120)[0].split() for job in jobs]
    assert sorted(len(words) for words in said) == [1, 2]
    assert said[0][-1] == said[1][-1]


def test_a_run_keeps_its_rows_unless_it_is_told_not_to(settings: dict[str, Any], write_rows: Any) -> None:
    given = settings | {"data": write_rows(make_rows("pairs", 12)), "max_steps": 1}
    folder = settings["output"] / ".rows"
    alignkit.run("dpo", **given, rows_cache=False)
    assert not folder.exists()
    first, second = (alignkit.run("dpo", **given) for _ in range(2))
    assert len([p for p in folder.iterdir() if p.is_dir()]) == 1
    assert [r.folder.name for r in (first, second)] == ["dpo-002", "dpo-003"]
    with pytest.raises(alignkit.errors.ConfigError, match="rows_cache has an effect with streaming: false only"):
        alignkit.run("dpo", **given, streaming=True, rows_cache=False)
