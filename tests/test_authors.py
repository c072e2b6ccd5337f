"""What else an author can do: a schedule, metrics after an update, callbacks of one run, and what the kit says."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit import Alarm, Batch, Context, Method, Models, RunView, Term
from alignkit.config import RunConfig
from alignkit.errors import ConfigError, PluginError
from alignkit.runs.callbacks import load_callbacks
from alignkit.runs.folder import read_lines, read_metrics
from alignkit.testing import Conformance, train
from alignkit.unused import check_used
from alignkit_kernels import sequence_sum

PAGE = Path(__file__).parents[1] / "docs/authors.md"


class Plain(Method[Any]):
    name = "plain"
    data = "text"

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        return {"plain": Term(-sequence_sum(models.policy(batch).logps, batch.cu_seqlens))}


# ---------------------------------------------------------------------------------------------------- the schedule


class Steps(Plain):
    """A rate that is halved at each step."""

    def schedule(self, step: int, total: int) -> float:
        return 0.5**step


def test_a_method_brings_its_own_schedule(tmp_path: Path) -> None:
    folder = train(Steps, tmp_path, max_steps=4, learning_rate=0.01, name="run", save_every=None).folder
    assert [line["lr"] for line in read_metrics(folder)] == [0.01, 0.005, 0.0025, 0.00125]


def test_where_it_returns_none_the_runs_schedule_holds(tmp_path: Path) -> None:
    folder = train(Plain, tmp_path, max_steps=2, learning_rate=0.01, name="run").folder
    # after step 0 half of the cosine is left: (1 + cos(pi / 2)) / 2
    assert [line["lr"] for line in read_metrics(folder)] == pytest.approx([0.01, 0.005])


@pytest.mark.parametrize("returned", [-1.0, float("nan"), "half", True])
def test_a_factor_that_is_none_is_refused(returned: Any, tmp_path: Path) -> None:
    class Wrong(Plain):
        def schedule(self, step: int, total: int) -> Any:
            return returned

    with pytest.raises(PluginError, match=r"schedule\(0, 2\) of 'plain' returned .*it must be a finite number"):
        train(Wrong, tmp_path)


@pytest.mark.parametrize("given", [{"schedule": "linear"}, {"warmup_fraction": 0.2}])
def test_a_schedule_that_would_have_no_effect_is_refused(given: dict[str, Any]) -> None:
    config = RunConfig(method="plain", model="m", data="d", **given)
    with pytest.raises(ConfigError, match="'plain' has a schedule of its own for the learning rate; remove `"):
        check_used(config, Steps(Steps.Config()))
    check_used(config, Plain(Plain.Config()))


# ------------------------------------------------------------------------------------------------ after an update


def test_after_an_update_a_method_gets_what_it_logged(tmp_path: Path) -> None:
    got: list[dict[str, float]] = []

    class Logs(Plain):
        def collect(self, batch: Batch, ctx: Context) -> Batch:
            ctx.log(**{"own/number": 10.0 + ctx.step})
            return batch

        def after_update(self, ctx: Context, metrics: Any) -> None:
            got.append(dict(metrics))

    train(Logs, tmp_path)
    assert [metrics["own/number"] for metrics in got] == [10.0, 11.0]
    assert all({"loss", "plain", "grad_norm"} <= metrics.keys() for metrics in got)


# ---------------------------------------------------------------------------------------------------- callbacks


def long_loss(step: int, metrics: dict[str, float]) -> list[Alarm]:
    return [Alarm("long", metrics["loss"], 0.0, f"step {step}", "nothing")]


class Records:
    """A listener as an object, of all three arguments."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, set[str]]] = []

    def on_metrics(self, run: RunView, step: int, metrics: dict[str, float]) -> None:
        self.seen.append((run.total_steps, step, set(metrics)))


