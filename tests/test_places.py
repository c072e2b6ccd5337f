"""Errors of plugins and users' functions name their own file and line, and lose nothing that was computed."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit import Batch, Context, Method, Models, Term, registry
from alignkit.errors import PluginError, RewardError, place_of
from alignkit.plugin_checks import roles_of
from alignkit.rewards import build_judge, build_rewards
from alignkit.rewards.answers import Answers
from alignkit.testing import train
from alignkit_kernels import sequence_sum
from helpers import make_rows, write_plugin

HERE = re.escape(__file__)


def line_of(text: str) -> int:
    """The number of the line of this file that holds this text as a comment."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if line.endswith(f"# {text}"))
    return number


def helper(numbers: dict[str, int]) -> int:
    return numbers["missing"]  # the helper's line


class Broken(Method[Any]):
    """Fails in the call that `where` names, from its second step on."""

    name = "broken"
    data = "text"
    where = ""

    def fail(self, call: str, step: int = 1) -> None:
        if self.where == call and step >= 1:
            helper({})

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        self.fail("collect", ctx.step)
        self.step = ctx.step
        return batch

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        self.fail("loss", self.step)
        return {"broken": Term(-sequence_sum(models.policy(batch).logps, batch.cu_seqlens))}

    def enough(self, metrics: Any) -> bool:
        self.fail("enough", self.step)
        return False

    def after_update(self, ctx: Context, metrics: Any) -> None:
        self.fail("after_update", ctx.step)

    def state_dict(self) -> dict[str, Any]:
        self.fail("state_dict")
        return {}

    def reference_need(self) -> Any:
        self.fail("reference_need")
        return "rows"


@pytest.mark.parametrize("call", ["collect", "loss", "enough", "after_update", "state_dict", "reference_need"])
def test_an_error_of_a_method_names_method_call_and_line(call: str, tmp_path: Path) -> None:
    class There(Broken):
        where = call

    line = line_of("the helper's line")
    said = rf"method 'broken' failed in {call}: KeyError: 'missing' \(at {HERE}:{line}, in helper\)"
    with pytest.raises(PluginError, match=said) as raised:
        train(There, tmp_path, name="run", save_every=2, max_steps=3)
    assert isinstance(raised.value.__cause__, KeyError)


def saved(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("run/checkpoints/*"))


@pytest.mark.parametrize("call", ["collect", "loss"])
def test_before_an_update_the_state_is_saved_and_the_run_goes_on(call: str, tmp_path: Path) -> None:
    class There(Broken):
        where = call

    with pytest.raises(PluginError, match=r"Stopped after step 1; continue with: alignkit run .*config.yaml --resume"):
        train(There, tmp_path, name="run", save_every=None, max_steps=3)
    assert saved(tmp_path) == ["step-00000001"]
    There.where = ""
    parts = train(There, tmp_path, name="run", save_every=None, max_steps=3, resume=True).model.state_dict()
    whole = train(There, tmp_path, name="whole", save_every=None, max_steps=3).model.state_dict()
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())


@pytest.mark.parametrize("call", ["collect", "loss"])
def test_a_stream_goes_on_where_the_method_failed(call: str, tmp_path: Path, write_rows: Any) -> None:
    class There(Broken):
        where = call

    streamed = {"data": write_rows(make_rows("text", 20)), "streaming": True, "shuffle_buffer": 4}
    settings = {"save_every": None, "max_steps": 3, **streamed}
    with pytest.raises(PluginError, match="Stopped after step 1; continue with"):
        train(There, tmp_path, name="run", **settings)
    There.where = ""
    parts = train(There, tmp_path, name="run", resume=True, **settings).model.state_dict()
    whole = train(There, tmp_path, name="whole", **settings).model.state_dict()
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())


@pytest.mark.parametrize("minibatches", [1, 2])
def test_after_an_update_nothing_half_done_is_saved(minibatches: int, tmp_path: Path) -> None:
    class There(Broken):
        where = "after_update"

    with pytest.raises(PluginError, match="Stopped in step 2; continue from the newest checkpoint"):
        train(There, tmp_path, name="run", save_every=None, max_steps=3, minibatches=minibatches)
    assert saved(tmp_path) == []


def test_our_own_refusal_names_the_line_that_asked(tmp_path: Path) -> None:
    class Asks(Broken):
        def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
            return {"asks": Term(models.reference(batch).logps)}  # the asking line

    with pytest.raises(
        PluginError, match=rf"used the role 'reference' without.*:{line_of('the asking line')}, in loss"
    ):
        train(Asks, tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, torch.OutOfMemoryError])
