"""A run's folder: its number, what may change when it is resumed, and lines that a killed run left."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignkit.config import RunConfig, read_yaml
from alignkit.errors import ConfigError
from alignkit.runs.config_file import write_config
from alignkit.runs.folder import StepLines, create, read_metrics, undone

ALONE = SimpleNamespace(is_main_process=True, num_processes=1)


def config(output: Path, **settings: Any) -> RunConfig:
    return RunConfig(**{"method": "dpo", "model": "m", "data": "d", "output": output, **settings})


def test_runs_without_a_name_are_numbered_by_method(tmp_path: Path) -> None:
    output = tmp_path / "new" / "runs"
    made = [create(config(output, method=m), ALONE).name for m in ("dpo", "dpo", "kto", "dpo")]
    assert made == ["dpo-001", "dpo-002", "kto-001", "dpo-003"]
    assert all((output / name).is_dir() for name in made)


def test_the_next_number_follows_the_highest_and_other_folders_do_not_count(tmp_path: Path) -> None:
    for name in ("dpo-007", "dpo-1234", "dpo-x", "dpo-", "my-dpo-9999", "dpo-9999-old", "dpo"):
        (tmp_path / name).mkdir()
    assert create(config(tmp_path), ALONE).name == "dpo-1235"


def test_a_method_whose_name_holds_a_dot_is_numbered_alone(tmp_path: Path) -> None:
    (tmp_path / "axb-005").mkdir()
    assert create(config(tmp_path, method="a.b"), ALONE).name == "a.b-001"


def test_a_folder_that_another_process_takes_at_the_same_moment_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dpo-001").mkdir()
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))  # it was not there a moment ago
    assert create(config(tmp_path), ALONE).name == "dpo-002"


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    folder = create(config(tmp_path, name="mine"), ALONE)
    assert folder == tmp_path / "mine"
    assert create(config(tmp_path, name="mine"), ALONE) == folder  # still empty: nothing is lost
    (folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="mine exists; continue it with --resume, or choose another --name"):
        create(config(tmp_path, name="mine"), ALONE)


def test_a_name_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("notes")
    with pytest.raises(ConfigError, match="mine is a file; choose another --name"):
        create(config(tmp_path, name="mine"), ALONE)


def test_resuming_what_is_not_there_lists_the_runs_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine has no run to resume; runs in .*: none$"):
        create(config(tmp_path, name="mine", resume=True), ALONE)
    for name in ("b", "a"):
        write_config(create(config(tmp_path, name=name), ALONE), {"method": "dpo"}, resume=False)
    with pytest.raises(ConfigError, match=r"mine has no run to resume; runs in .*: a, b$"):
        create(config(tmp_path, name="mine", resume=True), ALONE)
    assert create(config(tmp_path, name="a", resume=True), ALONE) == tmp_path / "a"


# ------------------------------------------------------------------------------------------------ config.yaml


def test_a_run_is_resumed_with_the_settings_that_it_had(tmp_path: Path) -> None:
    settings = {**config(tmp_path, learning_rate=1e-5, lora=True).describe(), "beta": 0.1, "resume": False}
    write_config(tmp_path, settings, resume=False)
    written = read_yaml(tmp_path / "config.yaml")
    assert "resume" not in written
    assert written["learning_rate"] == 1e-5
    write_config(tmp_path, settings, resume=True)
    for changed in ({"beta": 0.2}, {"seed": 1}, {"batch_size": 8}, {"lora": None}):
        (name, value), *_ = changed.items()
        with pytest.raises(ConfigError, match=f"was started with other settings: {name} was .*, is {value!r}"):
            write_config(tmp_path, settings | changed, resume=True)
    assert read_yaml(tmp_path / "config.yaml") == written


def test_a_setting_that_an_earlier_build_did_not_have_had_its_default(tmp_path: Path) -> None:
    settings = config(tmp_path).describe()
    write_config(tmp_path, {k: v for k, v in settings.items() if k != "shuffle_buffer"}, resume=False)
    write_config(tmp_path, settings, resume=True, defaults=settings)
    with pytest.raises(ConfigError, match="shuffle_buffer was 1000, is 7"):
        write_config(tmp_path, settings | {"shuffle_buffer": 7}, resume=True, defaults=settings)


def test_a_setting_inside_of_another_is_named_where_it_differs(tmp_path: Path) -> None:
    """An older version had alpha 32 at every rank."""
    settings = config(tmp_path, lora={"r": 8, "alpha": 32.0}).describe()
    write_config(tmp_path, settings, resume=False)
    write_config(tmp_path, settings, resume=True)
    with pytest.raises(ConfigError, match=r"other settings: lora\.alpha was 32\.0, is 16\.0\. Resume"):
        write_config(tmp_path, config(tmp_path, lora=8).describe(), resume=True)


def test_a_setting_inside_of_another_had_its_default_too(tmp_path: Path) -> None:
    write_config(tmp_path, {"lora": {"r": 2}}, resume=False)
    defaults = {"lora": {"r": 16, "dora": False}}
    write_config(tmp_path, {"lora": {"r": 2, "dora": False}}, resume=True, defaults=defaults)
    with pytest.raises(ConfigError, match=r"lora\.dora was False, is True"):
        write_config(tmp_path, {"lora": {"r": 2, "dora": True}}, resume=True, defaults=defaults)


def test_what_changes_no_result_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    settings = config(tmp_path).describe()
    write_config(tmp_path, settings, resume=False)
    write_config(
        tmp_path,
        settings | {"max_tokens": 9, "kept_logits_gib": 0.0, "log_every": 7, "save_every": 3, "output": "elsewhere"},
        resume=True,
    )


# ---------------------------------------------------------------------------------------------- metrics.jsonl


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    file = StepLines(tmp_path / "metrics.jsonl", from_step=0)
    file.write(1, {"loss": 0.5, "kl": None})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5, "kl": None}]
    file.write(2, {"loss": 0.25})
    assert steps(tmp_path) == [1, 2]
    file.close()


def test_a_last_line_that_was_cut_off_is_left_out_when_reading(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert steps(tmp_path) == [1, 2]


def test_lines_after_the_checkpoint_and_a_line_that_was_cut_off_are_dropped_when_going_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "loss": i / 10} for i in (0, 1, 2, 3, 4)]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 5, "lo')
    file = StepLines(tmp_path / "metrics.jsonl", from_step=2)
    file.write(3, {"loss": 9.0})
    file.close()
    assert read_metrics(tmp_path) == [*lines[:3], {"step": 3, "loss": 9.0}]
    assert path.read_text().endswith("\n")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_starts_over_from_step_zero_repeats_no_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 1.0}\n{"step": 1}\n')
    file = StepLines(tmp_path / "metrics.jsonl", from_step=0)
    file.write(0, {"eval/loss": 1.0})
    file.close()
    assert steps(tmp_path) == [0]


@pytest.mark.parametrize(("evaluated", "kept"), [(2, [1, 2, 2]), (0, [1, 2]), (-1, [1, 2])])
def test_an_evaluation_that_is_done_again_leaves_no_lines(tmp_path: Path, evaluated: int, kept: list[int]) -> None:
    for name, held_out in (("metrics.jsonl", {"eval/loss": 1.0}), ("completions.jsonl", {"training": False})):
        lines = [{"step": 1}, {"step": 2, "training": True}, {"step": 2, **held_out}, {"step": 3}]
        (tmp_path / name).write_text("".join(json.dumps(x) + "\n" for x in lines))
        StepLines(tmp_path / name, from_step=2, evaluated=evaluated).close()
        assert [json.loads(x)["step"] for x in (tmp_path / name).read_text().splitlines()] == kept


def test_lines_that_are_no_metrics_do_not_stop_a_resumption(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[]\n{"no": 1}\n7\n\n{"step": 2}\n')
    StepLines(tmp_path / "metrics.jsonl", from_step=5).close()
    assert steps(tmp_path) == [1, 2]


def test_a_folder_goes_where_the_run_could_not_begin_unless_it_was_there_or_holds_more(tmp_path: Path) -> None:
    def fails(name: str, made: bool, *files: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in files:
            (folder / file).write_text("")
        with pytest.raises(KeyboardInterrupt), undone(folder, made):
            raise KeyboardInterrupt
        return folder

    assert not fails("empty", True).exists()
    assert not fails("config", True, "config.yaml").exists()
    assert fails("resumed", False, "config.yaml").is_dir()
    assert (fails("more", True, "config.yaml", "notes.txt") / "config.yaml").is_file()
