"""Health over real runs and their folders: killed and resumed, replayed later, with other limits, damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import alignkit
from alignkit.alarms import Health
from alignkit.cli.app import app
from alignkit.engine.loop import Loop
from alignkit.errors import ConfigError, DataError
from alignkit.insight.health import Watch, replay
from alignkit.runs.folder import read_lines, read_metrics
from helpers import make_rows

TIMED = ("tokens_per_second", "seconds/")


def length(lengths: list[int]) -> list[float]:
    return [float(n) for n in lengths]


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def consonants(completions: list[str]) -> list[float]:
    return [-value for value in vowels(completions)]


@pytest.fixture
def sick(settings: dict[str, Any]) -> dict[str, Any]:
    """A run whose limits are so narrow that alarms are raised early, late, and by evaluations."""
    return settings | {
        "data": [{"prompt": r["prompt"]} for r in make_rows("prompts", 24)],
        "eval_fraction": 0.25,
        "eval_every": 2,
        "reward": length,
        "sampling": {"max_new_tokens": 6},
        "group_size": 2,
        "max_steps": 10,
        "save_every": 3,
        "health": {"window": 2, "kl_high": 0.05, "entropy": 0.999, "truncation": 0.01, "grad_spike": 1.1},
    }


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    original = Loop.step

    def dies(self: Loop, number: int, total: int) -> dict[str, float]:
        if number == step:
            raise KeyboardInterrupt
        return original(self, number, total)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            yield


def alarms(folder: Path) -> list[dict[str, Any]]:
    return list(read_lines(folder / "alarms.jsonl"))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in read_metrics(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("log_every", [1, 2])
def test_a_killed_and_resumed_run_has_the_alarms_of_one_that_was_not(
    log_every: int, sick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sick |= {"log_every": log_every}
    whole = alignkit.run("grpo", name="whole", **sick)
    with killed_at(8, monkeypatch):
        alignkit.run("grpo", name="parts", **sick)
    parts = alignkit.run("grpo", name="parts", resume=True, **sick)
    assert alarms(parts.folder) == alarms(whole.folder)
    assert lines(parts.folder) == lines(whole.folder)
    reported = alarms(whole.folder)
    assert {a["name"] for a in reported} >= {"kl_high", "truncation"}
    assert len({a["step"] for a in reported}) > 1
    assert [a["name"] for a in reported] == [
        n[6:] for line in lines(whole.folder) for n in line if n.startswith("alarm/")
    ]


def test_replaying_a_folder_reports_what_the_run_reported(sick: dict[str, Any]) -> None:
    folder = alignkit.run("grpo", **sick).folder
    reported = [(a["step"], a["name"], a["value"], a["message"], a["remedy"]) for a in alarms(folder)]
    assert reported
    assert [(step, a.name, a.value, a.message, a.remedy) for step, a in replay(folder)] == reported
    assert replay(folder, {name: None for _, name, *_ in reported}) == []
    without = alignkit.run("grpo", **sick | {"health": {"enabled": False}}).folder
    assert alarms(without) == []
    assert [a.name for _, a in replay(without, sick["health"])] == [name for _, name, *_ in reported]


def test_a_reward_of_weight_0_is_logged_trains_nothing_and_may_fall(sick: dict[str, Any]) -> None:
    sick |= {"health": {"window": 2}, "max_steps": 8, "group_size": 8, "beta": 0.001, "reward": vowels}
    plain = alignkit.run("grpo", **sick)
    both = alignkit.run("grpo", **sick | {"reward": [vowels, {"use": consonants, "weight": 0}]})
    for a, b in zip(lines(plain.folder), lines(both.folder), strict=True):
        start = "eval/" if "eval/loss" in a else ""
        assert a[f"{start}loss"] == b[f"{start}loss"]
        assert b[f"{start}reward/consonants/mean"] == pytest.approx(-b[f"{start}reward/mean"])
    assert "reward_held_out" in [a["name"] for a in alarms(both.folder)]
    assert "reward_held_out" not in [a["name"] for a in alarms(plain.folder)]


# ------------------------------------------------------------------------------------------------ made-up folders


def write(folder: Path, metrics: list[dict[str, Any]], completions: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    if completions is not None:
        (folder / "completions.jsonl").write_text("".join(json.dumps(c) + "\n" for c in completions))
    return folder


def completion_lines(step: int, training: bool = True, reward: float = 0.5) -> list[dict[str, Any]]:
    about = {"step": step, "training": training, "completion": "a b c", "reward": reward}
    return [{**about, "row": i // 2} for i in range(8)]


@given(st.integers(0, 12), st.sets(st.integers(1, 12)), st.sets(st.integers(0, 12)))
@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_watch_that_begins_anywhere_goes_on_as_one_from_the_beginning(
    tmp_path: Path, begins: int, unlogged: set[int], evaluated: set[int]
) -> None:
    """Also where steps were not logged and evaluations stand between them."""
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    metrics, completions = [], []
    for step in range(13):
        if step:
            completions += completion_lines(step, reward=float(step % 3 == 0))
            if step not in unlogged:
                metrics.append({"step": step, "kl": step * 3.0})
        if step in evaluated:
            completions += completion_lines(step, False)
            metrics.append({"step": step, "eval/kl": step * 4.0})
    folder, limits = write(tmp_path / "run", metrics, completions), Health(window=2, zero_variance=0.5)
    whole = Watch(folder, limits, {})
    expected = [whole.see(m["step"], m) for m in metrics]
    write(folder, metrics[:begins])
    later = Watch.of(folder, {"health": limits.model_dump()})
    assert [later.see(m["step"], m) for m in metrics[begins:]] == expected[begins:]


def test_completions_belong_to_their_line_alone(tmp_path: Path) -> None:
    """The dead groups of steps that were not logged, or of evaluations, are not those of a logged step."""
    completions = [
        *completion_lines(0, False),
        *completion_lines(1, reward=1.0),
        *completion_lines(2, reward=0.0),
        *completion_lines(3, reward=1.0),
    ]
    completions[8]["reward"] = 0.0  # or a reward of 1 would be all that was ever seen
    folder = write(tmp_path / "run", [{"step": 1, "kl": 0.0}, {"step": 3, "kl": 0.0}], completions)
    assert replay(folder, {"window": 1}) == []  # solved, both
    folder = write(tmp_path / "run", [{"step": s, "kl": 0.0} for s in (1, 2, 3)], completions)
    assert [(step, a.name) for step, a in replay(folder, {"window": 1})] == [(2, "zero_variance")]


def test_a_step_that_was_not_finite_is_passed_over(tmp_path: Path) -> None:
    metrics = [{"step": i, "kl": None if i == 5 else 20.0, "grad_norm": None} for i in range(1, 12)]
    assert [(step, a.name) for step, a in replay(write(tmp_path / "run", metrics))] == [(9, "kl_high")]


@pytest.mark.parametrize("cut", ['{"step": 9, "kl"', '{"step": 9, "kl": 1}\n{"ste'])
def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path, cut: str) -> None:
    folder = write(tmp_path / "run", [{"step": i, "kl": 20.0} for i in range(1, 9)], completion_lines(1))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(cut)
    with (folder / "completions.jsonl").open("a") as file:
        file.write('{"step": 2, "trai')
    assert [a.name for _, a in replay(folder)] == ["kl_high"]


# ----------------------------------------------------------------------------------------------- the command line


def health(*words: Any) -> tuple[int, str]:
    ran = CliRunner().invoke(app, ["health", *map(str, words)])
    if isinstance(ran.exception, (ConfigError, DataError)):
        return 2, str(ran.exception)
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran.exit_code, ran.output


def test_the_command_prints_a_runs_alarms(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [{"step": i, "kl": 16.0, "lr": 1.0} for i in range(1, 10)])
    code, text = health(folder)
    assert code == 0
    head, line = text.strip().splitlines()
    assert head.split() == ["step", "alarm", "what", "to", "do"]
    assert line.startswith("8     kl_high  the KL to the reference is 16 nats a sequence, above 15  Lower `")
    assert health(folder, "--set", "kl_high=20") == health(folder, "--set", "health.kl_high=20")
    assert health(folder, "--set", "kl_high=20")[1].strip() == f"{folder}: no alarms"
    assert health(folder, "--json", tmp_path / "found.json")[0] == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert (found["step"], found["name"], found["value"], found["limit"]) == (8, "kl_high", 16.0, 15.0)


def test_the_limits_of_the_runs_own_settings_count(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [{"step": i, "kl": 16.0} for i in range(1, 10)])
    (folder / "config.yaml").write_text("method: dpo\nbeta: 0.1\nhealth: {kl_high: 17, enabled: false}\n")
    assert "no alarms" in health(folder)[1]
    assert "raise `beta`" in health(folder, "--set", "kl_high=15")[1]
    (folder / "config.yaml").write_text("health: 3\n")
    assert health(folder) == (2, f"{folder}/config.yaml: health is 3; it must be a mapping, such as {{kl_high: 20}}")


def test_bad_input_is_reported_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = f"no run in {tmp_path}/empty: it has no metrics.jsonl; give the folder of a run, such as runs/dpo-001"
    assert health(tmp_path / "empty") == (2, message)
    assert "give the folder of a run" in health(tmp_path / "nowhere")[1]
    run = write(tmp_path / "run", [])
    assert health(run) == (2, f"{run}/metrics.jsonl is empty: the run has done no step")
    assert "runs in it: run" in health(tmp_path)[1]
    (run / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    assert "metrics.jsonl, line 2, is not a JSON object" in health(run)[1]
    write(run, [{"step": 1, "kl": 1.0}])
    assert "no limit 'kl_hig'. Did you mean 'kl_high'?" in health(run, "--set", "kl_hig=3")[1]
    assert "kl_high: Input should be greater than 0" in health(run, "--set", "kl_high=-3")[1]
    assert f"health in {run}/config.yaml, or --set: " in health(run, "--set", "kl_hig=3")[1]
    assert health(run, "--json", tmp_path)[0] == 2
    assert health(run, "--json", "/proc/nowhere.json")[0] == 2
    (run / "config.yaml").write_text("critic_warmup_steps: abc\n")
    assert health(run)[0] == 0


@pytest.mark.parametrize("odd", ['{"step": [1], "training": true}', '{"step": "a", "training": true}', "[" * 9999, "1"])
def test_odd_completions_are_passed_over(odd: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [{"step": i, "kl": 1.0} for i in range(1, 20)])
    rows = [
        {"step": i, "training": True, "row": [n], "completion": "Sorry, I cannot"}
        for i in range(1, 20)
        for n in range(4)
    ]
    lines = [json.dumps(row) for row in rows]
    for row in rows[:32]:
        row["completion"] = f"{row['step']} {row['row']} and more"
    lines = [json.dumps(row) for row in rows]
    (folder / "completions.jsonl").write_text("\n".join([*lines[:5], odd, *lines[5:]]) + "\n")
    assert [a.name for _, a in replay(folder)] == ["opening"]
