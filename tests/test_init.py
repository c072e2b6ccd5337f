"""`alignkit init` writes what a run takes: adapters, held-out rows, a handful of rows, paths, sizes of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer
from zoo import CPU

from alignkit import registry
from alignkit.config import RunConfig
from alignkit.errors import ConfigError
from alignkit.insight.recommend import Recommendation, recommend
from alignkit.lora_settings import LoraSettings
from alignkit.models.adapters import add_lora
from alignkit.models.loading import load_model
from helpers import make_rows

Command = Callable[..., tuple[Any, str, str]]


@pytest.fixture(scope="module")
def adapter(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an adapter on the tiny model, with its tokenizer."""
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load_model(RunConfig(method="dpo", model=tiny, data="-"), CPU)
    add_lora(model, LoraSettings(r=2)).save_pretrained(folder)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return str(folder)


def choice(found: Recommendation, name: str) -> Any:
    return next((c for c in found.settings if c.name == name), None)


# ------------------------------------------------------------------------------------------------------- adapters


def test_an_adapter_gets_none_on_top_and_the_rate_of_adapters(adapter: str, tiny: str) -> None:
    rows = make_rows("pairs", 60)
    assert choice(recommend(rows, model=tiny), "lora").value == 16
    found = recommend(rows, model=adapter)
    assert choice(found, "lora") is None
    assert choice(found, "learning_rate").value == registry.get("dpo").lora_learning_rate
    assert "`lora` is left out" in choice(found, "learning_rate").why
    with pytest.raises(ConfigError, match="is an adapter, which a run trains as it is; leave out --lora"):
        recommend(rows, model=adapter, lora=8)


def test_what_is_written_for_an_adapter_runs(adapter: str, command: Command, write_rows: Callable[..., str]) -> None:
    data = write_rows(make_rows("pairs", 24))
    assert command("init", "--data", data, "--model", adapter)[0] == 0
    code, _, err = command("run", "config.yaml", "--set", "max_steps=1", "--set", "device=cpu")
    assert code == 0, err
    code, _, err = command("init", "--data", data, "--model", adapter, "--lora", "8", "--force")
    assert code == 2
    assert "leave out --lora" in err


