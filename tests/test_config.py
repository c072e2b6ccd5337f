"""Settings: what is refused and in which words, and that a file gives back what was written to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from alignkit import registry
from alignkit.config import RunConfig, read_yaml, split, validated, write_yaml
from alignkit.errors import ConfigError, nearest
from alignkit.lora_settings import LoraSettings
from alignkit.method import MethodConfig

NEEDED = {"method": "mine", "model": "m", "data": "d.jsonl"}


class Own(MethodConfig):
    """Settings of a method of our own."""

    beta: float = Field(0.1, gt=0, description="a number")
    kind: str = Field("a", description="a word")


def run_config(**settings: Any) -> RunConfig:
    return split({**NEEDED, **settings}, Own)[0]


@pytest.mark.parametrize(
    ("wrong", "right"), [("learning_rat", "learning_rate"), ("bta", "beta"), ("batchsize", "batch_size")]
)
def test_an_unknown_setting_is_named_with_the_nearest_one_of_run_and_method(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown setting '{wrong}'. Did you mean '{right}'") as error:
        split({**NEEDED, wrong: 1}, Own)
    assert "Settings of mine: beta, kind" in str(error.value)


def test_a_setting_like_no_other_is_named_without_a_guess() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'zzzzzz'\. Settings of mine"):
        split({**NEEDED, "zzzzzz": 1}, Own)
    assert nearest("zzzzzz", ["beta"]) == ""


def test_every_wrong_value_of_the_run_and_of_the_method_is_in_one_error_with_the_value() -> None:
    bad = {"learning_rate": -3, "batch_size": "many", "layout": "tree", "beta": -0.5}
    with pytest.raises(ConfigError) as error:
        split({**NEEDED, **bad}, Own)
    text = str(error.value)
    assert "\n" not in text
    for name, shown in {"learning_rate": "-3", "batch_size": "'many'", "layout": "'tree'", "beta": "-0.5"}.items():
        assert f"{name}: " in text
        assert f"(given: {shown})" in text


def test_a_flood_of_wrong_values_is_counted_after_the_first_eight() -> None:
    names = [n for n, f in RunConfig.model_fields.items() if f.annotation in (int, float, bool)][:11]
    with pytest.raises(ConfigError, match=r"; and 3 more$"):
        split({**NEEDED, **dict.fromkeys(names, "wrong")}, Own)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^model: Field required; data: Field required$"):
        split({"method": "mine"}, Own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resume": True}, "resume needs the run's `name`"),
        ({"merge_adapter": True}, "merge_adapter needs `lora`"),
        ({"eval_data": "e", "eval_fraction": 0.1}, "give eval_data or eval_fraction, not both"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        run_config(**settings)
    assert "given" not in str(error.value)


def test_a_long_value_is_shown_in_part() -> None:
    with pytest.raises(ConfigError) as error:
        run_config(batch_size="x" * 10_000)
    assert len(str(error.value)) < 300


def test_settings_cannot_be_changed_afterwards() -> None:
    config = run_config()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------- run names


@pytest.mark.parametrize(
    "name", ["..", ".", "...", "", "a/b", "/tmp/x", "../up", "a\\b", "a b", "a\n", "a\0", "~", "x" * 300]
)
def test_a_name_that_would_leave_the_folder_of_runs_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"name: .*stays inside `output`"):
        run_config(name=name)


@given(st.text(max_size=20) | st.text(alphabet="./\\~ab-\n\0:", max_size=8))
def test_any_accepted_name_is_a_folder_in_the_folder_of_runs(name: str) -> None:
    try:
        config = run_config(name=name, output="/runs")
    except ConfigError:
        return
    folder = (config.output / str(config.name)).resolve()
    assert folder.parent == Path("/runs").resolve()
    assert folder.name == name


@given(st.from_regex(r"[A-Za-z0-9_+=-][A-Za-z0-9_.+=-]{0,30}", fullmatch=True))
def test_letters_digits_and_a_few_signs_make_a_name(name: str) -> None:
    assert run_config(name=name).name == name


# -------------------------------------------------------------------------------------------------------- YAML


def test_a_rate_written_as_1e_5_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("method: mine\nmodel: m\ndata: d\nlearning_rate: 1e-5\nbeta: 2e-1\n")
    run, own = split(read_yaml(tmp_path / "c.yaml"), Own)
    assert run.learning_rate == 1e-5
    assert own == Own(beta=0.2)


@pytest.mark.parametrize("value", ["true", "yes", "'no'", "1", "[x]"])
def test_trust_remote_code_in_a_yaml_file_is_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"method: mine\ntrust_remote_code: {value}\n")
    with pytest.raises(
        ConfigError, match=r"c\.yaml sets trust_remote_code, which only the command line or a Python call"
    ):
        read_yaml(path)


def test_trust_remote_code_is_off_in_a_yaml_file_that_says_so_and_never_written_to_one(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("trust_remote_code: false\n")
    assert read_yaml(path) == {"trust_remote_code": False}
    write_yaml(path, run_config(trust_remote_code=True).describe())
    assert "trust_remote_code" not in path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML: "),
        ("- a\n- b\n", r"must contain settings such as 'method: dpo', found list"),
        ("just words", "found str"),
        ("", "found NoneType"),
        ("a: !!python/object/apply:os.system ['true']", "is not YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(path)
    assert "\n" not in str(error.value)
    assert "c.yaml" in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml: No such file or directory"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml is not YAML"):
        read_yaml(tmp_path / "latin.yaml")


SETTINGS = [
    {},
    {"lora": True, "merge_adapter": True, "learning_rate": 1e-5, "adam_betas": [0.8, 0.95]},
    {"columns": {"prompt": "question", "chosen": "besser: ja"}, "name": "run-1", "output": "some/where"},
    {"model": "modell mit ünïcode", "trackers": "tensorboard,wandb", "max_prompt_tokens": None},
    {"lora": {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "eval_fraction": 0.1},
    {"rollout": {"backend": "vllm", "servers": 2, "program": "some/vllm", "sync_folder": "shared/weights"}},
    {"data": "1e-5", "model": "yes", "seed": 1234567890, "cache_file": "c.sqlite", "beta": 1e-7, "kind": "null"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_described_and_written_is_read_back_as_the_same_settings(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run, own = split({**NEEDED, **settings}, Own)
    path = tmp_path / "config.yaml"
    write_yaml(path, {**run.describe(), **own.model_dump(mode="json")})
    assert split(read_yaml(path), Own) == (run, own)


def test_a_file_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    write_yaml(path, {"model": "ünï"})
    assert path.read_bytes() == "model: ünï\n".encode()


def test_objects_that_cannot_be_written_are_described_by_their_type() -> None:
    described = run_config(model=object(), data=[{"prompt": "secret"}], tokenizer=Own(), eval_data=({},)).describe()
    assert described["model"] == "<object>"
    assert described["data"] == "<list>"
    assert described["eval_data"] == "<tuple>"
    assert all(isinstance(v, str | int | float | bool | list | dict | None) for v in described.values())
    assert "secret" not in str(described)


# -------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(
    ("given_", "want"),
    [
        (True, LoraSettings()),
        ("true", LoraSettings()),
        (8, LoraSettings(r=8)),
        ("8", LoraSettings(r=8)),
        ({"r": 4, "alpha": 8}, LoraSettings(r=4, alpha=8.0)),
        ({}, LoraSettings()),
        (False, None),
        ("false", None),
        (None, None),
    ],
)
def test_lora_is_a_flag_a_rank_or_a_mapping(given_: Any, want: LoraSettings | None) -> None:
    assert run_config(lora=given_).lora == want


@pytest.mark.parametrize(
    ("given_", "alpha", "alphas"),
    [
        (True, 32, {}), (8, 16, {}), (256, 512, {}), ({"alpha": 5, "r": 8}, 5, {}), ({"rslora": True, "r": 64}, 8, {}),
        ({"r": 8, "rank_pattern": {"q_proj": 32}}, 16, {"q_proj": 64}),
        ({"r": 8, "alpha": 20, "rank_pattern": {"q_proj": 32}}, 20, {}),
        ({"rslora": True, "rank_pattern": {"q_proj": 32}}, 8, {}),
        ({"r": 8, "rank_pattern": {"q_proj": 32}, "alpha_pattern": {"q_proj": 3}}, 16, {"q_proj": 3}),
    ],
)  # fmt: skip
def test_the_scale_of_lora_is_2_at_every_rank(given_: Any, alpha: float, alphas: dict[str, float]) -> None:
    lora = run_config(lora=given_).lora
    assert lora is not None
    assert (lora.alpha, lora.alpha_pattern) == (alpha, alphas)
    assert LoraSettings(**lora.model_dump()) == lora  # what a run's config.yaml holds is what it trained with


@pytest.mark.parametrize(
    ("given_", "message"),
    [(0, r"lora\.r: .*greater than or equal to 1.*given: 0"), ("many", r"lora\.r: .*given: 'many'"),
     ({"rank": 4}, r"unknown setting 'lora\.rank'"), (1.5, "lora: ")],
)  # fmt: skip
def test_a_wrong_lora_is_refused_with_the_part_that_is_wrong(given_: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config(lora=given_)


# ----------------------------------------------------------------------------------------------- every setting


@pytest.mark.parametrize("cls", [RunConfig, LoraSettings])
def test_every_setting_of_a_run_says_what_it_is(cls: Any) -> None:
    assert [n for n, f in cls.model_fields.items() if not f.description] == []


def test_every_default_passes_its_own_check() -> None:
    config = run_config()
    assert validated(RunConfig, dict(config)) == config


def test_no_installed_method_has_a_setting_that_the_run_has_and_all_say_what_they_are() -> None:
    listed = registry.plugins()
    assert {"sft", "dpo", "ipo", "kto", "orpo", "simpo", "cpo"} <= {p.name for p in listed}
    for plugin in listed:
        assert plugin.method is not None, plugin.problem
        fields = plugin.method.Config.model_fields
        assert not set(fields) & set(RunConfig.model_fields), plugin.name
        assert [n for n, f in fields.items() if not f.description] == [], plugin.name
        assert plugin.method.Config.model_config["extra"] == "forbid"
        assert plugin.method.Config.model_config["frozen"]


def test_a_setting_of_a_mapping_may_be_named_alone() -> None:
    given = {"method": "grpo", "model": "m", "data": "d", "sampling": {"top_p": 0.9}, "sampling.temperature": 0.7}
    run, _ = split(given, MethodConfig)
    assert (run.sampling.top_p, run.sampling.temperature, run.sampling.max_new_tokens) == (0.9, 0.7, 256)
    with pytest.raises(ConfigError, match=r"sampling.temperatur"):
        split({"method": "grpo", "model": "m", "data": "d", "sampling.temperatur": 0.7}, MethodConfig)
    with pytest.raises(ConfigError, match=r"'lora.alpha' cannot be combined with 'lora: 8'; give `lora` as a mapping"):
        split({"method": "grpo", "model": "m", "data": "d", "lora": 8, "lora.alpha": 4}, MethodConfig)
