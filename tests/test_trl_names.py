"""The table of TRL's settings: complete against trl, transformers and peft, and true of our own settings; its hints."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from functools import cache
from typing import Any

import pytest

from alignkit import registry
from alignkit.config import RunConfig, split
from alignkit.errors import ConfigError
from alignkit.hints import hint, names_of
from alignkit.trl_names import OLDER, VERSION, adapters, table, trainers

NEEDED = {"model": "m", "data": "d.jsonl"}


@cache
def classes() -> dict[str, Any]:
    """Every configuration class of trl, and those of peft and of its scripts."""
    import peft
    import trl
    from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments

    found = {"LoraConfig": peft.LoraConfig, "ScriptArguments": ScriptArguments, "Mixture": DatasetMixtureConfig}
    for module in pkgutil.walk_packages(trl.__path__, "trl."):
        if re.search(r"_config$|scripts\.(grpo|rloo)$", module.name):
            for name, cls in vars(importlib.import_module(module.name)).items():
                if dataclasses.is_dataclass(cls) and name.endswith(("Config", "ScriptArguments")):
                    found[name] = cls
    return found


def fields_of(cls: Any) -> dict[str, Any]:
    """Fields and their defaults."""
    made = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(cls)
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in made.items()}


def all_fields() -> set[str]:
    return {name for cls in classes().values() for name in fields_of(cls)}


def test_the_classes_are_those_of_the_version_that_the_table_was_made_for() -> None:
    import trl

    assert trl.__version__ == VERSION
    assert {"SFTConfig", "DPOConfig", "GRPOConfig", "KTOConfig", "ModelConfig", "CPOConfig"} <= set(classes())
    assert len(all_fields()) > 350


def test_every_field_is_in_the_table_and_every_name_in_the_table_is_a_field() -> None:
    named = {name for name, entry in table().items() if entry.section != OLDER}
    assert all_fields() - named == set()
    assert named - all_fields() == set()


def test_older_names_are_no_fields_any_more() -> None:
    older = {name for name, entry in table().items() if entry.section == OLDER}
    assert older
    assert older & all_fields() == set()


def test_every_name_of_ours_is_a_setting_of_the_run_or_of_the_methods_that_it_is_given_for() -> None:
    run = set(names_of(RunConfig))
    for entry in table().values():
        for methods, ours in entry.to.items():
            own = [{n.rstrip("_") for n in names_of(registry.get(m).Config)} for m in methods]
            assert all(ours in run | names for names in own) if own else ours in run, (entry.name, ours)


def test_a_name_without_a_counterpart_says_what_to_do() -> None:
    assert [e.name for e in table().values() if not e.to and not e.note] == []


def test_the_methods_and_defaults_of_trls_classes_are_those_of_trl() -> None:
    for name, one in trainers().items():
        theirs = fields_of(classes()[name])
        assert {k: theirs[k] for k in one["defaults"]} == one["defaults"], name
        assert one["method"] in registry.names()
    for name, defaults in adapters().items():
        assert {k: fields_of(classes()[name])[k] for k in defaults} == defaults


# ------------------------------------------------------------------------------------------------------- hints


def refusal(method: str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        split({**NEEDED, "method": method, **settings}, registry.get(method).Config)
    return str(error.value)


@pytest.mark.parametrize(
    ("method", "theirs", "ours"),
    [
        ("dpo", "warmup_steps", "warmup_fraction"),
        ("dpo", "warmup_ratio", "warmup_fraction"),
        ("dpo", "logging_steps", "log_every"),
        ("dpo", "save_steps", "save_every"),
        ("dpo", "eval_steps", "eval_every"),
        ("grpo", "max_completion_length", "sampling.max_new_tokens"),
        ("orpo", "max_completion_length", "max_completion_tokens"),
        ("ppo", "num_ppo_epochs", "epochs_per_batch"),
        ("grpo", "steps_per_generation", "minibatches"),
        ("dpo", "adam_beta2", "adam_betas"),
        ("ppo", "kl_coef", "beta"),
        ("ppo", "kl_estimator", "kl"),
        ("dpo", "ref_model_mixup_alpha", "sync_alpha"),
        ("dpo", "max_length", "max_completion_tokens"),
        ("dpo", "gradient_accumulation_steps", "batch_size"),
        ("dpo", "report_to", "trackers"),
        ("grpo", "temperature", "sampling.temperature"),
        ("dpo", "bf16", "precision"),
        ("grpo", "num_generations", "group_size"),
        ("simpo", "simpo_gamma", "gamma_ratio"),
        ("reward", "center_rewards_coefficient", "centring"),
        ("dpo", "precompute_ref_log_probs", "reference"),
        ("ipo", "beta", "tau"),
        ("orpo", "beta", "lambda"),
        ("ipo", "loss_type", "method"),
        ("dpo", "lora_alpha", "lora.alpha"),
        ("dpo", "lora.lora_r", "lora.r"),
        ("grpo", "sampling.max_completion_length", "sampling.max_new_tokens"),
    ],
)
def test_a_name_of_trl_gets_the_name_that_means_the_same(method: str, theirs: str, ours: str) -> None:
    said = refusal(method, **{theirs: 1})
    assert f"unknown setting '{theirs}'. TRL's '{theirs.rpartition('.')[2]}' is '{ours}' here" in said
    assert "Did you mean" not in said


@pytest.mark.parametrize(("theirs", "ours"), [("lora_alpha", "alpha"), ("lora_dropout", "dropout")])
def test_a_name_of_peft_inside_of_lora_gets_its_name(theirs: str, ours: str) -> None:
    assert f"'{theirs}', a setting of peft, cannot be set here: write {ours}" in refusal("dpo", **{f"lora.{theirs}": 1})


@pytest.mark.parametrize("name", ["packing", "use_vllm", "use_weighting", "deepspeed", "min_p"])
def test_a_name_without_a_counterpart_says_so_and_suggests_no_other_setting(name: str) -> None:
    said = refusal("grpo", **{name: 1})
    assert f"TRL's '{name}' has no counterpart here: " in said
    assert "Did you mean" not in said


def test_a_name_that_only_other_methods_have_names_them() -> None:
    assert "TRL's 'num_generations' is 'group_size' of grpo, rloo" in refusal("dpo", num_generations=4)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("learning_rte", "learning_rate"),
        ("bacth_size", "batch_size"),
        ("batchsize", "batch_size"),
        ("sampling.temprature", "sampling.temperature"),
        ("lora.alpah", "lora.alpha"),
        ("Seed", "seed"),
        ("adam-betas", "adam_betas"),
    ],
)
def test_a_typing_error_gets_the_setting_that_was_meant(wrong: str, right: str) -> None:
    assert f"unknown setting '{wrong}'. Did you mean '{right}'?" in refusal("grpo", **{wrong: 1})


@pytest.mark.parametrize(
    "word",
    ["train_steps", "min_tokens", "eval_batch", "log_dir", "beta3", "sampling.top_j", "value_cof_", "top_probability"],
)
def test_another_word_gets_no_guess(word: str) -> None:
    assert hint(word, {*names_of(RunConfig), "beta"}) == ""
