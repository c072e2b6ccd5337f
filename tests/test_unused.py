"""Settings that a method cannot use: refused where they were given, wherever they could be ignored in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import alignkit
from alignkit import registry
from alignkit.compare.jobs import check_settings
from alignkit.config import RunConfig, split
from alignkit.engine import Engine
from alignkit.engine.phases import Run
from alignkit.errors import ConfigError
from alignkit.runs.stages import check, resolve
from alignkit.unused import check_used, given, unused
from helpers import make_rows

NEEDED = {"model": "m", "data": "d.jsonl"}


def checked(method: str, shared: set[str] | None = None, **settings: Any) -> None:
    cls = registry.get(method)
    config, own = split({**NEEDED, "method": method, **settings}, cls.Config)
    check_used(config, cls(own), shared or set())


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        (
            "grpo",
            {"max_completion_tokens": 8},
            "'grpo' samples its completions, whose limit is `sampling.max_new_tokens`; remove `max_completion_tokens`",
        ),
        ("ppo", {"max_completion_tokens": None}, "remove `max_completion_tokens`"),
        ("dpo", {"sampling.temperature": 0.7}, "'dpo' does not sample completions; remove `sampling.temperature`"),
        ("sft", {"sampling": {"max_new_tokens": 8}}, "remove `sampling.max_new_tokens`"),
        ("dpo", {"reward": "numeric"}, "'dpo' does not use a reward; remove `reward`"),
        ("grpo", {"judge": "m:f"}, "'grpo' does not use a judge; remove `judge`"),
        ("grpo", {"critic": "shared"}, "'grpo' does not train a critic; remove `critic`"),
        ("dpo", {"critic_learning_rate": 1e-5}, "remove `critic_learning_rate`"),
        ("sft", {"reference": "full"}, "'sft' does not use a reference with these settings; remove `reference`"),
        ("grpo", {"reference": "full", "beta": 0}, "'grpo' does not use a reference with these settings"),
        ("orpo", {"reference_cache": False}, "remove `reference_cache`"),
        ("grpo", {"reference_cache": False}, "remove `reference_cache`"),
        ("dpo", {"reference_cache": False, "sync_every": 2}, "remove `reference_cache`"),
        (
            "rloo",
            {"train_on": "last"},
            "learns from sampled completions, not from answers in the rows; remove `train_on`",
        ),
        ("nash", {"on_dropped": "report"}, "remove `on_dropped`"),
        ("reward", {"kept_logits_gib": 0.0}, "has a head with one output, and no logits; remove `kept_logits_gib`"),
        (
            "dpo",
            {"eval_every": 5},
            "'dpo' has no held-out rows, which eval_data or eval_fraction would set; remove `eval_every`",
        ),
        ("dpo", {"patience": 5}, "remove `patience`"),
    ],
)
def test_a_setting_that_a_method_cannot_use_is_refused(method: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        checked(method, **settings)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dpo", {"max_completion_tokens": 8, "reference": "full", "reference_cache": False, "train_on": "last"}),
        ("grpo", {"sampling.temperature": 0.7, "reward": "numeric", "reference": "full"}),
        ("ppo", {"critic": "shared", "critic_learning_rate": 1e-5, "minibatches": 2, "epochs_per_batch": 3}),
        ("kto", {"reference_cache": False}),
        ("dpo", {"eval_every": 5, "patience": 2, "eval_fraction": 0.1}),
        ("sft", {"eval_every": 5, "eval_data": "e.jsonl", "kept_logits_gib": 0.5, "minibatches": 2}),
    ],
)
def test_settings_that_a_method_uses_are_accepted(method: str, settings: dict[str, Any]) -> None:
    checked(method, **settings)


@pytest.mark.parametrize("method", registry.names())
def test_defaults_that_are_written_out_are_accepted(method: str) -> None:
    # a run's config.yaml lists every setting
    cls = registry.get(method)
    config, own = split({**NEEDED, "method": method}, cls.Config)
    again, own = split({**config.describe(), **own.model_dump(mode="json")}, cls.Config)
    check_used(again, cls(own))
    assert given(again) == ["method"] or given(again) == []


def test_rows_in_a_padded_layout_have_no_width_to_set() -> None:
    with pytest.raises(ConfigError, match="row_tokens has an effect with layout: auto or forest only; remove it"):
        checked("dpo", layout="padded", row_tokens=64)


# settings that every method can use, that RunConfig checks itself, or that are places
FREE = [
    "method", "model", "data", "tokenizer", "eval_data", "eval_fraction", "columns", "order_by", "streaming",
    "shuffle_buffer", "tools", "chat_template_kwargs", "special_tokens_in_text", "template_date", "output",
    "name", "resume", "cache_file", "lora", "quantize", "merge_adapter",
    "push_to_hub", "neftune_alpha", "epochs", "max_steps", "batch_size",
    "epochs_per_batch", "minibatches", "learning_rate", "schedule", "warmup_fraction", "decay_fraction",
    "optimizer", "weight_decay", "adam_betas", "adam_epsilon", "momentum", "max_grad_norm", "max_skipped_steps",
    "max_prompt_tokens", "max_tokens", "layout", "row_tokens", "attention", "device", "precision", "dtype",
    "gradient_checkpointing", "torch_compile", "fsdp", "fsdp_replicas", "timeout_minutes", "trust_remote_code",
    "allow_changed_models", "seed",
    "log_every", "save_every", "save_minutes", "keep_checkpoints", "trackers", "callbacks", "health", "stop_on",
    "quiet", "rows_cache",
]  # fmt: skip


def test_every_setting_of_a_run_is_ruled_or_free() -> None:
    ruled = set()
    for name in registry.names():
        cls = registry.get(name)
        config, own = split({**NEEDED, "method": name}, cls.Config)
        ruled |= unused(config, cls(own)).keys()
    assert sorted([*ruled, *FREE]) == sorted(RunConfig.model_fields)


def test_a_run_refuses_before_it_loads_anything() -> None:
    with pytest.raises(ConfigError, match="'grpo' samples its completions"):
        alignkit.run("grpo", model="no/such", data=[], reward="numeric", max_completion_tokens=8)
    with pytest.raises(ConfigError, match="'dpo' does not sample completions"):
        Run("dpo", model="no/such", data=[], sampling={"top_k": 3})


def test_an_engines_setting_may_serve_its_other_runs_only(settings: dict[str, Any]) -> None:
    engine = Engine(**settings | {"max_steps": 1}, sampling={"max_new_tokens": 4})
    assert engine.run("sft", data=make_rows("text", 8)).metrics["loss"] > 0
    with pytest.raises(ConfigError, match=r"'sft' does not sample completions; remove `sampling.top_k`"):
        engine.run("sft", data=make_rows("text", 8), sampling={"top_k": 3})


def test_a_resumed_run_keeps_what_it_was_started_with(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"name": "old", "data": make_rows("text", 8), "max_steps": 2, "save_every": 1}
    Engine(**settings, eval_every=3).run("sft")
    assert "eval_every: 3" in (tmp_path / "runs/old/config.yaml").read_text()
    with pytest.raises(ConfigError, match="remove `eval_every`"):
        alignkit.run("sft", **settings | {"name": "new"}, eval_every=3)
    alignkit.run("sft", **settings, eval_every=3, resume=True)


def test_compare_refuses_what_none_of_its_methods_can_use() -> None:
    methods = {name: registry.get(name) for name in ("sft", "dpo", "grpo")}
    check_settings({"reference": "full", "max_completion_tokens": 64, "sampling.top_k": 5}, methods)
    with pytest.raises(ConfigError, match="`critic` has no effect: 'sft' does not train a critic, 'dpo' does not"):
        check_settings({"critic": "shared"}, methods)
    with pytest.raises(ConfigError, match="`eval_every` has no effect: 'sft' has no held-out rows"):
        check_settings({"eval_every": 5}, methods)


def test_a_pipeline_may_share_what_one_stage_uses_and_refuses_what_none_does() -> None:
    stages = [{"method": "sft"}, {"method": "grpo", "reward": "numeric"}]
    shared = {"model": "m", "data": [{"prompt": "a", "completion": "b", "answer": "1"}]}
    sft, grpo = resolve(stages, {**shared, "sampling.top_k": 5, "max_completion_tokens": 9})
    assert "sampling" in sft.shared
    assert "sampling" not in grpo.shared
    assert "max_completion_tokens" in grpo.shared
    assert [s.shared for s in resolve([{"method": "sft"}, {"method": "sft", "name": "again"}], shared)] == [
        frozenset(),
        frozenset(),
    ]
    check_used(sft.config, sft.method, sft.shared)
    check_used(grpo.config, grpo.method, grpo.shared)
    # pipeline.yaml repeats shared settings in each stage
    sft, grpo = resolve([sft.written(), grpo.written()], {})
    check_used(sft.config, sft.method, sft.shared)
    with pytest.raises(ConfigError, match="stage 'sft': 'sft' does not train a critic; remove `critic`"):
        check(resolve(stages, {**shared, "critic": "shared"}))
    with pytest.raises(ConfigError, match=r"stage 'sft': 'sft' does not sample completions; remove `sampling.top_k`"):
        check(resolve([{"method": "sft", "sampling": {"top_k": 5}}, stages[1]], shared))
