"""Chains of methods: what a stage takes from the earlier ones, what is refused beforehand, and resuming anywhere."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from operator import eq
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from alignkit import cli
from alignkit.cli import console
from alignkit.engine import Engine
from alignkit.engine.loop import Loop
from alignkit.errors import AlignkitError, ConfigError, DataError, ModelError
from alignkit.runs import pipeline
from alignkit.runs.folder import read_metrics
from alignkit.runs.pipeline import FILE, PipelineResult, read_pipeline, run_pipeline, table
from alignkit.runs.stages import check, resolve
from helpers import make_rows

SHORT: dict[str, Any] = {"sampling": {"max_new_tokens": 6}}
TIMED = ("tokens_per_second", "seconds/")
Stages = list[dict[str, Any]]
SFT: dict[str, Any] = {"method": "sft"}
DPO: dict[str, Any] = {"method": "dpo"}
RM: dict[str, Any] = {"method": "reward", "name": "rm"}
PM: dict[str, Any] = {"method": "reward", "name": "pm", "pairwise": True}
PPO: dict[str, Any] = {"method": "ppo"}
NASH: dict[str, Any] = {"method": "nash"}
ADAPTER: dict[str, Any] = {"lora": 2, "merge_adapter": False}
BOTH = {"ensemble": ["@rm", "@pm"]}
FAULTY = [{"prompt": "a", "chosen": None, "rejected": "b"}]


@pytest.fixture
def shared(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """What all stages of a short pipeline share."""
    steps = {"max_steps": 3, "save_every": 1}
    return {**settings, **steps, "learning_rate": 1e-3, "data": make_rows("pairs", 12), "name": "rlhf"}


@pytest.fixture
def rlhf() -> Stages:
    return [{"method": "sft"}, {"method": "reward"}, {"method": "ppo", "batch_size": 3, "epochs_per_batch": 2}]


def chain(stages: Stages, shared: dict[str, Any], **more: Any) -> PipelineResult:
    sampled = any(isinstance(s, dict) and s.get("method") in ("ppo", "grpo", "nash") for s in stages)
    return run_pipeline(Engine, stages, {**(SHORT if sampled else {}), **shared, **more})


def configs(result: PipelineResult) -> list[dict[str, Any]]:
    return [yaml.safe_load((Path(s.folder) / "config.yaml").read_text()) for s in result.stages]


def trained(folder: Path) -> dict[str, Any]:
    """Weights and metrics of every stage."""
    found: dict[str, Any] = {}
    for stage in sorted(p for p in folder.iterdir() if p.is_dir()):
        found[stage.name] = load_file(stage / "model/model.safetensors")
        lines = read_metrics(stage)
        found[f"{stage.name} lines"] = [{k: v for k, v in x.items() if not k.startswith(TIMED)} for x in lines]
    return found


def same(one: Path, other: Path) -> None:
    a, b = trained(one), trained(other)
    assert a.keys() == b.keys()
    for key in a:
        if key.endswith("lines"):
            assert a[key] == b[key]
        else:
            assert all(torch.equal(a[key][n], b[key][n]) for n in a[key]), key


@contextmanager
def interrupted(method: str, at: int) -> Iterator[None]:
    """Fail where this method would begin its step `at`."""
    original = Loop.step

    def step(self: Loop, number: int, total: int) -> dict[str, float]:
        if self.state.method.name == method and number == at:
            raise OSError("the machine went away")
        return original(self, number, total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", step)
        with pytest.raises(OSError, match="went away"):
            yield


# ------------------------------------------------------------------------------------------------------ what runs


def test_sft_reward_model_ppo(shared: dict[str, Any], rlhf: Stages) -> None:
    result = chain(rlhf, shared)
    folder = shared["output"] / "rlhf"
    assert result.folder == folder
    assert [Path(s.folder).name for s in result.stages] == ["1-sft", "2-reward", "3-ppo"]
    sft, reward, ppo = configs(result)
    assert sft["model"] == shared["model"]
    assert reward["model"] == ppo["model"] == str(folder / "1-sft/model")
    assert ppo["reward"] == str(folder / "2-reward/model")
    assert (ppo["batch_size"], sft["batch_size"]) == (3, 4)
    assert AutoModelForSequenceClassification.from_pretrained(folder / "2-reward/model").config.num_labels == 1
    # the stages are the runs that they would be alone
    alone = {k: v for k, v in shared.items() if k not in ("name", "model")}
    model = Engine().run("reward", **alone, model=reward["model"], name="alone").folder / "model/model.safetensors"
    weights = load_file(folder / "2-reward/model/model.safetensors")
    assert all(torch.equal(t, weights[n]) for n, t in load_file(model).items())


def test_a_row_for_each_stage(shared: dict[str, Any], rlhf: Stages) -> None:
    result = chain(rlhf, shared, eval_fraction=0.25)
    kept = json.loads((result.folder / "summary.json").read_text())["stages"]
    assert [(s["stage"], s["method"], s["steps"]) for s in kept] == [
        ("sft", "sft", 3),
        ("reward", "reward", 3),
        ("ppo", "ppo", 3),
    ]
    last = read_metrics(Path(result.stages[1].folder))[-1]
    assert result.stages[1].metrics == {
        k: last[k] for k in ("eval/loss", "eval/rewards/accuracy", "eval/rewards/margin")
    }
    assert {"eval/kl", "eval/reward/mean"} <= result.stages[2].metrics.keys()
    assert all(s.seconds is not None and s.seconds > 0 for s in result.stages)
    shown = table(result)
    assert [c.header for c in shown.columns] == [
        "stage", "method", "steps", "seconds",
        "reward/mean", "rewards/accuracy", "rewards/margin", "loss", "kl",
        "folder",
    ]  # fmt: skip
    accuracy = list(shown.columns[5].cells)
    assert accuracy == ["-", f"{last['eval/rewards/accuracy']:.4g}", "-"]


def test_from_the_command_line(
    shared: dict[str, Any], write_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    given = {k: str(v) if isinstance(v, Path) else v for k, v in shared.items() if k != "name"}
    given |= {"data": write_rows(shared["data"]), "max_steps": 1, "stages": [SFT, DPO]}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(given))
    monkeypatch.setattr(console, "show_log", lambda: None)
    command = typer.main.get_command(cli.app)
    command(["pipeline", str(tmp_path / "p.yaml"), "--name", "two"], standalone_mode=False)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in said[1:3]] == [["sft", "sft", "1"], ["dpo", "dpo", "1"]]
    assert [line.split()[-1] for line in said[1:]] == ["1-sft", "2-dpo", str(shared["output"] / "two")]
    with pytest.raises(ConfigError, match="two exists; continue it with --resume, or choose another --name"):
        command(["pipeline", str(tmp_path / "p.yaml"), "--name", "two"], standalone_mode=False)
    command(["pipeline", str(shared["output"] / "two" / FILE), "--resume"], standalone_mode=False)


def test_a_pairwise_reward_model_judges_and_another_one_by_bradley_terry(shared: dict[str, Any]) -> None:
    stages = [
        {"method": "reward", "name": "rm"},
        {"method": "reward", "name": "pm", "pairwise": True},
        {"method": "nash"},
    ]
    shared["max_steps"] = 1
    folder = shared["output"] / "rlhf"
    *_, nash = configs(chain(stages, shared))
    assert nash["judge"] == str(folder / "2-pm/model")
    assert nash["model"] == shared["model"]  # no policy was trained before
    without = resolve([stages[0], stages[2]], {"model": shared["model"], "data": shared["data"]})
    assert without[1].settings["judge"] == {"bradley_terry": "@rm"}
    scored = resolve([*stages[:2], {"method": "grpo"}], {"model": shared["model"], "data": shared["data"]})
    assert scored[2].settings["reward"] == "@rm"


def test_a_name_stands_for_a_folder_anywhere() -> None:
    stages = [
        {"method": "sft"},
        {"method": "dpo", "model": "base"},
        {"method": "reward", "name": "a", "model": "@sft"},
        {"method": "ppo", "reward": {"ensemble": ["@a", {"use": "@a", "name": "b"}], "combine": "min"}, "critic": "@a"},
    ]
    *_, ppo = resolve(stages, {"model": "base", "data": [{"prompt": "@nobody"}]})
    filled = ppo.filled({"sft": "S", "dpo": "D", "a": "A"})
    assert filled["model"] == "D"
    assert filled["critic"] == "A"
    assert filled["reward"] == {"ensemble": ["A", {"use": "A", "name": "b"}], "combine": "min"}
    assert filled["data"] == [{"prompt": "@nobody"}]


def test_a_shared_reward_goes_to_the_stages_that_need_one() -> None:
    shared = {"model": "base", "data": [], "reward": "brevity", "judge": "llm"}
    sft, grpo, nash = resolve([{"method": m} for m in ("sft", "grpo", "nash")], shared)
    assert [s.config.reward for s in (sft, grpo, nash)] == [None, "brevity", None]
    assert [s.config.judge for s in (sft, grpo, nash)] == [None, None, "llm"]


def test_a_setting_of_a_mapping_can_be_named_alone(shared: dict[str, Any]) -> None:
    given = {**shared, "lora": {"r": 6}, "lora.alpha": 0.7, "max_steps": 1}
    stages: Stages = [{"method": "sft", "lora.rslora": True}, {"method": "dpo", "lora.alpha": 0.5}]
    result = chain(stages, given)
    lora = [config["lora"] for config in configs(result)]
    assert [(a["r"], a["alpha"], a["rslora"]) for a in lora] == [(6, 0.7, True), (6, 0.5, False)]
    written = read_pipeline(result.folder / FILE)["stages"]
    assert [stage["lora"] for stage in written] == lora
    with pytest.raises(ConfigError, match=r"dpo: lora was .*0\.5.*, is .*0\.6"):
        chain([stages[0], {"method": "dpo", "lora.alpha": 0.6}], given, resume=True)


def test_a_stages_own_mapping_wins_over_a_shared_name_in_it() -> None:
    stages = [{"method": "sft", "sampling": {"temperature": 0.5}}, {"method": "ppo", "reward.use": "alignkit.x:y"}]
    shared = {"model": "base", "data": [], "sampling.temperature": 0.7, "reward": "brevity"}
    sft, ppo = resolve(stages, shared)
    assert sft.config.sampling.temperature == 0.5
    assert ppo.config.sampling.temperature == 0.7
    assert ppo.config.reward == {"use": "alignkit.x:y"}


def test_adapters_are_merged_unless_a_stage_says_otherwise() -> None:
    stages = [{"method": "sft"}, {"method": "dpo", "merge_adapter": False}, {"method": "ipo", "lora": None}]
    resolved = resolve(stages, {"model": "base", "data": [], "lora": 4})
    assert [s.config.merge_adapter for s in resolved] == [True, False, False]


@pytest.mark.slow
def test_with_adapters(shared: dict[str, Any], rlhf: Stages) -> None:
    result = chain(rlhf, shared, lora=2, max_steps=1)
    assert all((Path(s.folder) / "model/model.safetensors").is_file() for s in result.stages)


# --------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(("method", "at"), [("sft", 2), ("reward", 0), ("reward", 1), ("ppo", 2)])
def test_a_pipeline_that_was_interrupted_anywhere_ends_as_the_uninterrupted_one(
    method: str, at: int, shared: dict[str, Any], rlhf: Stages
) -> None:
    whole = chain(rlhf, shared, name="whole")
    with interrupted(method, at):
        chain(rlhf, shared, name="parts")
    torch.manual_seed(99)  # what the process drew meanwhile must not matter
    parts = chain(rlhf, shared, name="parts", resume=True)
    same(parts.folder, whole.folder)
    assert [s.metrics for s in parts.stages] == [s.metrics for s in whole.stages]


def test_a_finished_stage_is_not_done_again(shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [SFT, DPO]
    first = chain(stages, shared)
    monkeypatch.setattr(Loop, "train", lambda self: pytest.fail("a finished stage ran again"))
    again = chain(stages, shared, resume=True)
    assert again == first
    (first.folder / "summary.json").write_text(
        json.dumps(json.loads((first.folder / "summary.json").read_text()) | {"stages": []})
    )
    assert [s.seconds for s in chain(stages, shared, resume=True).stages] == [None, None]


def test_how_to_go_on_is_said(shared: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    stages = [SFT, DPO]
    with interrupted("dpo", 1):
        chain(stages, shared)
    path = shared["output"] / "rlhf" / FILE
    assert f"the pipeline is not finished; continue with: alignkit pipeline {path} --resume" in caplog.text
    with pytest.raises(ConfigError, match="exists; continue it with --resume"):
        chain(stages, shared)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([{"method": "sft"}, {"method": "dpo", "beta": 0.2}], r"dpo: beta was 0\.1, is 0\.2"),
        ([{"method": "sft", "seed": 3}, {"method": "dpo", "beta": 0.1}], r"sft: seed was None, is 3"),
        ([{"method": "dpo", "beta": 0.1}], r"stages was 'sft, dpo', is 'dpo'"),
        ([{"method": "sft"}, {"method": "simpo", "name": "dpo", "beta": 0.1}], r"dpo: method was 'dpo', is 'simpo'"),
    ],
)
def test_other_stages_are_refused(changed: Stages, words: str, shared: dict[str, Any]) -> None:
    shared["max_steps"] = 1
    chain([{"method": "sft"}, {"method": "dpo", "beta": 0.1}], shared)
    with pytest.raises(ConfigError, match=rf"rlhf was started with other settings: {words}"):
        chain(changed, shared, resume=True)
    chain([{"method": "sft"}, {"method": "dpo", "beta": 0.1, "log_every": 2}], shared, resume=True)  # changes no result


def test_the_file_in_the_folder_runs_and_an_edit_of_it_is_noticed(shared: dict[str, Any], write_rows: Any) -> None:
    shared |= {"max_steps": 1, "data": write_rows(make_rows("pairs", 12))}
    stages = [{"method": "reward", "name": "rm"}, {"method": "orpo", "lambda": 0.3}]
    first = chain(stages, shared)
    written = read_pipeline(first.folder / FILE)
    assert [s["name"] for s in written["stages"]] == ["rm", "orpo"]
    assert written["stages"][1]["lambda_"] == 0.3
    again = run_pipeline(Engine, written.pop("stages"), {**written, "name": "again"})
    same(again.folder, first.folder)
    edited = read_pipeline(first.folder / FILE)
    edited["stages"][1]["lambda_"] = 0.4
    (first.folder / FILE).write_text(yaml.safe_dump(edited))
    with pytest.raises(ConfigError, match=r"orpo: lambda_ was 0\.3, is 0\.4"):
        run_pipeline(Engine, edited.pop("stages"), {**edited, "resume": True})


@pytest.mark.slow
def test_a_real_sigkill_in_the_second_stage_is_survived(
    shared: dict[str, Any], rlhf: Stages, write_rows: Any, tmp_path: Path
) -> None:
    output = shared.pop("output")
    values = {k: str(v) if isinstance(v, Path) else v for k, v in shared.items() if k != "name"}
    values |= {"data": write_rows(shared["data"]), "max_steps": 16, "stages": rlhf, "save_every": 2} | SHORT
    values["stages"][2]["max_steps"] = 2
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    command = [
        sys.executable,
        "-m",
        "alignkit",
        "pipeline",
        str(tmp_path / "p.yaml"),
        "--output",
        str(output),
        "--name",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.run([*command, "whole"], capture_output=True, text=True, env=env, timeout=240)
    assert whole.returncode == 0, whole.stderr
    assert "2-reward" in whole.stdout
    process = subprocess.Popen([*command, "parts"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    deadline = time.monotonic() + 120
    while not (output / "parts/2-reward/checkpoints/step-00000004").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "parts/2-reward/model").exists()
    done = subprocess.run([*command, "parts", "--resume"], capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "1-sft" not in done.stderr
    same(output / "parts", output / "whole")


# -------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("stages", "error", "words"),
    [
        ([], ConfigError, r"`stages` must be a list of settings, each with its `method`, got \[\]"),
        ("sft", ConfigError, "`stages` must be a list of settings, each with its `method`, got 'sft'"),
        ([{"beta": 1}], ConfigError, "stage 1 has no `method`; installed: .*sft"),
        ([{"method": "sft"}, {"method": "sft"}], ConfigError, "two stages are called 'sft'"),
        (
            [{"method": "sft"}, {"method": "dop"}],
            AlignkitError,
            "stage 'dop': no method is called 'dop'.*Did you mean 'dpo'",
        ),
        ([{"method": "dpo", "bta": 1}], ConfigError, "stage 'dpo': unknown setting 'bta'. Did you mean 'beta'"),
        ([{"method": "dpo", "name": "a/b"}], ConfigError, "stage 'a/b': name: must have only letters"),
        ([{"method": "dpo", "output": "x"}], ConfigError, "stage 'dpo': `output` belongs to the whole pipeline"),
        (
            [SFT, DPO | {"model": "@stf"}],
            ConfigError,
            "stage 'dpo': model: '@stf' is not an earlier stage.*Did you mean 'sft'",
        ),
        (
            [DPO | {"model": "@sft"}, SFT],
            ConfigError,
            "stage 'dpo': model: '@sft' is not an earlier .*Earlier stages: none",
        ),
        (
            [{"method": "ppo", "reward": {"use": "@rm"}}],
            ConfigError,
            "stage 'ppo': reward: '@rm' is not an earlier stage",
        ),
        ([SFT, {"method": "ppo"}], ConfigError, "stage 'ppo': 'ppo' needs a reward"),
        (
            [{"method": "ppo", "reward": "brevty"}],
            ConfigError,
            "stage 'ppo': no reward is called 'brevty'. Did you mean",
        ),
        ([SFT, DPO | {"data": "pref.jsonl"}], DataError, "stage 'dpo': data: .*pref.jsonl"),
        ([SFT, DPO | {"eval_data": FAULTY}], DataError, "stage 'dpo': eval_data: .*(?s:.*)row 1, column 'chosen'"),
        (
            [SFT, DPO | {"model": "runs/none/model"}],
            ModelError,
            "stage 'dpo': model: the folder 'runs/none/model' does not exist",
        ),
        ([SFT, DPO | {"reference": "adapter-off"}], ConfigError, "stage 'dpo': .*adapter-off needs"),
        (
            [SFT, PPO | {"reward": "@sft"}],
            ConfigError,
            "stage 'ppo': reward: '@sft' is trained by 'sft', which does not train a reward model",
        ),
        ([PM, PPO | {"reward": "@pm"}], ConfigError, "stage 'ppo': reward: '@pm' compares two .*without `pairwise`"),
        ([RM, PM, PPO | {"reward": BOTH}], ConfigError, "stage 'ppo': reward: '@pm' compares two answers"),
        ([RM, NASH | {"judge": "@rm"}], ConfigError, "stage 'nash': judge: '@rm' scores .*{bradley_terry: \"@rm\"}"),
        ([PM, NASH | {"judge": {"bradley_terry": "@pm"}}], ConfigError, "stage 'nash': judge: '@pm' compares two"),
        ([SFT, NASH | {"judge": {"use": "@sft"}}], ConfigError, "stage 'nash': judge: '@sft' is trained by 'sft'"),
        (
            [RM, DPO | {"model": "@rm"}],
            ConfigError,
            "stage 'dpo': model: '@rm' is a reward model, but 'dpo' trains a policy",
        ),
        (
            [RM, PPO | {"reward": {"use": "@rm", "max": 1}}],
            ConfigError,
            "stage 'ppo': reward '1-rm' has no option",
        ),
        (
            [RM | ADAPTER, PPO],
            ConfigError,
            "stage 'ppo': reward: '@rm' saves an adapter only.*`merge_adapter: true`",
        ),
        ([SFT, {**DPO, 7: 1}], ConfigError, "stage 'dpo': unknown setting '7'"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(
    stages: Any, error: type[AlignkitError], words: str, shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shared["output"].parent)
    with pytest.raises(error, match=words):
        chain(stages, shared)
    assert not shared["output"].exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"beta": 0.1}, "unknown setting 'beta' next to `stages`.*Settings of a method belong in its stage"),
        ({"stagse": []}, "unknown setting 'stagse' next to `stages`. Did you mean 'stages'"),
        ({"method": "dpo"}, "unknown setting 'method' next to `stages`"),
    ],
)
def test_only_what_every_stage_knows_is_shared(setting: dict[str, Any], words: str, shared: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=words):
        chain([{"method": "dpo"}], shared | setting)


def test_a_folder_without_a_model_is_refused(shared: dict[str, Any], tiny: str, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / file).write_bytes((Path(tiny) / file).read_bytes())
    with pytest.raises(ModelError, match=r"stage 'dpo': model: .*half' holds no model"):
        chain([{"method": "sft"}, {"method": "dpo", "model": str(tmp_path / "half")}], shared)


@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_pipeline_that_is_given_as_a_run_is_named(command: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("model: base\nstages: [{method: sft}]\n")
    with pytest.raises(
        ConfigError, match=rf"has `stages`, so it is a pipeline; try: alignkit pipeline {re.escape(str(path))}"
    ):
        typer.main.get_command(cli.app)([command, str(path)], standalone_mode=False)


def test_a_stage_in_a_file_cannot_grant_trust(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("stages: [{method: sft, trust_remote_code: true}]\n")
    with pytest.raises(ConfigError, match="sets trust_remote_code"):
        read_pipeline(path)


def test_several_processes_need_a_name(shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="set the pipeline's `name`"):
        chain([{"method": "dpo"}], {k: v for k, v in shared.items() if k != "name"})


def test_an_error_of_a_run_names_its_stage(shared: dict[str, Any]) -> None:
    def broken(completions: list[str]) -> list[float]:
        raise ValueError("no verdict today")

    with pytest.raises(AlignkitError, match=r"stage 'grpo': reward 'broken' failed on row .*no verdict today"):
        chain([{"method": "sft"}, {"method": "grpo", "reward": broken, "group_size": 2}], shared)


# ------------------------------------------------------------------------------------------------------- the page

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "pipeline.md").read_text(encoding="utf-8")


def test_the_yaml_on_the_page_is_taken(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny)
    for name, kind in (("answers", "text"), ("prefs", "pairs"), ("prompts", "text")):
        write_rows(make_rows(kind, 8), f"{name}.jsonl")
    rlhf, ensemble = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    stages = resolve(rlhf.pop("stages"), rlhf)
    assert [s.settings["model"] for s in stages] == ["base", "@sft", "@sft"]
    assert stages[2].config.reward == "@reward"
    check(stages)
    *models, grpo, dpo = resolve(ensemble.pop("stages"), ensemble)
    check([*models, grpo, dpo])
    assert (grpo.settings["model"], dpo.settings["model"]) == ("base", "base")


def test_the_python_on_the_page_runs(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: Any, settings: dict[str, Any]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    called = ast.parse(code).body[-2]
    assert isinstance(called, ast.Assign)
    assert isinstance(called.value, ast.Call)
    assert ast.unparse(called.value.func) == "Engine(model='base').pipeline"
    stages = ast.literal_eval(ast.parse(code).body[-3].value)
    given = {str(k.arg): ast.literal_eval(k.value) for k in called.value.keywords}
    engine = Engine(**{**settings, "model": tiny, "max_steps": 3})
    result = engine.pipeline(stages, **{**given, "data": make_rows("pairs", 8), "max_steps": 1})
    assert [(s.method, s.steps) for s in result.stages] == [("sft", 1), ("dpo", 1)]
    assert result.folder == settings["output"] / "two"


def test_an_engines_reward_goes_to_the_stages_that_need_one(shared: dict[str, Any]) -> None:
    engine = Engine(**shared, **SHORT, reward={"use": "brevity", "limit": 3})
    result = engine.pipeline([SFT, {"method": "grpo", "group_size": 2}], max_steps=1)
    assert [config["reward"] for config in configs(result)] == [None, {"use": "brevity", "limit": 3}]


def test_addresses_of_servers_may_change_where_a_pipeline_is_resumed_and_the_backend_may_not() -> None:
    def stages(**rollout: Any) -> list[dict[str, Any]]:
        return [{"name": "one", "method": "grpo", "rollout": rollout}]

    before = stages(backend="vllm", urls=["http://a:1"])
    assert eq(*pipeline._comparable(before, stages(backend="vllm", urls=["http://b:1"])))
    assert not eq(*pipeline._comparable(before, stages(backend="generate", urls=["http://a:1"])))
