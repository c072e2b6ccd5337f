"""The folder of a run: resumed where it lies, with the models that it had, by one process at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import alignkit
from alignkit.config import read_yaml, write_yaml
from alignkit.engine.loop import Loop
from alignkit.errors import ConfigError, ModelError
from alignkit.reference.keys import weights_digest
from alignkit.runs import lock
from alignkit.runs.fingerprints import found
from alignkit.runs.lock import FolderLock
from helpers import killed_before, make_rows, write_tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model of the test's own."""
    write_tiny(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def killed(settings: dict[str, Any], base: Path, write_rows: Any) -> dict[str, Any]:
    """Settings of a run of adapters that was killed after its second step."""
    settings |= {"data": write_rows(make_rows("pairs", 12)), "save_every": 1, "lora": 4, "max_steps": 4}
    settings |= {"model": str(base), "name": "r"}
    with killed_before(2):
        alignkit.run("dpo", **settings)
    return settings


def change(model: Path) -> None:
    """Change one weight of a saved model."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors[min(tensors)].view(-1)[0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


# models


def test_a_changed_base_is_refused_by_name_and_goes_on_with_the_flag(
    killed: dict[str, Any], base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(base)
    with pytest.raises(ModelError) as caught:
        alignkit.run("dpo", resume=True, **killed)
    said = str(caught.value)
    assert f"model '{base}': model.safetensors was " in said
    assert "config.json" not in said  # it did not change
    assert "--allow-changed-models" in said
    alignkit.run("dpo", resume=True, allow_changed_models=True, **killed)
    assert "models changed since the run was started: model '" in caplog.text
    alignkit.run("dpo", resume=True, **killed)  # the new model is that of the run now


def test_a_changed_base_of_an_adapter_is_refused(killed: dict[str, Any], base: Path) -> None:
    adapter = Path(killed["output"]) / "adapter"
    folder = alignkit.run("dpo", resume=True, **killed).folder
    (folder / "model").rename(adapter)
    further = killed | {"model": str(adapter), "lora": None, "name": "further"}
    with killed_before(2):
        alignkit.run("dpo", **further)
    change(base)
    with pytest.raises(ModelError, match=rf"base of model '{base}': model\.safetensors was \w+, is \w+\."):
        alignkit.run("dpo", resume=True, **further)


def test_a_model_that_only_moved_is_resumed(killed: dict[str, Any], base: Path) -> None:
    whole = alignkit.run("dpo", **killed | {"name": "whole"})
    moved = base.rename(base.with_name("elsewhere"))
    (moved / "README.md").write_text("words change no model")
    folder = alignkit.run("dpo", resume=True, **killed | {"model": str(moved)}).folder
    ours, theirs = ((f / "model/adapter_model.safetensors").read_bytes() for f in (folder, whole.folder))
    assert ours == theirs


def test_a_run_without_fingerprints_is_resumed_and_gets_them(killed: dict[str, Any], base: Path) -> None:
    file = Path(killed["output"]) / "r/models.json"
    before = json.loads(file.read_text())
    file.unlink()
    alignkit.run("dpo", resume=True, **killed)
    assert json.loads(file.read_text()) == before
    file.write_text("[1]")
    with pytest.raises(ConfigError, match=r"cannot read .*models\.json"):
        alignkit.run("dpo", resume=True, **killed)


def test_fingerprints_are_of_every_model_in_the_settings(base: Path, tmp_path: Path) -> None:
    from alignkit.config import RunConfig

    reward = shutil.copytree(base, tmp_path / "reward")
    judge = {"use": "llm", "url": "http://127.0.0.1:1/v1", "model": "m", "rubric": "Which is better?\n" * 900}
    spec = [{"use": str(reward), "weight": 0.5}, "numeric", {"ensemble": [str(base)]}]
    config = RunConfig(method="grpo", model=str(base), data="d", reward=spec, judge=judge, critic=str(reward))
    every = found(config)
    assert sorted(every) == ["critic", "model", "reward.0.use", "reward.2.ensemble.0"]
    assert every["critic"]["content"] == every["model"]["content"]
    change(reward)
    again = found(config)
    changed = sorted(place for place in every if every[place] != again[place])
    assert changed == ["critic", "reward.0.use"]


def test_an_object_is_known_by_its_weights(killed: dict[str, Any], base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def given(shift: float = 0.0) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            model.get_input_embeddings().weight[0] += shift
        return killed | {"model": model, "tokenizer": AutoTokenizer.from_pretrained(base), "name": "o"}

    same, other = weights_digest(given()["model"]), weights_digest(given(1.0)["model"])
    assert same != other
    with killed_before(2):
        alignkit.run("dpo", **given())
    with pytest.raises(ModelError, match=rf"model 'LlamaForCausalLM': weights was {same[:16]}, is {other[:16]}"):
        alignkit.run("dpo", resume=True, **given(1.0))
    alignkit.run("dpo", resume=True, **given())


def test_a_file_cannot_allow_changed_models(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("method: dpo\nallow_changed_models: true\n")
    with pytest.raises(ConfigError, match="sets allow_changed_models, which only the command line or a Python call"):
        read_yaml(tmp_path / "c.yaml")
    write_yaml(tmp_path / "d.yaml", {"method": "dpo", "allow_changed_models": True})
    assert read_yaml(tmp_path / "d.yaml") == {"method": "dpo"}


# places


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("by", ["command", "python"])
@pytest.mark.parametrize("name", ["r", "copy"])
def test_a_copied_run_goes_on_where_it_lies(
    by: str, name: str, killed: dict[str, Any], command: Any, tmp_path: Path
) -> None:
    start = Path(killed["output"]) / "r"
    copy = shutil.copytree(start, tmp_path / "there" / name)
    with (copy / "alarms.jsonl").open("a") as file:
        file.write("\n")  # a byte that only the copy has
    before = {p: p.read_bytes() for p in start.rglob("*") if p.is_file()}
    if by == "command":
        code, said, _ = command("run", copy / "config.yaml", "--resume")
        assert code == 0
        assert f"model: {copy / 'model'}" in said
    else:
        assert alignkit.resume(copy).folder == copy
    assert steps(copy) == [1, 2, 3, 4]
    assert {p: p.read_bytes() for p in start.rglob("*") if p.is_file()} == before


def test_inside_of_its_folder_a_run_is_found(killed: dict[str, Any], command: Any, monkeypatch: Any) -> None:
    start = Path(killed["output"]) / "r"
    (start.parent / "moved").mkdir()
    moved = start.rename(start.parent / "moved" / "again")
    monkeypatch.chdir(moved)
    assert command("run", "config.yaml", "--resume")[0] == 0
    assert (moved / "model").is_dir()
    assert not start.exists()


def test_settings_that_are_not_in_a_runs_folder_name_its_place(killed: dict[str, Any], command: Any) -> None:
    start = Path(killed["output"]) / "r"
    file = Path(shutil.copy(start / "config.yaml", Path(killed["output"]).parent / "mine.yaml"))
    assert command("run", file, "--resume")[0] == 0
    assert (start / "model").is_dir()


def test_a_moved_pipeline_goes_on_where_it_lies(settings: dict[str, Any], command: Any, tmp_path: Path) -> None:
    rows = make_rows("pairs", 8)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    stages = [{"method": "sft", "max_steps": 1}, {"method": "dpo", "max_steps": 2, "save_every": 1}]
    shared = {k: str(settings[k]) for k in ("model", "output", "cache_file", "device")}
    given = {**shared, "data": str(tmp_path / "rows.jsonl"), "name": "p", "batch_size": 4, "stages": stages}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(given))
    step = Loop.step

    def dies(loop: Loop, number: int, total: int) -> dict[str, float]:
        if loop.state.method.name == "dpo" and number == 1:
            raise ConfigError("killed")
        return step(loop, number, total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", dies)
        assert command("pipeline", tmp_path / "p.yaml")[0] == 2
    moved = (Path(settings["output"]) / "p").rename(tmp_path / "moved")
    code, said, complaint = command("pipeline", moved / "pipeline.yaml", "--resume")
    assert code == 0, complaint
    assert str(moved) in said.replace("\n", "")
    assert steps(moved / "2-dpo")[-1] == 2
    assert (moved / "2-dpo/model").is_dir()
    assert not (Path(settings["output"]) / "p").exists()


# processes

HOLD = """
import sys, time
from pathlib import Path
from alignkit.runs import lock
lock.BEAT = float(sys.argv[2])
if len(sys.argv) > 3:
    lock._machine = lambda: sys.argv[3]
    lock.fcntl.flock = lambda *_: None  # a file system that keeps the locks of each machine apart
lock.FolderLock(Path(sys.argv[1])).take()
print("taken", flush=True)
time.sleep(60)
"""


def holder(folder: Path, beat: float = 20, *machine: str) -> subprocess.Popen[str]:
    """Start a process that holds the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(beat), *machine], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    first = holder(tmp_path)
    try:
        words = rf"in use by process {first.pid} on {socket.gethostname()} since 20\d\d-.* UTC, and a second process"
        with pytest.raises(ConfigError, match=words):
            FolderLock(tmp_path).take()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    mine = FolderLock(tmp_path)
    mine.take()
    assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    mine.close()
    mine.close()
    assert not list(tmp_path.iterdir())


