"""The end of a run: a disk that is full, and what a resumption then saves without a step."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import alignkit
from alignkit.engine import model_folder
from alignkit.engine.loop import Loop
from alignkit.errors import CheckpointError
from alignkit.files import sha256
from alignkit.runs import checkpoint
from alignkit.runs.log import RunLog
from helpers import make_rows


@pytest.fixture
def short(settings: dict[str, Any]) -> dict[str, Any]:
    """A run of two steps."""
    return settings | {"data": make_rows("pairs", 8), "max_steps": 2, "name": "r"}


def no_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Loop, "step", lambda *_: pytest.fail("it trained"))


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("fault", ["no space", "full while writing", "the tokenizer's"])
def test_a_disk_that_is_full_at_the_end_loses_no_step(
    fault: str, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = alignkit.run("dpo", **short | {"name": "whole"})
    folder = Path(short["output"]) / "r"

    def full(*_: Any) -> None:
        if fault == "no space":
            raise OSError(errno.ENOSPC, "No space left on device")
        # what tokenizers 0.22 raises
        raise Exception("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        if fault == "full while writing":
            save = model_folder._write

            def then_full(model: Any, place: Path, state: Any) -> None:
                save(model, place, state)
                full()

            patch.setattr(model_folder, "_write", then_full)
        else:
            patch.setattr(model_folder, "save_processor", full)
        with pytest.raises(CheckpointError) as caught:
            alignkit.run("dpo", **short)
    said = str(caught.value)
    assert said.startswith(f"the model cannot be written to {folder}: ")
    assert "No space left on device" in said
    assert " MB are free. The checkpoint of the last step is whole. Free some space there, then type: " in said
    assert f"alignkit run {folder / 'config.yaml'} --resume" in said
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert not list(folder.glob(".model*"))
    with monkeypatch.context() as patch:
        no_step(patch)
        again = alignkit.run("dpo", resume=True, **short)
    assert weights(again.folder) == weights(whole.folder)


def test_space_for_the_model_is_checked_before_it_is_written(
    short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = model_folder.saving

    def at_the_end(what: str, *rest: Any) -> Any:
        if what == "the model":
            monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000))
            monkeypatch.setattr(model_folder, "_replace", lambda *_: pytest.fail("it wrote"))
        return write(what, *rest)

    monkeypatch.setattr(model_folder, "saving", at_the_end)
    with pytest.raises(CheckpointError, match=r"not enough space\. It needs 1\.\d MB, 0\.0 MB are free"):
        alignkit.run("dpo", **short)


def test_a_run_whose_files_do_not_fit_does_not_begin(short: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    n = sum(t.nbytes for t in load_file(Path(short["model"]) / "model.safetensors").values())
    no_step(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=(1 << 20) + 2 * n - 1))
    with pytest.raises(
        CheckpointError, match=r"the run's checkpoint and model cannot be written to .* another --output"
    ):
        alignkit.run("dpo", **short)
    assert not (Path(short["output"]) / "r").exists()


def test_a_model_that_fits_is_saved_where_its_checkpoint_does_not(
    short: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    n = sum(t.nbytes for t in load_file(Path(short["model"]) / "model.safetensors").values())
    # weights and two moments need 3 n
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=(1 << 20) + 2 * n + 10))
    folder = alignkit.run("dpo", **short).folder
    assert "the checkpoint of step 2 cannot be written" in caplog.text
    assert (folder / "model/model.safetensors").is_file()


def test_a_log_that_cannot_be_written_is_one_message(short: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> dict[str, float]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunLog, "write", full)
    with pytest.raises(CheckpointError, match=r"the run's log cannot be written to .*r: No space .* --resume"):
        alignkit.run("dpo", **short)


def test_the_command_line_says_it_in_one_line_with_exit_code_2(
    command: Any, short: dict[str, Any], write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000))
    given = ["--model", short["model"], "--data", write_rows(short["data"]), "--max-steps", 1]
    code, _, said = command("run", "dpo", *given, "--set", "device=cpu")
    assert code == 2
    assert "error: the run's checkpoint and model cannot be written to runs/dpo-001" in said
    assert "Traceback" not in said


def test_a_run_with_patience_that_could_not_save_its_model_is_resumed_with_its_best_weights(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"data": make_rows("pairs", 16), "eval_fraction": 0.3, "eval_every": 1, "patience": 2, "max_steps": 9}
    settings |= {"learning_rate": 3e-1, "save_every": 1}  # it gets worse at once, so the best weights are older ones
    whole = alignkit.run("dpo", **settings | {"name": "whole"})
    with monkeypatch.context() as patch, pytest.raises(CheckpointError):  # noqa: PT012
        patch.setattr(model_folder, "_write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        alignkit.run("dpo", **settings | {"name": "r"})
    no_step(monkeypatch)
    again = alignkit.run("dpo", resume=True, **settings | {"name": "r"})
    assert weights(again.folder) == weights(whole.folder)
    lines = [[{k: v for k, v in json.loads(x).items() if k != "tokens_per_second"} for x in
              (run.folder / "metrics.jsonl").read_text().splitlines()] for run in (whole, again)]  # fmt: skip
    assert lines[0] == lines[1]
    assert lines[0][-1]["eval/loss"] < lines[0][-2]["eval/loss"]  # of the best weights


def test_the_checkpoint_for_a_failing_save_goes_with_the_model_and_takes_no_other_with_it(
    short: dict[str, Any],
) -> None:
    folder = alignkit.run("dpo", **short).folder
    assert not (folder / "checkpoints").exists()
    kept = alignkit.run("dpo", **short | {"name": "k", "max_steps": 3, "save_every": 2, "keep_checkpoints": 1}).folder
    assert [p.name for p in (kept / "checkpoints").iterdir()] == ["step-00000002"]


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_saves_left_goes_and_what_living_ones_write_stays(short: dict[str, Any]) -> None:
    folder = Path(alignkit.run("dpo", **short | {"save_every": 1}).folder)
    before = weights(folder)
    gone, living = dead(), os.getppid()
    (folder / "model").rename(folder / f".model-before-{gone}")  # killed between the two renames
    for pid in (gone, living):
        (folder / f".model-{pid}").mkdir()
        (folder / f".model-{pid}" / "model.safetensors").write_text("half")
    model_folder.clear_leftovers(folder)
    assert weights(folder) == before
    assert [p.name for p in folder.glob(".model*")] == [f".model-{living}"]
    (folder / f".model-{gone}").mkdir()
    alignkit.run("dpo", resume=True, **short | {"save_every": 1})
    assert [p.name for p in folder.glob(".model*")] == [f".model-{living}"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_of_models_and_checkpoints_have_the_modes_of_the_umask(
    mask: int, mode: int, short: dict[str, Any]
) -> None:
    before = os.umask(mask)
    try:
        folder = alignkit.run("dpo", **short | {"save_every": 2}).folder
    finally:
        os.umask(before)
    files = [*(folder / "model").iterdir(), *(folder / "checkpoints/step-00000002").iterdir()]
    assert len(files) > 6
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {mode}


@pytest.mark.parametrize("lora", [None, 4])
def test_checkpoints_hold_no_frozen_weights_and_tied_ones_once(
    lora: int | None, short: dict[str, Any], tmp_path: Path
) -> None:
    from helpers import write_tiny

    write_tiny(tmp_path / "tied", tie_word_embeddings=True)
    settings = short | {"model": str(tmp_path / "tied"), "lora": lora, "save_every": 2}
    folder = alignkit.run("dpo", **settings).folder / "checkpoints/step-00000002"
    held = load_file(folder / "model.safetensors")
    named = set(checkpoint.load(folder.parent).tensors["model"])
    if lora:
        assert named == set(held)
        assert all(".lora_" in name for name in held)
    else:
        both = {n for n in named if "embed_tokens" in n or "lm_head" in n}
        assert len(both) == 2
        assert len(both & set(held)) == 1
    again = alignkit.run("dpo", resume=True, **settings)  # and it fits
    assert (again.folder / "model").is_dir()


def resealed(path: Path, change: Any) -> None:
    """Change a checkpoint's tensors or state, and write its sizes and sums anew."""
    from safetensors.torch import save_file

    change(path, load_file, save_file)
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        entry |= {"size": (path / name).stat().st_size, "sha256": sha256(path / name)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def of_tensors(change: Any, group: str = "model") -> Any:
    def apply(path: Path, load: Any, save: Any) -> None:
        tensors = load(path / f"{group}.safetensors")
        change(tensors, sorted(tensors)[-1])
        save(tensors, path / f"{group}.safetensors")

    return apply


def of_state(change: Any) -> Any:
    def apply(path: Path, *_: Any) -> None:
        head = json.loads((path / "state.json").read_text())
        found = change(head)
        (path / "state.json").write_text(found if isinstance(found, str) else json.dumps(head))

    return apply


WRONG = {
    "missing": (of_tensors(lambda ts, n: ts.pop(n)), "lacks 1 trained weights, such as "),
    "extra": (
        of_tensors(lambda ts, n: ts.update(more=torch.ones(1))),
        "1 weights that the model does not have, .*more",
    ),
    "shape": (
        of_tensors(lambda ts, n: ts.update({n: ts[n][:1].clone()})),
        r"has shape \[1, \d+\], but the model's has",
    ),
    "nan": (of_tensors(lambda ts, n: ts[n].view(-1)[:1].fill_(torch.nan)), "has numbers that are not finite"),
    "moments": (of_tensors(lambda ts, n: ts.update({n: torch.tensor(torch.nan)}), "optimizer"), "are not finite"),
    "no moment": (of_tensors(lambda ts, n: ts.pop(n), "optimizer"), "contents do not fit this run: KeyError"),
    "moment's shape": (
        of_tensors(lambda ts, n: ts.update({k: t[:1].clone() for k, t in ts.items() if t.ndim == 2}), "optimizer"),
        r"exp_avg\w* of '.*' has shape",
    ),
    "step": (of_state(lambda head: head.update(step=10**9)), "step 1000000000, which is not that of the folder's name"),
    "text": (of_state(lambda head: head.update(step="2")), "step '2', which is not"),
    "deep": (of_state(lambda head: "[" * 200_000), "it cannot be read: RecursionError"),
    "list": (of_state(lambda head: head.update(state=[1])), r"no object as its state: \[1\]"),
    "bare": (of_state(lambda head: "[]"), "it cannot be read: AttributeError"),
    "empty": (of_state(lambda head: head.update(state={})), "contents do not fit this run: KeyError: 'rows'"),
    "method": (of_state(lambda head: head["state"].update(skipped="many")), "contents do not fit this run: ValueError"),
    "generator": (
        of_state(lambda head: head["state"]["rng"].update(numpy=[1])),
        "random generators cannot be restored",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_resealed_checkpoints_with_wrong_contents_are_named_and_the_one_before_is_used(
    fault: str, short: dict[str, Any], caplog: pytest.LogCaptureFixture, lora_run: Path
) -> None:
    change, said = WRONG[fault]
    short |= {"lora": 4, "save_every": 1, "model": json.loads((lora_run / "about.json").read_text())}
    shutil.copytree(lora_run / "r", Path(short["output"]) / "r")
    before = (Path(short["output"]) / "r" / "model/adapter_model.safetensors").read_bytes()
    resealed(Path(short["output"]) / "r/checkpoints/step-00000002", change)
    again = alignkit.run("dpo", resume=True, **short)
    assert [r for r in caplog.messages if "step-00000002 is damaged" in r]
    assert re.search(said, caplog.text)
    assert (again.folder / "model/adapter_model.safetensors").read_bytes() == before
    for step in (1, 2):
        path = again.folder / f"checkpoints/step-{step:08d}"
        resealed(path, change)
    with pytest.raises(CheckpointError, match=rf"all 2 checkpoints in .* are damaged: .*{said}"):
        alignkit.run("dpo", resume=True, **short)


@pytest.fixture(scope="module")
def lora_run(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of adapters with a checkpoint for each of its two steps, and the name of its model."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "about.json").write_text(json.dumps(tiny))
    more = {"batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "device": "cpu", "lora": 4, "save_every": 1}
    data = make_rows("pairs", 8)
    alignkit.run("dpo", model=tiny, data=data, output=folder, name="r", cache_file=folder / "c.sqlite", **more)
    return folder


def test_a_step_beyond_the_end_of_the_run_is_named(
    short: dict[str, Any], lora_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Path(short["output"]) / "r"
    shutil.copytree(lora_run / "r", place)
    far = place / "checkpoints/step-1000000000"
    (place / "checkpoints/step-00000002").rename(far)
    resealed(far, of_state(lambda head: head.update(step=10**9)))
    alignkit.run("dpo", resume=True, **short | {"lora": 4, "save_every": 1})
    assert "its step is 1000000000, but the run has 2 steps" in caplog.text