FILE = """
    SEEN = []

    def on_metrics(run, step, metrics):
        (run.folder / "seen.txt").open("a").write(f"{step}\\n")

    class Watch:
        def on_metrics(self, **given):
            (given["run"].folder / "class.txt").write_text(str(given["step"]))
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "my_listener.py"
    path.write_text(textwrap.dedent(FILE))
    monkeypatch.chdir(tmp_path)
    return path


def test_callbacks_hear_every_line_and_raise_alarms(tmp_path: Path) -> None:
    records = Records()
    folder = train(Plain, tmp_path, name="run", callbacks=[long_loss, records]).folder
    assert [(total, step) for total, step, _ in records.seen] == [(2, 1), (2, 2)]
    assert all("loss" in names for _, _, names in records.seen)
    assert [alarm["name"] for alarm in read_lines(folder / "alarms.jsonl")] == ["long"]


def test_callbacks_come_from_a_file_and_by_name(file: Path, tmp_path: Path) -> None:
    named = "my_listener.py,my_listener.py:Watch"
    folder = train(Plain, tmp_path / "runs", name="run", callbacks=named).folder
    assert (folder / "seen.txt").read_text() == "1\n2\n"
    assert (folder / "class.txt").read_text() == "2"
    assert "my_listener.py:Watch" in (folder / "config.yaml").read_text()
    assert set(load_callbacks(["my_listener:on_metrics"])) == {"my_listener:on_metrics"}


def test_a_run_resumes_with_other_callbacks(tmp_path: Path) -> None:
    from alignkit.testing.runs import interrupted_after

    with interrupted_after(1):
        train(Plain, tmp_path, name="run", callbacks=[long_loss])
    assert train(Plain, tmp_path, name="run", resume=True).metrics["loss"] > 0


def test_a_callback_that_raises_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def raises(metrics: dict[str, float]) -> None:
        metrics["no such metric"]

    caplog.set_level(logging.WARNING, logger="alignkit")
    train(Plain, tmp_path, callbacks=[raises])
    assert caplog.text.count("listener 'raises' failed and is not called again: KeyError: 'no such metric' (at ") == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["my_listner.py"], r"there is no file my_listner\.py\. Did you mean 'my_listener\.py'\?"),
        (["my_listener.py:Wach"], r"has no 'Wach'\. Did you mean 'Watch'\?"),
        (["my_listener.py:SEEN"], r"'my_listener.py:SEEN' has no function `on_metrics\(run, step, metrics\)`"),
        (["broken.py"], r"broken\.py cannot be loaded: ZeroDivisionError: .*broken\.py:1, in <module>"),
        (["nowhere:watch"], "the module 'nowhere' of 'nowhere:watch' cannot be imported"),
        (["os:remove"], "belongs to Python's standard library, which has no callback"),
        (["watch"], r"'watch' is no name; write 'module:function', 'file\.py' or 'file\.py:name'"),
        ([3], "'int' has no function"),
        ([lambda trainer: None], "takes 'trainer'; it may take run, step and metrics"),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_is_loaded(given: Any, said: str, file: Path) -> None:
    file.with_name("broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=said):
        train(Plain, file.parent / "runs", callbacks=given, model="no such model")


def test_the_setting_is_written_by_names() -> None:
    config = RunConfig(method="plain", model="m", data="d", callbacks=[long_loss, "a.py"])
    assert config.describe()["callbacks"] == [f"{__name__}:long_loss", "a.py"]


# ------------------------------------------------------------------------------------------------------ the page


def test_the_pages_tables_name_every_attribute_and_call() -> None:
    text = PAGE.read_text().split("## Every attribute and call")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)[`(]", text))
    annotated = {n for n in Method.__annotations__ if not n.startswith("_")}
    calls = {n for n, value in vars(Method).items() if not n.startswith("_") and n != "Config" and callable(value)}
    assert named >= annotated | calls | {"advice"}
    assert named >= {n for n in vars(Context) if not n.startswith("_")} - {"is_protocol"}
    parameters = inspect.signature(Context.rollouts).parameters.keys() - {"self"}
    assert set(re.search(r"`rollouts\(([^)]*)\)`", text)[1].split(", ")) == parameters  # type: ignore[index]


def test_the_pages_method_with_columns_passes_the_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text().split("## Columns of the rows")[1]
    (tmp_path / "weighted_of_the_page.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]
    monkeypatch.syspath_prepend(tmp_path)
    method = importlib.import_module("weighted_of_the_page").Weighted
    for name in ("test_declaration", "test_micro_batches", "test_loss_is_pure", "test_ranks"):
        check(method, name)


# ------------------------------------------------------------------------------------------------------- the kit


def check(method: type[Method[Any]], name: str) -> None:
    checks = type("Checks", (Conformance,), {"method": method})
    getattr(checks(), name)({})


class Counts(Plain):
    """A state that `collect` changes, and what it attaches depends on it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.calls = torch.zeros(())

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        if ctx.training:
            self.calls = self.calls + 1
        return batch.attach(per_example={"calls": self.calls.repeat(len(batch))})


class Remembers(Counts):
    def state_dict(self) -> dict[str, Any]:
        return {"calls": float(self.calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = torch.tensor(state["calls"])


def test_the_kit_says_that_collect_changes_state_which_is_not_saved() -> None:
    said = r"collect changes self\.calls, which 'calls' depends on and load_state_dict\(state_dict\(\)\) does not"
    with pytest.raises(pytest.fail.Exception, match=said):
        check(Counts, "test_collect")
    check(Remembers, "test_collect")


def test_the_kit_says_that_an_evaluation_changes_state() -> None:
    class Always(Remembers):
        def collect(self, batch: Batch, ctx: Context) -> Batch:
            self.calls = self.calls + 1
            return batch

    with pytest.raises(AssertionError, match=r"collect changes self\.calls while ctx\.training is False"):
        check(Always, "test_evaluation_changes_no_state")
    check(Remembers, "test_evaluation_changes_no_state")


def test_the_kit_passes_real_metrics_after_an_update() -> None:
    got: dict[str, float] = {}

    class Reads(Plain):
        def collect(self, batch: Batch, ctx: Context) -> Batch:
            ctx.log(own=2.0)
            return batch

        def after_update(self, ctx: Context, metrics: Any) -> None:
            got.update(metrics)

    check(Reads, "test_frozen_roles_stay")
    assert got["own"] == 2.0
    assert got["loss"] == got["plain"] > 0
    assert got["grad_norm"] > 0
