"""`alignkit convert`: configurations and scripts of TRL become settings that a run accepts, with the same numbers."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignkit import registry
from alignkit.config import read_yaml, split
from alignkit.errors import ConfigError
from alignkit.insight.convert import Converted, convert
from alignkit.reference.choice import check_reference
from alignkit.trl_names import table, trainers
from alignkit.unused import check_used

DPO_SCRIPT = """
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

raise SystemExit("this script must not be run")

MODEL = "Qwen/Qwen3-0.6B"
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
steps = len(dataset) // 64
training_args = DPOConfig(
    output_dir="out/dpo",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=8,
    learning_rate=5e-6,
    warmup_ratio=0.05,
    adam_beta2=0.95,
    beta=0.2,
    max_length=512,
    save_steps=steps,
    report_to="wandb",
    bf16=True,
    packing=True,
)
trainer = DPOTrainer(
    model=model,
    args=training_args,
    train_dataset=dataset,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]),
)
trainer.train()
"""

HELD_OUT = {"dataset_name": "a/b", "dataset_train_split": "train[:10]", "eval_strategy": "steps", "eval_steps": 20}


def converted(folder: Path, given: dict[str, Any] | str, method: str | None = None, processes: int = 1) -> Converted:
    """Convert a file, and let the settings pass every check of a run that loads nothing."""
    path = folder / ("trl.py" if isinstance(given, str) else "trl.yaml")
    path.write_text(given if isinstance(given, str) else yaml.safe_dump(given))
    found = convert(path, method, processes)
    assert yaml.safe_load(found.text("x")) == found.settings
    cls = registry.get(found.settings["method"])
    config, own = split({"model": "m", "data": "d", **found.settings}, cls.Config)
    check_used(config, cls(own))
    check_reference(config, cls(own))
    return found


def names(found: Converted) -> list[str]:
    return [name.split(" ")[0] for name, _ in found.left]


def test_a_dpo_script_becomes_the_run_that_it_is(tmp_path: Path) -> None:
    found = converted(tmp_path, DPO_SCRIPT, processes=2)
    assert found.settings == {
        "method": "dpo",
        "model": "Qwen/Qwen3-0.6B",
        "dtype": "bfloat16",
        "precision": "bf16",
        "gradient_checkpointing": True,
        "data": "trl-lib/ultrafeedback_binarized",
        "output": "out/dpo",
        "batch_size": 64,  # 4 a device, 8 accumulated, 2 processes
        "epochs": 3.0,
        "learning_rate": 5e-6,
        "weight_decay": 0.0,
        "schedule": "linear",
        "warmup_fraction": 0.05,
        "adam_betas": [0.9, 0.95],
        "trackers": ["wandb"],
        "beta": 0.2,
        "max_prompt_tokens": 512,
        "max_completion_tokens": 512,
        "lora": {"r": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    }
    left = dict(found.left)
    lines = DPO_SCRIPT.splitlines()
    assert f"line {lines.index('    save_steps=steps,') + 1} computes it: len(dataset) // 64" in left["save_steps"]
    line = lines.index("    packing=True,") + 1
    assert f"packing (line {line})" in left
    assert any(name.startswith("lora_dropout") and "compares two models" in why for name, why in found.left)


def test_a_script_is_read_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    script = f"open({str(mark)!r}, 'w')\nfrom trl import SFTConfig\nSFTConfig(seed=__import__('os').getpid())\n"
    found = converted(tmp_path, script)
    assert not mark.exists()
    assert "line 3 computes it: __import__('os').getpid()" in dict(found.left)["seed"]


def test_a_name_that_is_assigned_twice_is_not_guessed(tmp_path: Path) -> None:
    found = converted(tmp_path, "b = 1\nb = 2\nDPOConfig(beta=b, **more, seed=3)\n")
    assert {"beta", "**more"} <= set(names(found))
    assert found.settings["seed"] == 3


def test_the_defaults_of_trl_are_written_out(tmp_path: Path) -> None:
    found = converted(tmp_path, {}, "sft")
    wanted = {"epochs": 3.0, "batch_size": 8, "learning_rate": 2e-5, "schedule": "linear", "warmup_fraction": 0.0}
    assert found.settings.items() >= wanted.items()
    assert {"model", "data"} <= set(names(found))


@pytest.mark.parametrize(
    ("given", "method", "wanted"),
    [
        ({"warmup_steps": 10, "max_steps": 200}, "dpo", {"warmup_fraction": 0.05, "max_steps": 200}),
        ({"warmup_steps": 0.03}, "dpo", {"warmup_fraction": 0.03}),
        ({"lr_scheduler_type": "constant"}, "sft", {"schedule": "constant", "warmup_fraction": 0.0}),
        ({"lr_scheduler_type": "constant", "warmup_steps": 0.1}, "sft", {"warmup_fraction": 0.0}),
        ({"loss_type": "ipo", "beta": 0.3}, "dpo", {"method": "ipo", "tau": 0.3}),
        ({"beta": 0.3}, "ipo", {"method": "ipo", "tau": 0.3}),
        ({"loss_type": "hinge"}, "dpo", {"loss_type": "hinge", "beta": 0.1}),
        ({"loss_type": ["robust"], "label_smoothing": 0.1}, "dpo", {"loss_type": "robust", "label_smoothing": 0.1}),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [2.0, 1.0]}, "dpo", {"rpo_alpha": 0.5}),
        ({"loss_type": "sigmoid_norm", "beta": 5.0}, "dpo", {"length_normalised": True, "beta": 5.0}),
        ({"f_divergence_type": "js_divergence"}, "dpo", {"divergence": "js"}),
        ({"sync_ref_model": True, "ref_model_sync_steps": 64}, "dpo", {"sync_every": 64, "sync_alpha": 0.6}),
        ({"precompute_ref_log_probs": True}, "dpo", {"reference": "cached"}),
        ({"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0}, "cpo", {"gamma_ratio": 0.5, "sft_weight": 1.0}),
        ({"beta": 2.0, "simpo_gamma": 3.0, "cpo_alpha": 0.0}, "simpo", {"gamma_ratio": 1.5, "sft_weight": 0.0}),
        ({"cpo_alpha": 0.5, "label_smoothing": 0.1}, "cpo", {"alpha": 0.5, "label_smoothing": 0.1, "beta": 0.1}),
        ({"beta": 0.25, "max_completion_length": 99}, "orpo", {"lambda": 0.25, "max_completion_tokens": 99}),
        ({"center_rewards_coefficient": 0.01}, "reward", {"centring": 0.01, "learning_rate": 1e-4}),
        ({"desirable_weight": 1.33}, "kto", {"desirable_weight": 1.33, "beta": 0.1}),
        ({"optim": "paged_adamw_8bit"}, "sft", {"optimizer": "paged-adamw-8bit"}),
        ({"adam_beta1": 0.8}, "sft", {"adam_betas": [0.8, 0.999]}),
        ({"adam_epsilon": 1e-6, "max_grad_norm": 0.0}, "sft", {"adam_epsilon": 1e-6, "max_grad_norm": 0}),
        ({"delta": 2.0, "entropy_coef": 0.01}, "grpo", {"delta": 2.0, "entropy_coef": 0.01}),
        ({"top_entropy_quantile": 0.2, "beta": 0.1, "use_bias_correction_kl": False}, "grpo",
         {"top_entropy": 0.2, "kl": "k3"}),
        ({"loss_type": ["sigmoid", "hinge", "sft"], "loss_weights": [0.8, 0.2, 1.5]}, "dpo",
         {"loss_weights": {"sigmoid": 0.8, "hinge": 0.2}, "rpo_alpha": 1.5}),
        ({"push_to_hub": True, "hub_model_id": "me/model"}, "dpo", {"push_to_hub": "me/model"}),
        ({"neftune_noise_alpha": 5.0}, "sft", {"neftune_alpha": 5.0}),
        ({"normalize_advantages": True}, "rloo", {"normalise_advantages": True}),
        ({"ddp_timeout": 600, "save_steps": 50}, "sft", {"timeout_minutes": 10.0, "save_every": 50}),
        ({"save_total_limit": 3}, "sft", {"keep_checkpoints": 3}),
        ({"use_peft": True}, "sft", {"lora": {"r": 16, "alpha": 32, "dropout": 0.05}}),
        ({"use_peft": True, "load_in_4bit": True}, "dpo", {"quantize": "nf4", "lora": {"r": 16, "alpha": 32}}),
        (HELD_OUT, "dpo", {"eval_data": {"path": "a/b", "split": "test"}, "eval_every": 20}),
        (HELD_OUT, "dpo", {"data": {"path": "a/b", "split": "train[:10]"}}),
    ],
)  # fmt: skip
def test_values_keep_their_meaning(given: dict[str, Any], method: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    assert converted(tmp_path, given, method).settings.items() >= wanted.items()


def test_a_rate_without_a_point_is_a_number_as_for_trl(tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text("learning_rate: 5e-6\nwarmup_steps: 1e-1\nbeta: 2e-1\nloss_type: ipo\n")
    found = convert(tmp_path / "trl.yaml", "dpo").settings
    assert (found["learning_rate"], found["warmup_fraction"], found["tau"]) == (5e-6, 0.1, 0.2)


def test_a_grpo_config_counts_prompts_and_updates(tmp_path: Path) -> None:
    # 8 devices of 16 completions, 4 passes a step, 8 passes a batch: 1024 completions are 128 groups of 8, and two
    # updates in each of 3 passes over them; 600 updates are 100 batches
    given = {
        "per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "steps_per_generation": 8,
        "num_generations": 8, "num_iterations": 3, "max_steps": 600, "save_steps": 60, "temperature": 0.9,
        "max_completion_length": 128, "beta": 0.04, "loss_type": "dapo", "epsilon_high": 0.28,
        "reward_model_name_or_path": "my/reward", "model_name_or_path": "m", "use_vllm": True,
    }  # fmt: skip
    found = converted(tmp_path, given, "grpo", processes=8)
    wanted = {
        "batch_size": 128, "group_size": 8, "minibatches": 2, "epochs_per_batch": 3, "max_steps": 100, "save_every": 10,
        "sampling": {"temperature": 0.9, "top_p": 1.0, "top_k": 0, "max_new_tokens": 128},
        "beta": 0.04, "kl": "unbiased",
        "variant": "dapo", "clip": 0.2, "clip_high": 0.28, "scale": "group", "reward": "my/reward",
        "max_prompt_tokens": None,
    }  # fmt: skip
    assert found.settings.items() >= wanted.items()
    assert "use_vllm" in names(found)


def test_what_a_script_sets_on_its_model_and_later_is_carried_over_or_named(tmp_path: Path) -> None:
    script = """
bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained("m", quantization_config=bits, revision="abc", trust_remote_code=True)
args = SFTConfig("out", max_steps=200)
args.learning_rate = 2e-4
trainer = SFTTrainer(model, args=args, train_dataset=load_dataset("a/b"), peft_config=LoraConfig(r=8))
"""
    found = converted(tmp_path, script)
    assert (found.settings["quantize"], found.settings["lora"]["r"], found.settings["model"]) == ("nf4", 8, "m")
    left = dict(found.left)
    assert left["learning_rate"] == "line 5 assigns it later; set it by hand"
    assert {name.partition(" ")[0] for name in left} >= {"model_revision", "trust_remote_code"}


def test_a_script_with_a_reward_function_says_what_to_give(tmp_path: Path) -> None:
    script = """
def short(completions, **columns):
    return [-len(c) for c in completions]
trainer = GRPOTrainer("m", short, args=GRPOConfig("out", max_completion_length=32), train_dataset=load_dataset("a/b"))
"""
    found = converted(tmp_path, script)
    assert (found.settings["model"], found.settings["output"], found.settings["data"]) == ("m", "out", "a/b")
    assert found.settings["sampling"]["max_new_tokens"] == 32
    assert dict(found.left)["reward_funcs (line 4)"].startswith("give `reward`: functions have other arguments here")
    assert [name for name in names(found) if name == "reward_funcs"] == ["reward_funcs"]


@pytest.mark.parametrize(("second", "listed"), [("ref", True), ("None", False), ("ref_model=ref", True)])
def test_another_reference_is_listed(second: str, listed: bool, tmp_path: Path) -> None:
    found = converted(tmp_path, f'ref = load("r")\nDPOTrainer("m", {second}, args=DPOConfig(beta=0.2))\n')
    assert (found.settings["model"], found.settings["beta"]) == ("m", 0.2)
    assert ("ref_model" in names(found)) == listed


def test_cispo_clips_the_ratio_itself(tmp_path: Path) -> None:
    found = converted(tmp_path, {"loss_type": "cispo", "epsilon_high": 5.0, "reward_funcs": "rm"}, "grpo")
    assert found.settings["clip_high"] == 4.0
    with pytest.raises(ConfigError, match="cispo needs epsilon_high above 1"):
        converted(tmp_path, {"loss_type": "cispo"}, "grpo")


def test_groups_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2 completions a pass.*groups of 8; give --processes"):
        converted(tmp_path, {"per_device_train_batch_size": 2}, "grpo")


@pytest.mark.parametrize(
    ("given", "method", "words"),
    [
        ({"loss_type": "discopop"}, "dpo", "loss_type: discopop is not offered here; offered of .*: sigmoid"),
        ({"loss_type": "vespo"}, "grpo", "loss_type: vespo is not offered"),
        ({"loss_type": ["sigmoid", "ipo"]}, "dpo", r"sigmoid \+ ipo is not offered"),
        ({"learning_rate": -1.0}, "sft", "a value of the file is not possible here: learning_rate"),
        ({"beta": 0.1}, None, "does not say which trainer reads it; add --method"),
        ({"beta": 0.1}, "nash", "TRL has no configuration class for 'nash'"),
        ({"num_train_epochs": [1]}, "sft", "trl.yaml has a value of another type than TRL's: float.. argument"),
        ({"num_generations": 0}, "grpo", "trl.yaml has a value of another type than TRL's: .*division"),
        ("x = 1", None, "builds no configuration class of TRL"),
        ("DPOConfig(beta=0.1)\nDPOConfig(beta=0.2)", None, "DPOConfig in line 1, DPOConfig in line 2"),
        ("def f(:", None, "line 1 is not Python"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted(given: Any, method: str | None, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        converted(tmp_path, given, method)


@pytest.mark.parametrize(
    ("given", "method", "name"),
    [
        ({"warmup_steps": 100}, "dpo", "warmup_steps"),
        ({"label_smoothing": 0.1}, "dpo", "label_smoothing"),
        ({"eval_strategy": "epoch"}, "dpo", "eval_strategy"),
        ({"eval_strategy": "steps", "eval_steps": 5}, "dpo", "eval_steps"),
        ({"max_length": 512}, "sft", "max_length"),
        ({"use_peft": True}, "sft", "target_modules"),
        ({"fp16": True}, "sft", "fp16"),
        ({"trust_remote_code": True}, "sft", "trust_remote_code"),
        ({"deepspeed": "zero3.json"}, "sft", "deepspeed"),
        ({"run_name": "two words"}, "sft", "run_name"),
        ({"per_device_eval_batch_size": 4}, "sft", "per_device_eval_batch_size"),
        ({"betaa": 4}, "sft", "betaa"),
    ],
)
def test_what_is_not_carried_over_is_listed(given: dict[str, Any], method: str, name: str, tmp_path: Path) -> None:
    why = dict(converted(tmp_path, given, method).left)[name]
    assert why


def test_what_is_switched_off_is_not_listed(tmp_path: Path) -> None:
    off = {"packing": False, "use_vllm": False, "eval_strategy": "no", "push_to_hub": False, "deepspeed": None}
    assert not set(names(converted(tmp_path, off, "sft"))) & set(off)


@pytest.mark.parametrize("cls", sorted(trainers()))
def test_every_field_of_trls_classes_can_be_given(cls: str, tmp_path: Path) -> None:
    import trl

    module = "trl" if hasattr(trl, cls) else f"trl.experimental.{cls.removesuffix('Config').lower()}"
    fields = dataclasses.fields(getattr(importlib.import_module(module), cls))
    given = {f.name: f.default for f in fields if isinstance(f.default, str | int | float | bool | None)}
    given |= {"reward_funcs": "rm"} if registry.get(trainers()[cls]["method"]).data == "prompts" else {}
    assert len(given) > 100
    converted(tmp_path, given, trainers()[cls]["method"])


def test_the_script_on_the_page_becomes_the_run_next_to_it(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs/from-trl.md").read_text(encoding="utf-8")
    theirs, ours = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    call = next(node for node in ast.walk(ast.parse(ours)) if isinstance(node, ast.Call))
    given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    own, theirs_converted = (
        split({"method": "dpo", **settings}, registry.get("dpo").Config)
        for settings in (given, converted(tmp_path, theirs).settings)
    )
    both = [run.describe() | method.model_dump() for run, method in (own, theirs_converted)]
    different = {k for k in both[0] if both[0][k] != both[1][k]}
    assert different == {"gradient_checkpointing"}


def test_the_rules_use_names_that_the_table_has() -> None:
    from alignkit.insight.convert import learning, model

    assert {*learning.SAME, *model.LORA} - table().keys() == {"rpo_alpha"}


def test_from_the_command_line(command: Any, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(DPO_SCRIPT)
    code, out, err = command("convert", "train.py")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["batch_size"] == 32
    assert "# not carried over as it is:\n#   " in out
    code, out, err = command("convert", "train.py", "-o", "run.yaml", "--processes", 2)
    assert code == 0
    assert "run.yaml: dpo, " in out
    assert "not carried over as it is: packing (line " in out
    assert read_yaml(tmp_path / "run.yaml")["batch_size"] == 64
    code, _, err = command("convert", "train.py", "-o", "run.yaml")
    assert (code, "'run.yaml' exists; give another --output, or --force" in err) == (2, True)
    assert command("convert", "train.py", "-o", "run.yaml", "--force")[0] == 0
    assert command("convert", "none.py")[0] == 2