def test_a_runs_folder_is_written_as_the_model_in_it(
    tiny: str, command: Command, write_rows: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "sft-1"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("method: sft\n")
    (run / "model").symlink_to(tiny)
    assert command("init", "--data", write_rows(make_rows("pairs", 24)), "--model", "runs/sft-1")[0] == 0
    assert yaml.safe_load(Path("config.yaml").read_text())["model"] == "runs/sft-1/model"


# -------------------------------------------------------------------------------------------------- rows and steps


@pytest.mark.parametrize(
    ("n_rows", "eval_rows", "said"),
    [
        (40, 0, "about 9 in an epoch (rows to train on: 36)"),  # 4 prompts are held out; 36 / 4
        (40, 5, "about 10 in an epoch (rows to train on: 40)"),
        (50, 0, "about 12 in an epoch (rows to train on: 45)"),  # 11 of 4 rows, and one
        (3, 0, "about 1 in an epoch (rows to train on: 3)"),
    ],
)
def test_steps_are_those_of_the_rows_that_are_trained_on(n_rows: int, eval_rows: int, said: str) -> None:
    found = recommend(make_rows("pairs", n_rows), eval_data=make_rows("pairs", eval_rows, seed=9) or None)
    assert choice(found, "batch_size").value == 4
    assert said in choice(found, "batch_size").why


def test_steps_that_are_said_are_those_of_the_plan(tiny: str, command: Command, write_rows: Callable[..., str]) -> None:
    for method, n_steps in (("dpo", 9), ("kto", 5)):  # kto: 72 rows of 36 prompts, 4 times 16 and 8
        data = write_rows(make_rows("pairs", 40))
        assert command("init", "--method", method, "--data", data, "--model", tiny, "--force")[0] == 0
        assert f"about {n_steps} in an epoch" in Path("config.yaml").read_text()
        assert f"steps: {n_steps} of" in command("plan", "config.yaml")[1]


@pytest.mark.parametrize(("n_rows", "warned"), [(1, True), (19, True), (20, False)])
def test_a_handful_of_rows_is_said_to_teach_little(
    n_rows: int, warned: bool, tiny: str, command: Command, write_rows: Callable[..., str]
) -> None:
    data = write_rows(make_rows("pairs", n_rows))
    for words in (["recommend", "--data", data], ["init", "--data", data, "--model", tiny]):
        assert ("too few to teach a model much" in command(*words)[1].replace("\n", " ")) == warned
    text = Path("config.yaml").read_text().replace("\n# ", " ")
    assert ("Warning: " in text and "too few to teach a model much" in text) == warned


@pytest.mark.parametrize("label", [True, False])
def test_rows_that_fill_no_step_are_refused(
    label: bool, tiny: str, command: Command, write_rows: Callable[..., str]
) -> None:
    data = write_rows([{"prompt": "a", "completion": "b", "label": label}])
    code, _, err = command("init", "--method", "kto", "--data", data, "--model", tiny)
    assert code == 2
    assert "'kto' cannot be used: its steps need at least 2 rows, but the data has 1" in err
    assert not Path("config.yaml").exists()


# --------------------------------------------------------------------------------------------------- held-out rows


@pytest.mark.parametrize(
    ("method", "held_out", "said"),
    [
        ("dpo", "unpaired", "held-out rows that 'dpo' cannot read: "),
        ("kto", "text", "held-out rows that 'kto' cannot read: "),
        ("sft", "unpaired", None),
        ("kto", "pairs", None),
    ],
)
def test_held_out_rows_are_read_as_the_methods_kind(
    method: str, held_out: str, said: str | None, tiny: str, command: Command, write_rows: Callable[..., str]
) -> None:
    data = write_rows(make_rows("pairs", 24))
    held = write_rows(make_rows(held_out, 6, seed=9), "held.jsonl")
    code, _, err = command("init", "--method", method, "--data", data, "--model", tiny, "--eval-data", held)
    assert (code, Path("config.yaml").exists()) == ((2, False) if said else (0, True))
    assert said is None or said in err
    assert said or command("validate", "config.yaml")[0] == 0


def test_held_out_rows_that_fill_no_step_are_refused() -> None:
    one = [{"prompt": "a", "completion": "b", "label": True}]
    with pytest.raises(Exception, match="held-out rows: 1 are too few, 'kto' needs at least 2"):
        recommend(make_rows("pairs", 24), method="kto", eval_data=one)


# ------------------------------------------------------------------------------------- columns, paths and memory


@pytest.mark.parametrize("command_line", [["recommend"], ["init", "--model", "TINY"], ["validate"]], ids=lambda w: w[0])
def test_a_reward_without_its_column_is_refused(
    command_line: list[str], tiny: str, command: Command, write_rows: Callable[..., str], tmp_path: Path
) -> None:
    data = write_rows([{"prompt": f"{i}?"} for i in range(24)])
    settings = {"method": "grpo", "model": tiny, "data": data, "reward": "numeric"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    words = ["mine.yaml"] if command_line == ["validate"] else ["--data", data, "--reward", "numeric"]
    code, _, err = command(*[tiny if w == "TINY" else w for w in command_line], *words)
    assert code == 2
    assert "reward 'numeric' needs the column 'answer'" in err
    assert not Path("config.yaml").exists()


def test_the_next_commands_name_the_file_as_it_was_given(
    tiny: str, command: Command, write_rows: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "my settings").mkdir()
    data = write_rows(make_rows("pairs", 24))
    assert command("init", "--data", data, "--model", tiny, "-o", "my settings/x-y.yaml")[0] == 0
    text = (tmp_path / "my settings/x-y.yaml").read_text().replace("\n# ", " ")
    for name in ("validate", "plan", "run"):
        assert f"alignkit {name} 'my settings/x-y.yaml'" in text


@pytest.mark.parametrize("size", ["0GB", "0.0 GiB"])
def test_no_memory_at_all_is_refused(size: str, tiny: str, command: Command, write_rows: Callable[..., str]) -> None:
    data = write_rows(make_rows("pairs", 24))
    for words in (
        ["init", "--data", data, "--model", tiny, "--gpu-memory", size],
        ["recommend", "--data", data, "--model", tiny, "--gpu-memory", size],
        ["plan", "config.yaml", "--memory", size],
    ):
        code, _, err = command(*words)
        assert code == 2
        assert f"'{size}' is less than one byte" in err
