"""The command line as a newcomer meets it: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import torch
import typer
import yaml

from alignkit import __version__, cli, registry
from alignkit.cli import console
from alignkit.errors import ConfigError
from alignkit.reference.cache import LogpCache
from helpers import make_rows

FAULTY = """{"prompt": "a", "chosen": null, "rejected": "b"}
{"prompt": "a", "rejected": "b"}
{broken
{"prompt": 3, "chosen": "x", "rejected": "y"}
{"prompt": "a", "chosen": "x", "rejected": ["y"]}
[1]
{"prompt": "a", "chosen": "x", "rejected": "y"}
"""


class Said(NamedTuple):
    """How a call ended, and what it printed where."""

    code: int
    out: str
    err: str


Call = Callable[..., Said]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder and a cache of its own; the log is put back as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache.sqlite"))
    monkeypatch.delenv("RANK", raising=False)
    logger = logging.getLogger("alignkit")
    before = logger.handlers[:], logger.level, logger.propagate
    yield tmp_path
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def call(command: Callable[..., Any]) -> Call:
    """Run `alignkit ARGUMENTS` through `main`, as the installed command does."""

    def run(*arguments: object) -> Said:
        code, out, err = command(*arguments)
        return Said(code if isinstance(code, int) else int(code is not None), out, err)

    return run


@pytest.fixture
def prefs(write_rows: Callable[..., str]) -> str:
    return write_rows(make_rows("pairs", 8), "prefs.jsonl")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a failure of the test."""
    from alignkit.engine import assemble

    def loaded(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(assemble, "load_model", loaded)


def every_command() -> list[tuple[str, ...]]:
    root = typer.main.get_command(cli.app)
    assert isinstance(root, click.Group) or hasattr(root, "commands")
    paths: list[tuple[str, ...]] = [()]
    for name, command in root.commands.items():
        paths.append((name,))
        paths += [(name, inner) for inner in getattr(command, "commands", ())]
    return paths


@pytest.mark.parametrize("path", every_command(), ids=" ".join)
def test_help_of_every_command(path: tuple[str, ...], call: Call) -> None:
    said = call(*path, "--help")
    assert said.code == 0
    assert said.out.startswith(f"Usage: {' '.join(('alignkit', *path))}")
    assert said.err == ""


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom alignkit import cli\nsys.argv = ['alignkit', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'numpy', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_list_of_methods_imports_no_models() -> None:
    code = (
        "import sys\nfrom alignkit import registry\nassert len(registry.plugins()) > 10\n"
        "print([m for m in ('transformers', 'accelerate', 'datasets', 'torch.distributed.fsdp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(call: Call) -> None:
    assert call("--version") == Said(0, f"alignkit {__version__}\n", "")


def test_no_arguments_show_the_help(call: Call) -> None:
    assert "Usage: alignkit" in "".join(call()[1:])


def test_methods_lists_all(call: Call) -> None:
    said = call("methods")
    assert said.code == 0
    rows = {line.split()[0]: line for line in said.out.splitlines()[1:]}
    assert set(registry.names()) <= set(rows)
    assert "pairs" in rows["dpo"]
    assert "policy, reference" in rows["dpo"]
    assert "alignkit-dpo" in rows["dpo"]


def test_settings_show_the_methods_and_the_runs(call: Call) -> None:
    said = call("settings", "dpo")
    assert said.code == 0
    assert "beta                    0.1          how strongly" in said.out
    assert "(sigmoid | robust | hinge | exo_pair | nca_pair | sppo_hard | apo_zero | apo_down | cal)" in said.out
    assert "(float, >= 0, < 0.5)" in said.out
    assert "warmup_fraction" in said.out
    assert "required" in said.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["run", "dop", "--model", "m", "--data", "d"],
            ["no method is called 'dop'", "Did you mean 'dpo'?", "installed: "],
        ),
        (["run", "dop"], ["no method is called 'dop'"]),
        (["settings", "dop"], ["Did you mean 'dpo'?"]),
        (["demo", "--method", "dop"], ["Did you mean 'dpo'?"]),
        (["run", "dpo", "--modle", "m"], ["--modle", "--model"]),
        (["runn"], ["'runn'", "'run'"]),
        (["run", "dpo", "--model", "m", "--data", "d", "--set", "leraning_rate=1"], ["Did you mean 'learning_rate'?"]),
        (["run", "dpo", "--model", "m", "--data", "d", "--set", "beta"], ["KEY=VALUE", "'beta'"]),
        (["run", "dpo", "--model", "m", "--data", "d", "--set", "=1"], ["KEY=VALUE"]),
        (["run", "dpo", "--model", "m", "--data", "d", "--set", "beta=abc"], ["beta: ", "'abc'"]),
        (["run", "dpo", "--model", "m", "--data", "d", "--max-steps", "0"], ["max_steps: ", "0"]),
        (["run", "dpo", "--model", "m", "--data", "d", "--learning-rate", "abc"], ["--learning-rate"]),
        (["run", "dpo", "--model", "m", "--data", "d", "--reference", "cashed"], ["reference: ", "'cached'"]),
        (["run", "dpo"], ["no model and no data given; add --model and --data"]),
        (["run", "dpo", "--model", "m"], ["no data given; add --data"]),
        (["run", "missing.yaml"], ["cannot read missing.yaml"]),
        (["run", "missing/settings"], ["'missing/settings' is not a method", ".yaml"]),
        (["validate", "missing.yaml"], ["cannot read missing.yaml"]),
        (["cache", "info", "--file", "missing.sqlite"], ["no such file: missing.sqlite"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in ("run", "settings", "demo", "runn", "validate") else "",
)
def test_what_cannot_be_used_is_said_plainly(arguments: list[str], words: list[str], call: Call) -> None:
    said = call(*arguments)
    assert said.code == 2
    assert said.out == ""
    assert [word for word in words if word not in said.err] == []
    assert len(said.err.splitlines()) <= 6
    assert "Traceback" not in said.err


@pytest.mark.usefixtures("no_model")
def test_faults_of_the_data_come_before_the_model(call: Call, place: Path, tiny: str) -> None:
    (place / "bad.jsonl").write_text(FAULTY)
    said = call("run", "dpo", "--model", tiny, "--data", "bad.jsonl")
    assert said.code == 2
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[0] == "error: bad.jsonl: 6 faults"
    assert lines[1].startswith("  row 1, column 'chosen': found None; ")
    assert lines[-1] == "  ... and 2 more"
    assert len(lines) == 6
    assert not (place / "runs").exists()


@pytest.mark.usefixtures("no_model")
def test_missing_data_names_what_is_there(call: Call, prefs: str, tiny: str) -> None:
    said = call("run", "dpo", "--model", tiny, "--data", "pref.jsonl")
    assert said.code == 2
    assert "no such file: pref.jsonl. Did you mean 'prefs.jsonl'?" in said.err


def test_a_missing_model_is_said(call: Call, prefs: str) -> None:
    said = call("run", "dpo", "--model", "runs/none/model", "--data", prefs)
    assert said.code == 2
    assert "'runs/none/model'" in said.err
    assert "Traceback" not in said.err


@pytest.mark.usefixtures("no_model")
def test_validate(call: Call, place: Path, tiny: str, prefs: str) -> None:
    (place / "config.yaml").write_text(yaml.safe_dump({"method": "dpo", "model": tiny, "data": prefs, "beta": 0.2}))
    said = call("validate", "config.yaml")
    assert said.code == 0
    assert said.out == "config.yaml: valid, ready to run with 'dpo'\n"
    assert "8 rows to train on" in said.err
    (place / "bad.jsonl").write_text(FAULTY)
    (place / "config.yaml").write_text(yaml.safe_dump({"method": "dpo", "model": tiny, "data": "bad.jsonl"}))
    assert call("validate", "config.yaml").code == 2
    (place / "config.yaml").write_text(yaml.safe_dump({"method": "kto", "model": tiny, "data": prefs, "batch_size": 1}))
    said = call("validate", "config.yaml")
    assert (said.code, "batch_size 1 is too small: 'kto' on 1 rank needs at least 2" in said.err) == (2, True)


def test_run_writes_the_model_that_it_names(call: Call, prefs: str, tiny: str) -> None:
    said = call("run", "dpo", "--model", tiny, "--data", prefs, "--batch-size", 4, "--set", "beta=0.25")
    assert said.code == 0
    assert said.out == "model: runs/dpo-001/model\n"
    assert (Path("runs/dpo-001/model") / "model.safetensors").is_file()
    assert yaml.safe_load(Path("runs/dpo-001/config.yaml").read_text())["beta"] == 0.25
    assert "step 2/2 | loss " in said.err
    for noise in ("Loading weights", "Writing model", "it/s]", "Warning", "warnings.warn"):
        assert noise not in said.err


def test_options_win_over_the_file_and_set_over_options(call: Call, place: Path, prefs: str, tiny: str) -> None:
    settings = {"method": "dpo", "model": tiny, "data": prefs, "beta": 0.3, "seed": 1, "max_steps": 9, "batch_size": 4}
    (place / "config.yaml").write_text(yaml.safe_dump(settings))
    said = call(
        "run", "config.yaml", "--max-steps", 3, "--seed", 2, "--set", "max-steps=1", "--set", "label_smoothing=1e-2"
    )
    assert said.code == 0
    written = yaml.safe_load(Path("runs/dpo-001/config.yaml").read_text())
    assert (written["max_steps"], written["seed"], written["beta"], written["label_smoothing"]) == (1, 2, 0.3, 0.01)


def test_set_takes_yaml_values(call: Call, prefs: str, tiny: str) -> None:
    given = ("--set", "lora={r: 2, alpha: 4}", "--set", "eval_every=null", "--set", "merge_adapter=true")
    said = call("run", "orpo", "--model", tiny, "--data", prefs, "--max-steps", 1, *given)
    assert said.code == 0
    assert yaml.safe_load(Path("runs/orpo-001/config.yaml").read_text())["lora"]["r"] == 2
    assert Path("runs/orpo-001/model/model.safetensors").is_file()


def test_a_taken_name_and_resume(call: Call, prefs: str, tiny: str) -> None:
    call("run", "dpo", "--model", tiny, "--data", prefs, "--name", "one", "--batch-size", 4, "--set", "save_every=1")
    again = call("run", "runs/one/config.yaml")
    assert again.code == 2
    assert "runs/one exists; continue it with --resume" in again.err
    resumed = call("run", "runs/one/config.yaml", "--resume")
    assert resumed.code == 0
    assert "resumed from runs/one/checkpoints/step-00000002" in resumed.err
    lost = call("run", "dpo", "--model", tiny, "--data", prefs, "--name", "two", "--resume")
    assert lost.code == 2
    assert "runs/two has no run to resume; runs in runs: one" in lost.err


@pytest.mark.usefixtures("no_model")
def test_a_file_cannot_grant_trust(call: Call, place: Path) -> None:
    (place / "config.yaml").write_text("method: dpo\nmodel: m\ndata: d\ntrust_remote_code: true\n")
    said = call("run", "config.yaml")
    assert said.code == 2
    assert "trust_remote_code" in said.err


def test_an_unexpected_error_is_a_few_lines_and_a_file(
    call: Call, prefs: str, tiny: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignkit.engine import Engine

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("something odd\nand more about it")

    monkeypatch.setattr(Engine, "run", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    said = call("run", "dpo", "--model", tiny, "--data", prefs)
    assert said.code == 1
    lines = said.err.splitlines()
    assert lines[0] == "error: RuntimeError: something odd"
    assert len(lines) == 3
    (report,) = place.glob("alignkit-error-*.txt")
    assert str(report) in lines[2]
    assert "Traceback (most recent call last)" in report.read_text()
    assert "and more about it" in report.read_text()


def test_an_error_on_another_rank_is_one_line(
    call: Call, place: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "bad.jsonl").write_text(FAULTY)
    monkeypatch.setenv("RANK", "1")
    said = call("run", "dpo", "--model", tiny, "--data", "bad.jsonl")
    assert said == Said(2, "", "rank 1: error: bad.jsonl: 6 faults\n")


def test_cache_commands(call: Call, place: Path) -> None:
    assert call("cache", "info") == Said(
        0, f"no cache at {place / 'cache.sqlite'} yet; the first run with a reference creates it\n", ""
    )
    assert not (place / "cache.sqlite").exists()
    fingerprints = ["a" * 64, "b" * 64]
    with LogpCache() as cache:
        for i, fingerprint in enumerate(fingerprints):
            cache.put({bytes([i, k]) * 16: torch.zeros(3) for k in range(2 + i)}, fingerprint)
    said = call("cache", "info")
    assert said.code == 0
    assert "values: 5\n" in said.out
    assert "reference aaaaaaaaaaaa: 2 values, 24 bytes, " in said.out
    assert call("cache", "verify") == Said(0, "5 values are intact, 0 were damaged and have been removed\n", "")
    unknown = call("cache", "clear", "--reference", "c")
    assert unknown.code == 2
    assert "aaaaaaaaaaaa" in unknown.err
    assert call("cache", "clear", "--reference", "aaaa").out == "2 values removed\n"
    assert call("cache", "clear", "--file", place / "cache.sqlite").out == "3 values removed\n"


def test_cache_verify_ends_with_1_where_values_were_damaged(call: Call, place: Path) -> None:
    import sqlite3

    with LogpCache() as cache:
        cache.put({b"k" * 32: torch.zeros(3)}, "a" * 64)
    with sqlite3.connect(place / "cache.sqlite") as db:
        db.execute("UPDATE logps SET value = x'00000000'")
    assert call("cache", "verify") == Said(1, "0 values are intact, 1 were damaged and have been removed\n", "")


def test_the_kernels_are_measured(call: Call, place: Path) -> None:
    arguments = ("--quick", "--only", "path1,sequence_sum", "--threads", "1", "--json", "kernels.json")
    said = call("bench", "kernels", *arguments)
    assert said.code == 0, said.err
    found = json.loads((place / "kernels.json").read_text())
    assert found["machine"]["threads"] == 1
    assert {"path1", "sequence_sum"} == {row["case"] for row in found["rows"]}
    assert "x eager" in said.out
    assert "without torch.compile: " in said.out


def test_a_benchmark_that_is_not_there_is_named_with_those_that_are(call: Call) -> None:
    said = call("bench", "kernels", "--only", "path5")
    assert said.code == 2
    assert "unknown case 'path5'; choose from path1, " in said.err


def test_the_module_is_the_command(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alignkit", "run", "dop"], capture_output=True, text=True, cwd=place, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no method is called 'dop'")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_make_one_run(place: Path, prefs: str, tiny: str) -> None:
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "alignkit"]
    arguments = ["run", "dpo", "--model", tiny, "--data", prefs, "--batch-size", "4", "--set", "device=cpu"]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, cwd=place, check=False, env=alone)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "model: runs/dpo-001/model\n"
    assert [p.name for p in (place / "runs").iterdir()] == ["dpo-001"]
    steps = [json.loads(line)["step"] for line in (place / "runs/dpo-001/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--set", "beta=inf"), "beta: Input should be a finite number"),
        (("--set", "adam_betas=[2, 3]"), "adam_betas.0: Input should be less than 1"),
        (("--seed", 2**32), "seed: Input should be less than or equal to 4294967295"),
        (("--set", "tokenizer=7"), "tokenizer: give a folder, a hub name, or a loaded object (given: 7)"),
        (("--output", "prefs.jsonl"), "cannot create a folder in prefs.jsonl: File exists; choose another --output"),
    ],
)
def test_values_that_only_a_library_would_have_refused(
    call: Call, prefs: str, tiny: str, given: tuple[object, ...], words: str
) -> None:
    said = call("run", "dpo", "--model", tiny, "--data", prefs, *given)
    assert said.code == 2
    assert words in said.err


def test_a_run_that_could_not_begin_leaves_no_folder(call: Call, prefs: str, tiny: str) -> None:
    said = call("run", "dpo", "--model", tiny, "--data", prefs, "--set", "attention=flex_attention")
    assert said.code == 2
    assert "attention: flex_attention needs a GPU" in said.err
    assert list(Path("runs").iterdir()) == []


def test_a_tracker_that_is_not_installed_is_refused(call: Call, prefs: str, tiny: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("alignkit.engine.assemble.get_available_trackers", list)
    said = call("run", "dpo", "--model", tiny, "--data", prefs, "--set", "trackers=tensorboard")
    assert said.code == 2
    assert "tracker 'tensorboard' is not installed; try: pip install tensorboard" in said.err


def test_validate_takes_files_of_settings_only(call: Call) -> None:
    said = call("validate", "dpo")
    assert (said.code, said.out) == (2, "")
    assert "'dpo' is not a config; a file of settings must end in .yaml or .yml" in said.err


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("prompt=question", {"prompt": "question"}),
        ("prompt=question, chosen=a b", {"prompt": "question", "chosen": "a b"}),
        ("{prompt: question}", {"prompt": "question"}),
        (None, None),
    ],
)
def test_names_of_columns(text: str | None, names: dict[str, str] | None) -> None:
    assert console.columns_of(text) == names


@pytest.mark.parametrize("text", ["prompt", "prompt=", "=question", "prompt=a,prompt=b", "prompt=a,b", "[a]", "{a: 1}"])
def test_what_are_no_names_of_columns(text: str) -> None:
    with pytest.raises(ConfigError, match="--columns needs names such as prompt=question"):
        console.columns_of(text)


def test_every_command_that_reads_rows_has_the_option_columns() -> None:
    root = typer.main.get_command(cli.app)
    commands = {"run", "validate", "audit", "plan", "recommend", "init", "compare", "best-of-n"}
    every = [root.commands[name] for name in commands]
    every += [root.commands["data"].commands["show"], root.commands["inspect"].commands["pair"]]
    helps = {option.help for one in every for option in one.params if option.name == "columns"}
    assert all(any(option.name == "columns" for option in one.params) for one in every)
    assert helps == {"Names of columns, such as prompt=question (ours=yours)"}


def test_the_error_names_the_option_that_is_missing(call: Call, place: Path, tiny: str) -> None:
    rows = [{"Problem": f"q{i}", "better": f"a{i}", "worse": f"b{i}"} for i in range(8)]
    (place / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = call("run", "dpo", "--model", tiny, "--data", "mine.jsonl")
    option = "--columns prompt=Problem,chosen=better,rejected=worse"
    assert f"Try {option} (in a file, columns: {{prompt: Problem, chosen: better, rejected: worse}})" in said.err
    (place / "config.yaml").write_text(yaml.safe_dump({"method": "dpo", "model": tiny, "data": "mine.jsonl"}))
    assert call("validate", "config.yaml", *option.split()).code == 0
    (place / "mine.jsonl").write_text('{"odd": "q"}\n')
    assert (
        "Map your columns: --columns prompt=<yours>" in call("run", "dpo", "--model", tiny, "--data", "mine.jsonl").err
    )


def test_the_demo_takes_a_method_as_it_looks(call: Call) -> None:
    said = call("demo", "grop").err
    assert "no method is called 'grop'" in said
    assert "Did you mean 'grpo'?" in said
    assert "two methods given, 'grpo' and --method dpo" in call("demo", "grpo", "--method", "dpo").err
