"""Listeners: alarms are reported once, broken listeners end nothing, `stop_on` ends a run that can be resumed."""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import alignkit
from alignkit import Alarm, RunView, registry
from alignkit.alarms import ALARMS, Health
from alignkit.config import RunConfig, split
from alignkit.errors import AlarmError, ConfigError, DataError
from alignkit.method import MethodConfig
from alignkit.runs.folder import StepLines, read_lines, read_metrics
from alignkit.runs.log import Listeners
from alignkit.runs.progress import Progress, line
from helpers import make_rows

TIMED = ("tokens_per_second", "seconds/")


class Hooks:
    """A listener without a distribution: pluggy's relay returns a list of the results of its plugins."""

    def __init__(self, say: Callable[[int, dict[str, float]], Any]) -> None:
        self._say = say

    def on_metrics(self, run: RunView, step: int, metrics: dict[str, float]) -> list[Any]:
        return [self._say(step, metrics)]


def alarm(name: str, value: float = 2.0) -> Alarm:
    return Alarm(name, value, 1.0, f"{name} is {value}, above 1", "Lower `learning_rate`")


@pytest.fixture
def hear(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(**listeners: Callable[[int, dict[str, float]], Any]) -> None:
        hooks = {name: Hooks(say) for name, say in listeners.items()}
        monkeypatch.setattr(registry, "listeners", lambda warn: dict(hooks))

    return install


def opened(folder: Path, done: int = 0, evaluated: int = -1) -> Listeners:
    return Listeners(RunView(folder, MappingProxyType({}), 10), done, evaluated)


def written(folder: Path) -> list[dict[str, Any]]:
    return list(read_lines(folder / "alarms.jsonl"))


# ------------------------------------------------------------------------------------------------------- reports


def test_an_alarm_is_reported_once_with_step_value_limit_and_remedy(
    hear: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hear(one=lambda step, _: [alarm("kl_high", 10.0 + step), alarm("truncation")] if step > 1 else [])
    listeners = opened(tmp_path)
    with caplog.at_level(logging.WARNING, "alignkit"):
        new = [[a.name for a in listeners.check(step, {"loss": 1.0})] for step in (1, 2, 3)]
    assert new == [[], ["kl_high", "truncation"], []]
    assert caplog.messages == [
        "alarm kl_high: kl_high is 12.0, above 1. Lower `learning_rate`",
        "alarm truncation: truncation is 2.0, above 1. Lower `learning_rate`",
    ]
    listeners.close()
    assert written(tmp_path)[0] == {
        "step": 2, "name": "kl_high", "value": 12.0, "limit": 1.0, "message": "kl_high is 12.0, above 1",
        "remedy": "Lower `learning_rate`", "training": True,
    }  # fmt: skip


def test_two_listeners_and_one_cause_are_one_alarm_the_first(hear: Any, tmp_path: Path) -> None:
    hear(a=lambda *_: [alarm("mine", 3.0)], b=lambda *_: [alarm("mine", 4.0), alarm("other")])
    assert [(a.name, a.value) for a in opened(tmp_path).check(1, {"loss": 0.0})] == [("mine", 3.0), ("other", 2.0)]


def test_after_a_resume_earlier_alarms_are_not_repeated_and_those_of_repeated_steps_are(
    hear: Any, tmp_path: Path
) -> None:
    hear(one=lambda step, _: [alarm(f"at-{step}")])
    before = opened(tmp_path)
    before.check(4, {"loss": 1.0})
    before.check(4, {"eval/loss": 1.0})  # the same cause
    before.check(6, {"eval/loss": 1.0})
    before.close()
    assert opened(tmp_path, done=6, evaluated=6).check(6, {"loss": 1.0}) == []
    # that evaluation is done again, and its alarm with it
    assert [a.name for a in opened(tmp_path, done=6).check(6, {"eval/loss": 1.0})] == ["at-6"]
    assert opened(tmp_path, done=5).check(4, {"loss": 1.0}) == []
    assert [a.name for a in opened(tmp_path, done=3).check(4, {"loss": 1.0})] == ["at-4"]


@pytest.mark.parametrize(
    ("listener", "reason"),
    [
        (lambda *_: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda *_: ["kl_high"], r"TypeError: on_metrics must return a list of alignkit.Alarm, got one of str"),
        (lambda *_: 5, "TypeError"),
        (lambda *_: sys.exit(3), "SystemExit: 3"),
        (lambda *_: [alarm("x", "much")], "ValueError: could not convert string to float: 'much'"),  # type: ignore[arg-type]
        (lambda *_: [alarm("x", math.nan)], "ValueError: alarm 'x' has value nan and limit 1.0, which must be finite"),
    ],
)
def test_a_listener_that_breaks_is_left_out_and_the_others_go_on(
    listener: Any, reason: str, hear: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hear(bad=listener, good=lambda step, _: [alarm(f"at-{step}")])
    listeners = opened(tmp_path)
    with caplog.at_level(logging.WARNING, "alignkit"):
        assert [a.name for step in (1, 2) for a in listeners.check(step, {"loss": 0.0})] == ["at-1", "at-2"]
    (warning,) = [m for m in caplog.messages if "not called again" in m]
    assert warning.startswith(f"listener 'bad' failed and is not called again: {reason}")


def test_a_listener_cannot_change_what_is_written(hear: Any, tmp_path: Path) -> None:
    def meddles(step: int, metrics: dict[str, float]) -> list[Alarm]:
        metrics.clear()
        return []

    hear(one=meddles)
    values = {"loss": 1.0}
    opened(tmp_path).check(1, values)
    assert values == {"loss": 1.0}


def test_the_progress_display_shows_an_alarm(capsys: pytest.CaptureFixture[str]) -> None:
    assert "ALARM kl_high" in line(3, 9, {"loss": 1.0, "alarm/kl_high": 16.0})
    shown = Progress(9, 0)
    shown.step(1, {"loss": 1.0})
    shown.step(2, {"loss": 1.0})  # within the same second
    shown.step(3, {"loss": 1.0, "alarm/kl_high": 16.0})
    assert [text.split(" |")[0] for text in capsys.readouterr().err.splitlines()] == ["step 1/9", "step 3/9"]


# --------------------------------------------------------------------------------------------------- in the engine


def test_an_alarm_stands_in_the_steps_metrics_and_in_the_result(hear: Any, settings: dict[str, Any]) -> None:
    hear(one=lambda step, _: [alarm("mine", float(step))] if step >= 2 else [])
    result = alignkit.run("sft", data=make_rows("text", 12), **settings)
    assert [m.get("alarm/mine") for m in read_metrics(result.folder)] == [None, 2.0, None, None, None, None]
    assert result.metrics["alarm/mine"] == 2.0
    assert [a["step"] for a in written(result.folder)] == [2]


def test_a_listener_sees_the_run_and_every_line_before_it_is_written(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    seen: list[Any] = []

    class Looks:
        def on_metrics(self, run: RunView, step: int, metrics: dict[str, float]) -> list[Any]:
            before = [m["step"] for m in read_metrics(run.folder)]
            seen.append((step, before, "eval/loss" in metrics, run.settings["beta"], run.total_steps))
            return []

    monkeypatch.setattr(registry, "listeners", lambda warn: {"looks": Looks()})
    alignkit.run("dpo", data=make_rows("pairs", 12), eval_fraction=0.2, **settings | {"max_steps": 2, "beta": 0.3})
    assert seen == [
        (0, [], True, 0.3, 2),
        (1, [0], False, 0.3, 2),
        (2, [0, 1], False, 0.3, 2),
        (2, [0, 1, 2], True, 0.3, 2),
    ]


@pytest.mark.parametrize("at", [3, 6])
def test_stop_on_ends_the_run_with_a_checkpoint_and_resuming_goes_on_to_the_same_end(
    at: int, hear: Any, settings: dict[str, Any]
) -> None:
    hear(one=lambda step, _: [alarm("kl_high")] if step >= at else [])
    given = {"data": make_rows("text", 12), **settings}
    whole = alignkit.run("sft", name="whole", **given)
    with pytest.raises(AlarmError) as stopped:
        alignkit.run("sft", name="parts", stop_on=["truncation", "kl_high"], **given)
    folder = settings["output"] / "parts"
    assert str(stopped.value) == (
        "alarm kl_high ended the run (stop_on): kl_high is 2.0, above 1. Lower `learning_rate`\n"
        f"Stopped after step {at}; to continue anyway: alignkit run {folder / 'config.yaml'} --resume"
    )
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step-0000000{at}"]
    parts = alignkit.run("sft", name="parts", stop_on=["kl_high"], resume=True, **given)
    timeless = [
        [{k: v for k, v in m.items() if not k.startswith(TIMED)} for m in read_metrics(run.folder)]
        for run in (whole, parts)
    ]
    assert timeless[0] == timeless[1]
    assert written(whole.folder) == written(parts.folder)


def test_an_alarm_that_stop_on_does_not_name_ends_nothing(hear: Any, settings: dict[str, Any]) -> None:
    hear(one=lambda *_: [alarm("kl_low")])
    assert alignkit.run("sft", data=make_rows("text", 12), stop_on=["kl_high"], **settings).folder.is_dir()


def test_an_alarm_of_an_evaluation_ends_the_run_after_the_next_step(hear: Any, settings: dict[str, Any]) -> None:
    hear(one=lambda step, metrics: [alarm("kl_high")] if "eval/loss" in metrics else [])
    with pytest.raises(AlarmError, match="Stopped after step 1"):
        alignkit.run("sft", data=make_rows("text", 12), eval_fraction=0.2, stop_on=["kl_high"], **settings)


def test_limits_may_change_when_a_run_is_resumed(hear: Any, settings: dict[str, Any]) -> None:
    hear(one=lambda step, _: [alarm("kl_high")] if step == 2 else [])
    given = {"data": make_rows("text", 12), "name": "run", **settings}
    with pytest.raises(AlarmError):
        alignkit.run("sft", stop_on="kl_high", **given)
    alignkit.run("sft", resume=True, health={"kl_high": 30}, **given)


def test_what_was_raised_before_a_resume_ends_nothing_and_that_is_logged(
    hear: Any, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    hear(one=lambda step, _: [alarm("kl_high" if step < 3 else "truncation")])
    given = {"data": make_rows("text", 12), "name": "run", **settings}
    with pytest.raises(AlarmError):
        alignkit.run("sft", stop_on="truncation", **given)
    caplog.clear()
    alignkit.run("sft", resume=True, stop_on="kl_high,truncation", **given)
    for name in ("kl_high", "truncation"):
        assert f"stop_on: {name} was raised before, so it no longer ends the run" in caplog.text


def test_every_rank_ends_together(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """A rank that heard no alarm itself ends where another one did."""
    from alignkit.models.ranks import Ranks

    def summed(self: Ranks, value: Any) -> Any:
        if value.shape == (3,):  # the flags of the end of a step; here another rank's alarm
            value = value.clone()
            value[2] += 1
        return value

    monkeypatch.setattr(Ranks, "sum", summed)
    with pytest.raises(AlarmError, match=r"see the error of rank 0\nStopped after step 1"):
        alignkit.run("sft", data=make_rows("text", 12), **settings)


@pytest.mark.slow
def test_the_command_line_reports_why_and_exits_with_2(write_rows: Any, tiny: str, tmp_path: Path) -> None:
    rows = write_rows([{"prompt": r["prompt"]} for r in make_rows("prompts", 8)])
    sets = ["reward={use: length, max: 5}", "sampling={max_new_tokens: 3}", "stop_on=truncation", "health.window=1"]
    sets += ["device=cpu", "group_size=2", f"cache_file={tmp_path / 'cache'}"]
    words = ["run", "grpo", "--model", tiny, "--data", rows, "--output", str(tmp_path), "--batch-size", "4"]
    words += [word for pair in sets for word in ("--set", pair)]
    ran = subprocess.run([sys.executable, "-m", "alignkit", *words], capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    last = ran.stderr.strip().splitlines()[-2:]
    assert last[0].startswith("error: alarm truncation ended the run (stop_on): step 1: ")
    assert "`sampling.max_new_tokens`" in last[0]
    assert last[1].endswith(f"to continue anyway: alignkit run {tmp_path}/grpo-001/config.yaml --resume")
    assert "Traceback" not in ran.stderr


# -------------------------------------------------------------------------------------------------------- settings


def config(**settings: Any) -> RunConfig:
    return split({"method": "x", "model": "m", "data": "d", **settings}, MethodConfig)[0]


def test_limits_are_settings_with_dotted_names() -> None:
    assert config().health == Health()
    assert config(**{"health.kl_high": 20}).health.kl_high == 20
    assert config(health={"enabled": False}).health.enabled is False
    assert config(**{"health.opening": None}).health.opening is None
    with pytest.raises(ConfigError, match=r"health: no limit 'kl_hihg'. Did you mean 'kl_high'\? See docs/health.md"):
        config(**{"health.kl_hihg": 20})


def test_stop_on_knows_the_alarms() -> None:
    assert config(stop_on="kl_high, truncation").stop_on == ["kl_high", "truncation"]
    with pytest.raises(
        ConfigError, match=r"no alarm is called 'kl_hihg'. Did you mean 'kl_high'\? Alarms: kl_high, kl_low, "
    ):
        config(stop_on=["kl_hihg"])
    assert config(stop_on=" ").stop_on == config(stop_on="").stop_on == config(stop_on=None).stop_on == []
    with pytest.raises(ConfigError, match="no alarm is called ''"):
        config(stop_on=[""])
    assert set(ALARMS) < set(Health.model_fields)
    assert "enabled" not in ALARMS


def test_stop_on_names_no_alarm_that_is_switched_off() -> None:
    for off in ({"health.kl_high": None}, {"health.enabled": False}):
        with pytest.raises(ConfigError, match="stop_on names kl_high, which `health` switches off; set its limit"):
            config(stop_on="kl_high", **off)


@pytest.mark.parametrize("health", [1, "kl_high", ["kl_high"]])
def test_health_is_a_mapping(health: Any) -> None:
    with pytest.raises(ConfigError, match="health: Input should be a valid dictionary"):
        config(health=health)


def test_limits_are_numbers_with_room_between_them() -> None:
    with pytest.raises(ConfigError, match="kl_high is true; give its limit as a number, or null to switch it off"):
        config(health={"kl_high": True})
    with pytest.raises(ConfigError, match="kl_low 50 is not below kl_high 15"):
        config(**{"health.kl_low": 50})
    with pytest.raises(ConfigError, match="less than or equal to 1000"):
        config(**{"health.window": 100_000})


# ------------------------------------------------------------------------------------------- files of a run folder


def test_a_cut_off_last_line_is_left_out_and_garbage_in_the_middle_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert [m["step"] for m in read_lines(file)] == [1, 2]
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2, is not a JSON object with a step"):
        list(read_lines(file))
    for other in ("[1]", '{"loss": 1}', '{"step": "a"}'):
        file.write_text(f'{other}\n{{"step": 3}}\n')
        with pytest.raises(DataError, match="line 1"):
            list(read_lines(file))
    file.write_bytes(b'{"step": 1}\n\xff\xfe{')
    assert [m["step"] for m in read_lines(file)] == [1]
    with pytest.raises(DataError, match=r"cannot read .*nothing.jsonl: No such file"):
        list(read_lines(tmp_path / "nothing.jsonl"))


def test_a_resume_takes_out_lines_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "alarms.jsonl"
    file.write_bytes(b'{"step": 1}\n\xff\xfe{\n{"step": 3}\n')
    StepLines(file, 2).close()
    assert file.read_bytes() == b'{"step": 1}\n'


# ----------------------------------------------------------------------------------------------------- distribution

LISTENER = """
    from alignkit import Alarm, hookimpl

    @hookimpl
    def on_metrics(run, step, metrics):
        return [Alarm("mine", 2.0, 1.0, f"{run.folder.name} at {step}", "Stop")]
"""


def install(folder: Path, name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"listener_{name}_{folder.name.replace('-', '_')}"
    info = folder / f"site-{name}" / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info.parent / f"{module}.py").write_text(textwrap.dedent(code))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[alignkit.listeners]\n{name} = {module}\n")
    monkeypatch.syspath_prepend(info.parent)


def test_a_listener_comes_with_a_distribution_and_a_broken_one_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, "sound", LISTENER, monkeypatch)
    install(tmp_path, "broken", "raise RuntimeError('no such luck')", monkeypatch)
    install(tmp_path, "misspelt", LISTENER.replace("def on_metrics", "def on_metric"), monkeypatch)
    with caplog.at_level(logging.WARNING, "alignkit"):
        listeners = opened(tmp_path)
    assert [a.message for a in listeners.check(3, {"loss": 1.0}) if a.name == "mine"] == [f"{tmp_path.name} at 3"]
    broken, misspelt = sorted(m for m in caplog.messages if "cannot be loaded" in m or "unknown hook" in m)
    place = r"\(at .*site-broken.*\.py:1, in <module>\)"
    said = f"listener 'broken' of broken cannot be loaded: RuntimeError: no such luck {place}"
    assert re.fullmatch(f"{said}; the run continues without it", broken)
    assert "listener 'misspelt' of misspelt: unknown hook 'on_metric'" in misspelt


def test_alignkits_own_listener_is_installed() -> None:
    assert "health" in registry.names(registry.LISTENERS)
    assert [*registry.listeners(pytest.fail)] == ["health"]