def test_what_is_no_fault_of_the_method_passes(error: type[BaseException], tmp_path: Path) -> None:
    class Ends(Broken):
        def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
            raise error

    with pytest.raises(error):
        train(Ends, tmp_path)


def test_a_method_whose_roles_fail_is_named_once(tmp_path: Path) -> None:
    class Roles(Broken):
        def roles(self) -> frozenset[str]:
            return frozenset(["policy"])[0]  # type: ignore[index]  # the line of roles

    with pytest.raises(PluginError) as raised:
        roles_of(Roles)
    assert re.fullmatch(
        rf"roles\(\) of 'broken' failed: TypeError: .* \(at {HERE}:{line_of('the line of roles')}, in roles\)",
        str(raised.value),
    )


def failing(prompts: list[str], completions: list[str]) -> list[float]:
    return [json.loads(text) for text in completions]  # the reward's line


async def awaited(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(text) for text in completions]  # the async line


def judging(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
    return [1 / len("") for _ in first]  # the judge's line


def test_rewards_and_judges_name_their_line_not_that_of_a_library() -> None:
    answers = Answers(["p"], ["words"], {}, [1], [5], [True])
    for reward, line in ((failing, "the reward's line"), (awaited, "the async line")):
        with pytest.raises(RewardError, match=rf"Error: .* \(at {HERE}:{line_of(line)}, in {reward.__name__}\)"):
            build_rewards(reward).score(answers)
    line = line_of("the judge's line")
    with pytest.raises(RewardError, match=rf"ZeroDivisionError: .* \(at {HERE}:{line}, in judging\)"):
        build_judge(judging).wins(answers, answers)


def test_an_error_without_a_users_frame_has_no_place() -> None:
    assert place_of(ValueError("never raised")) == ""


def test_an_installed_listener_names_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    code = """
        from alignkit import hookimpl

        @hookimpl
        def on_metrics(run, step, metrics):
            return [1 / 0]
    """
    monkeypatch.syspath_prepend(write_plugin(tmp_path / "site", "watch", code, group="alignkit.listeners"))
    caplog.set_level(logging.WARNING, logger="alignkit")
    train(Broken, tmp_path, max_steps=1)
    assert re.search(
        r"'watch' failed .*ZeroDivisionError: division by zero \(at .*\.py:6, in on_metrics\)", caplog.text
    )


def test_a_plugin_that_cannot_be_imported_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(write_plugin(tmp_path / "site", "late", "\n\nimport_me = undefined\n"))
    with pytest.raises(PluginError, match=r"cannot be loaded: NameError: .* \(at .*site.*\.py:3, in <module>\)"):
        registry.get("late")
    monkeypatch.syspath_prepend(write_plugin(tmp_path / "other", "wrong", "\n\ndef (\n"))
    with pytest.raises(PluginError, match=r"cannot be loaded: SyntaxError: .* \(at .*other.*\.py:3\)"):
        registry.get("wrong")


def test_a_plugin_among_the_libraries_is_found(tmp_path: Path) -> None:
    """A package in site-packages that calls a library which raises: the line is the package's."""
    code = f"""
import sys, sysconfig
sys.path.insert(0, {str(Path(__file__).parent)!r})
from alignkit import errors
errors._INSTALLED = ({str(tmp_path)!r}, sysconfig.get_paths()["stdlib"])
sys.path.insert(0, {str(tmp_path)!r})
import installed_method
print(installed_method.placed(errors.place_of))
"""
    (tmp_path / "installed_method.py").write_text(
        "import other_library\n\ndef placed(place_of):\n    try:\n        other_library.work()\n"
        "    except ValueError as error:\n        return place_of(error)\n"
    )
    (tmp_path / "other_library.py").write_text("def work():\n    raise ValueError\n")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"{tmp_path / 'installed_method.py'}:5, in placed"


def test_the_command_line_keeps_the_whole_traceback(
    command: Any, tiny: str, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class There(Broken):
        where = "collect"

    monkeypatch.setattr(registry, "get", lambda name: There)
    write_rows(make_rows("text", 8))
    given = ("--model", tiny, "--data", "rows.jsonl", "--set", "device=cpu", "--set", "batch_size=2")
    code, _, said = command("run", "broken", *given)
    assert code == 2
    assert "error: method 'broken' failed in collect: KeyError: 'missing' (at " in said
    (file,) = re.findall(r"The whole traceback: (\S+)", said)
    assert 'return numbers["missing"]' in Path(file).read_text()