def test_an_owner_on_another_machine_is_respected_while_it_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.5)
    first = holder(tmp_path, 0.5, "another machine")
    try:
        with pytest.raises(ConfigError, match=f"in use by process {first.pid} on "):
            FolderLock(tmp_path).take()
    finally:
        first.kill()
        first.wait()
    started = time.monotonic()
    mine = FolderLock(tmp_path)
    mine.take()
    assert 1.4 < time.monotonic() - started < 10  # three beats
    mine.close()
    (tmp_path / lock.FILE).write_text(json.dumps({"boot": "another machine", "pid": 1}))
    os.utime(tmp_path / lock.FILE, (0, 0))  # of yesterday: nobody is waited for
    started = time.monotonic()
    mine.take()
    assert time.monotonic() - started < 1
    mine.close()


def test_without_locks_of_the_file_system_a_living_process_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    first = holder(tmp_path)
    monkeypatch.setattr(lock.fcntl, "flock", none)
    with pytest.raises(ConfigError, match=f"process {first.pid}"):
        FolderLock(tmp_path).take()
    first.kill()
    first.wait()
    mine = FolderLock(tmp_path)
    mine.take()
    mine.close()


@pytest.mark.parametrize("text", ["", "no JSON", "[" * 9000, "[]", "{}", '{"pid": "x"}'])
def test_a_spoiled_lock_is_taken(text: str, tmp_path: Path) -> None:
    (tmp_path / lock.FILE).write_text(text)
    os.utime(tmp_path / lock.FILE, (0, 0))
    mine = FolderLock(tmp_path)
    mine.take()
    mine.close()


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot lock .*absent/\.lock: No such file or directory"):
        FolderLock(tmp_path / "absent").take()


def test_a_run_in_use_is_refused_and_free_after_it_ended_or_failed(killed: dict[str, Any]) -> None:
    folder = Path(killed["output"]) / "r"
    assert not (folder / lock.FILE).exists()  # it failed in this process
    first = holder(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=f"{folder} is in use by process {first.pid}"):
        alignkit.run("dpo", resume=True, **killed)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    first.kill()
    first.wait()
    alignkit.run("dpo", resume=True, **killed)
    assert not (folder / lock.FILE).exists()


def test_a_pipeline_in_use_is_refused(settings: dict[str, Any]) -> None:
    settings |= {"data": make_rows("text", 8), "max_steps": 1, "name": "p"}
    folder = Path(settings["output"]) / "p"
    stages = [{"method": "sft"}]
    alignkit.Engine().pipeline(stages, **settings)
    assert not (folder / lock.FILE).exists()
    first = holder(folder)
    with pytest.raises(ConfigError, match=f"{folder} is in use by process {first.pid}"):
        alignkit.Engine().pipeline(stages, resume=True, **settings)
    first.kill()
    first.wait()
    alignkit.Engine().pipeline(stages, resume=True, **settings)
