"""sessions.json: what a run ran on and cost, added up over its resumptions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import alignkit
from alignkit.data import load
from alignkit.data.tokenise import tokenise
from alignkit.engine.loop import Loop
from alignkit.errors import AlarmError, ConfigError
from alignkit.runs import sessions
from helpers import make_rows


def cut_short(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
    """Let a run end with the error when it begins that step."""
    step = Loop.step

    def until(self: Loop, number: int, total: int) -> dict[str, float]:
        if number == at:
            raise error
        return step(self, number, total)

    monkeypatch.setattr(Loop, "step", until)


def test_a_run_leaves_one_session_with_its_cost_and_what_it_ran_on(
    settings: dict[str, Any], write_rows: Callable[..., str]
) -> None:
    rows = make_rows("pairs", 24)
    path = write_rows(rows)
    result = alignkit.run("dpo", data=path, **settings | {"max_steps": 6, "name": "run"})
    (only,) = sessions.read(result.folder)
    assert (only["ended"], only["from_step"], only["to_step"]) == ("done", 0, 6)
    # 6 steps of 4 rows are each of the 24 rows once, its prompt once and both answers
    examples, _ = tokenise(load(path, "pairs"), result.tokenizer)
    assert only["tokens"] == sum(len(e.prompt) + sum(len(c.tokens) for c in e.completions) for e in examples)
    assert only["seconds"] > 0
    assert only["preparing_seconds"] > 0
    assert 50 * 2**20 < only["peak_memory_bytes"] < 2**36
    assert only["environment"]["alignkit"] == alignkit.__version__
    assert only["environment"]["device"] == "cpu"
    facts = only["facts"]
    assert facts["parameters"] == facts["trained_parameters"] == sum(p.numel() for p in result.model.parameters())
    assert (facts["rows"], facts["held_out_rows"]) == (24, 0)
    assert facts["data_sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert facts["eval_data_sha256"] is None
    assert facts["reference"]["mode"] == "cached"
    assert facts["reference"]["values_computed"] == 48  # an empty cache, two answers a row


def test_with_lora_few_parameters_are_trained_and_a_second_run_computes_no_reference(settings: dict[str, Any]) -> None:
    settings |= {"data": make_rows("pairs", 8), "max_steps": 2, "lora": 4}
    for name in ("one", "two"):
        (only,) = sessions.read(alignkit.run("dpo", **settings | {"name": name}).folder)
        assert 0 < only["facts"]["trained_parameters"] < only["facts"]["parameters"] / 3
    assert only["facts"]["reference"]["values_computed"] == 0
    assert only["facts"]["reference"]["mode"] == "adapter-off"


@pytest.mark.parametrize(
    ("error", "ended"),
    [(RuntimeError("a bug"), "failed"), (SystemExit(143), "stopped"), (AlarmError("kl"), "stopped")],
)
def test_a_resumed_run_adds_a_session(
    error: BaseException, ended: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"data": make_rows("text", 24), "name": "run", "save_every": 2}
    with monkeypatch.context() as patched:
        cut_short(patched, 5, error)
        with pytest.raises(type(error)):
            alignkit.run("sft", **settings)
    folder = settings["output"] / "run"
    assert [one["ended"] for one in sessions.read(folder)] == [ended]
    alignkit.run("sft", **settings, resume=True)
    first, second = found = sessions.read(folder)
    assert (first["from_step"], first["to_step"]) == (0, 5)  # the fifth step was done, and is done again
    assert (second["from_step"], second["to_step"], second["ended"]) == (4, 6, "done")
    assert sessions.total(found, "tokens") == first["tokens"] + second["tokens"] > first["tokens"] > 0


def test_a_killed_session_is_known_to_within_a_minute(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_EVERY", 0.0)
    seen: list[Any] = []
    count_step = sessions.Session.count_step

    def watched(self: sessions.Session, tokens: float) -> None:
        count_step(self, tokens)
        seen.append(sessions.read(settings["output"] / "run")[-1])

    monkeypatch.setattr(sessions.Session, "count_step", watched)
    alignkit.run("sft", data=make_rows("text", 24), **settings | {"name": "run"})
    assert [one["to_step"] for one in seen] == [1, 2, 3, 4, 5, 6]
    assert {one["ended"] for one in seen} == {"running"}
    tokens = [one["tokens"] for one in seen]
    assert tokens == sorted(set(tokens))


def test_nothing_in_it_says_where_or_by_whom_the_run_was_made(settings: dict[str, Any]) -> None:
    result = alignkit.run("sft", data=make_rows("text", 8), **settings | {"max_steps": 1})
    text = (result.folder / sessions.FILE).read_text()
    assert not any(str(part) in text for part in (Path.home(), settings["output"], Path.cwd(), settings["model"]))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    assert sessions.read(tmp_path) == []
    for text in ("[{", "[1]", "7"):
        (tmp_path / sessions.FILE).write_text(text)
        with pytest.raises(ConfigError, match=r"cannot read .*sessions\.json"):
            sessions.read(tmp_path)
    (tmp_path / sessions.FILE).write_text(json.dumps([{"tokens": 3, "seconds": 1.5}, {"tokens": 4}]))
    found = sessions.read(tmp_path)
    assert (sessions.total(found, "tokens"), sessions.total(found, "seconds")) == (7, 1.5)


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [
        ({"facts": None}, "facts"),
        ({"environment": [1]}, "environment"),
        ({"seconds": "a"}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"tokens": None}, "tokens"),
        ({"preparing_seconds": 10**400}, "preparing_seconds"),
        ({"peak_memory_bytes": 10**400}, "peak_memory_bytes"),
        ({"facts": {"reference": {"values_read": "a"}}}, "facts.reference.values_read"),
        ({"facts": {"trained_parameters": "a"}}, "facts.trained_parameters"),
        ({"environment": {"gpu_memory_bytes": "a"}}, "environment.gpu_memory_bytes"),
    ],
)
def test_an_entry_that_no_run_writes_is_named(entry: dict[str, Any], wrong: str, tmp_path: Path) -> None:
    (tmp_path / sessions.FILE).write_text(json.dumps([{}, entry]))
    with pytest.raises(ConfigError, match=rf"cannot read .*sessions\.json: {wrong}: .*Remove the file"):
        sessions.read(tmp_path)


def test_a_file_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    (tmp_path / sessions.FILE).write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"cannot read .*sessions\.json"):
        sessions.read(tmp_path)


def test_memory_is_known_where_the_system_does_not_tell_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_: "Name:\tpython\nVmRSS:\t7 kB\n")
    assert 2**10 < sessions.peak_memory(gpu=False) < 2**40


@pytest.mark.parametrize("source", [".", "a-hub/name", [{"prompt": "a"}], None])
def test_only_files_have_a_digest(source: object) -> None:
    assert sessions.digest(source) is None
