"""LoRA's settings: what each computes, the reference beside it, and that the saved adapter applies to the base."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel
from test_engine import lines, same
from torch import nn
from zoo import config, examples, fresh, model_of

import alignkit
from alignkit.errors import ConfigError, ModelError
from alignkit.lora_settings import PEFT_INITS, PEFT_SETTINGS, LoraSettings
from alignkit.models.adapters import add_lora, before_training, has_start, summary
from alignkit.models.packing import batch_of
from alignkit.models.scoring import Scorer
from alignkit.runs.folder import read_metrics
from alignkit.types import Layout
from helpers import killed_before, make_rows, write_tiny

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "patterns": {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 4.0}},
    "layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["k_proj", "v_proj"]},
    "biases": {"bias": "all"},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "fast pissa": {"init": "pissa_niter_4"},
    "olora": {"init": "olora"},
    "pissa, ranks of its own": {"init": "pissa", "rank_pattern": {"q_proj": 3}},
    "pissa, rslora": {"init": "pissa", "rslora": True},
}


def adapted(name: str = "llama", moved: bool = False, **settings: Any) -> Any:
    torch.manual_seed(1)
    model = add_lora(fresh(name), LoraSettings(**{"r": 4, "alpha": 8.0, **settings}))
    for n, p in model.named_parameters():
        if moved and p.requires_grad and n.endswith(("lora_A.default.weight", "lora_B.default.weight", "bias")):
            with torch.no_grad():
                p.add_(torch.randn_like(p) * 0.2)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ what is computed


def test_rslora_multiplies_the_update_by_alpha_over_the_root_of_r() -> None:
    layer = adapted(moved=True, rslora=True).get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    x = torch.randn(5, 48)
    want = x.double() @ (layer.base_layer.weight.double() + 8 / math.sqrt(4) * b @ a).T
    torch.testing.assert_close(layer(x).double(), want, rtol=0, atol=1e-4)
    assert float((x.double() @ (8 / 4 * b @ a - 8 / 2 * b @ a).T).abs().max().detach()) > 0.1  # alpha / r would differ


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 2}, "r 2, alpha 4, scale 2)"), ({"r": 9, "rslora": True}, "r 9, alpha 8, scale 2.67)"),
        ({"r": 4, "rank_pattern": {"q_proj": 6}}, "r 4, alpha 8, scale 2; r 6, alpha 12, scale 2)"),
        ({"r": 4, "alpha": 8, "alpha_pattern": {"q_proj": 6}}, "r 4, alpha 8, scale 2; r 4, alpha 6, scale 1.5)"),
    ],
)  # fmt: skip
def test_the_log_says_the_scale_that_the_layers_have(settings: dict[str, Any], said: str) -> None:
    model = add_lora(fresh("llama"), LoraSettings(**settings))
    assert said in summary(model)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert f"scale {layer.scaling['default']:.3g}" in said  # type: ignore[index]


def test_dora_scales_each_row_to_its_learned_length() -> None:
    layer = adapted(moved=True, dora=True).get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    with torch.no_grad():
        lengths = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(lengths, layer.base_layer.weight.norm(dim=1))
        lengths.mul_(torch.linspace(0.5, 2, len(lengths)))
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    direction = layer.base_layer.weight.double() + 8 / 4 * b @ a
    x = torch.randn(5, 48)
    want = x.double() @ (lengths.double()[:, None] * direction / direction.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(layer(x).double(), want, rtol=0, atol=1e-4)


def test_patterns_layers_and_exclusions_choose_ranks_scales_and_places() -> None:
    model = adapted(
        layers_to_transform=[0, 2], rank_pattern={"q_proj": 6}, alpha_pattern={r"layers\.0\.mlp\.up_proj": 3.0},
        exclude_modules=["k_proj"],
    )  # fmt: skip
    found = {n.split("model.layers.")[1]: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {n.split(".")[0] for n in found} == {"0", "2"}
    assert {n.rsplit(".", 1)[1] for n in found} == {
        "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert {n: m.r["default"] for n, m in found.items() if m.r["default"] != 4} == {
        "0.self_attn.q_proj": 6, "2.self_attn.q_proj": 6
    }  # fmt: skip
    scales = {n: m.scaling["default"] for n, m in found.items()}
    assert scales["0.mlp.up_proj"] == 3 / 4
    assert scales["2.mlp.up_proj"] == 8 / 4
    assert scales["0.self_attn.q_proj"] == 8 / 6


def test_layers_can_be_chosen_in_gpt_2_whose_linear_layers_are_conv1d() -> None:
    model = adapted("gpt 2", layers_to_transform=[1])
    names = {n for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {n.split("transformer.h.")[1] for n in names} == {
        "1.attn.c_attn",
        "1.attn.c_proj",
        "1.mlp.c_fc",
        "1.mlp.c_proj",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, r"lora\.target_modules: 'v_porj' matches no module.*mean 'v_proj'"),
        ({"modules_to_save": ["lm_haed"]}, "lm_haed"),
        ({"rank_pattern": {"w_proj": 2}}, r"lora\.rank_pattern: 'w_proj' matches no module"),
        ({"alpha_pattern": {"layers.7.mlp": 2.0}}, r"lora\.alpha_pattern: 'layers\.7\.mlp' matches no module"),
        ({"layers_to_transform": [1, 3]}, r"layer 3 has no module to adapt; the model's layers are 0 to 2"),
        ({"exclude_modules": "nothing"}, "exclude_modules|nothing"),
    ],
)  # fmt: skip
def test_a_name_that_matches_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        add_lora(fresh("llama"), LoraSettings(**settings))


# --------------------------------------------------------------------------------------- the model before training


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "biases"])
def test_before_training_it_is_the_original_model_whatever_was_learned(variant: str) -> None:
    model = adapted(**VARIANTS[variant])
    original, start = logits(model_of("llama")), logits(model)
    torch.testing.assert_close(start, original, rtol=0, atol=2e-3 if has_start(model) else 1e-4)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in trained:
                p.add_(torch.randn_like(p) * 0.1)
    assert float((logits(model) - original).abs().max()) > 0.1
    learned = logits(model)
    with before_training(model):
        back = logits(model)
    torch.testing.assert_close(back, original, rtol=0, atol=2e-3 if has_start(model) else 0.0)
    if has_start(model):
        assert torch.equal(back, start)  # the same weights and products as the policy's at its start
        with model.disable_adapter():  # what the adapters were taken out of is another model
            assert float((logits(model) - original).abs().max()) > 0.1
    assert torch.equal(logits(model), learned)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_the_start_that_is_kept_is_a_copy_of_small_frozen_tensors() -> None:
    model = adapted(init="pissa")
    kept = {n: p for n, p in model.named_parameters() if ".start" in n}
    assert kept
    assert not any(p.requires_grad for p in kept.values())
    own = {n: p for n, p in model.named_parameters() if ".default" in n}
    assert [p.shape for p in kept.values()] == [p.shape for p in own.values()]
    assert all(p.data_ptr() != q.data_ptr() for p, q in zip(kept.values(), own.values(), strict=True))
    assert not any(".start" in n for n, _ in adapted().named_parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dpo_run_starts_at_ln_2_learns_and_saves_an_adapter_of_the_original_base(
    variant: str, settings: dict[str, Any], tiny: str
) -> None:
    lora = {"r": 4, "alpha": 8.0, **VARIANTS[variant]}
    rows = make_rows("pairs", 4)  # the same in each step
    result = alignkit.run("dpo", data=rows, lora=lora, **settings | {"max_steps": 3, "learning_rate": 1e-3})
    losses = [line["loss"] for line in read_metrics(result.folder)]
    exact = 1e-6 if variant == "orthogonal" else 1e-12  # orthogonal factors multiply to 0 but for rounding
    assert losses[0] == pytest.approx(float(torch.tensor(2.0).log()), abs=exact)
    assert losses[-1] < losses[0] - 1e-4
    base = tf.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(result.folder / "model"))
    torch.testing.assert_close(logits(plain), logits(result.model), rtol=0, atol=1e-4)
    assert float((logits(result.model) - logits(tf.AutoModelForCausalLM.from_pretrained(tiny))).abs().max()) > 0.01


@pytest.mark.parametrize("variant", ["dora", "biases", "fast pissa"])
def test_a_resumed_run_equals_the_uninterrupted_one(variant: str, settings: dict[str, Any]) -> None:
    settings |= {"data": make_rows("pairs", 12), "save_every": 1, "max_steps": 3, "lora": {"r": 4, **VARIANTS[variant]}}
    whole = alignkit.run("kto", name="whole", **settings)
    with killed_before(2):
        alignkit.run("kto", name="halves", **settings)
    halves = alignkit.run("kto", name="halves", resume=True, **settings)
    assert lines(halves.folder) == lines(whole.folder)
    assert same(halves.model, whole.model)


def test_pissa_merges_into_the_whole_weights(settings: dict[str, Any]) -> None:
    settings |= {"data": make_rows("pairs", 12), "lora": {"r": 4, "init": "pissa"}, "max_steps": 2}
    adapter = alignkit.run("dpo", name="a", **settings)
    merged = alignkit.run("dpo", name="m", merge_adapter=True, **settings)
    loaded = tf.AutoModelForCausalLM.from_pretrained(merged.folder / "model", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(adapter.model), rtol=0, atol=1e-4)


def test_the_start_is_the_reference_of_methods_that_sample(settings: dict[str, Any]) -> None:
    sampling = {"max_new_tokens": 6}
    rows = [{"prompt": r["prompt"]} for r in make_rows("text", 8)]
    lora = {"r": 4, "init": "pissa"}
    settings |= {"data": rows, "sampling": sampling, "max_steps": 3, "lora": lora, "learning_rate": 1e-2}
    result = alignkit.run("grpo", reward=lambda completions, **_: [float(len(c)) for c in completions], **settings)
    kl = [line["kl"] for line in read_metrics(result.folder)]
    assert kl[0] == 0.0
    assert kl[-1] > 1e-3


# --------------------------------------------------------------------------------------------- forms and refusals


def test_trained_biases_are_not_switched_off_with_the_adapters(settings: dict[str, Any]) -> None:
    from alignkit.engine.phases import Run

    lora = {"r": 2, "bias": "all"}
    run = Run("dpo", data=make_rows("pairs", 12), lora=lora, **settings)
    run.read()
    state = run.build()
    assert state.parts.reference is not None
    assert state.parts.reference.mode == "cached"
    with pytest.raises(ConfigError, match=r"lora\.bias: all trains biases of the base.*use reference: auto"):
        Run("dpo", data=make_rows("pairs", 12), lora=lora, reference="adapter-off", **settings)


def test_every_setting_of_peft_is_ours_or_has_a_reason() -> None:
    ours = set(LoraSettings.model_fields)
    theirs = {f.name for f in dataclasses.fields(LoraConfig)}
    assert theirs - ours == set(PEFT_SETTINGS), "peft has other settings than we know"
    assert not ours & set(PEFT_SETTINGS)
    for name, reason in PEFT_SETTINGS.items():
        with pytest.raises(ConfigError, match=f"'{name}', a setting of peft, cannot be set here: {reason[:20]}"):
            alignkit.config.validated(
                alignkit.config.RunConfig, {"method": "dpo", "model": "m", "data": "d", "lora": {name: 1}}
            )


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        *[({"init": name}, f"init: {name} {reason[:12]}") for name, reason in PEFT_INITS.items()],
        ({"init": "pisa"}, "must be default, gaussian"),
        ({"init": "orthogonal", "r": 3}, "needs an even rank"),
        ({"init": "pissa", "dora": True}, "init: pissa moves a part of the weights.*with dora; use init: default"),
        ({"init": "olora", "modules_to_save": ["lm_head"]}, "cannot be combined with modules_to_save"),
        ({"init": "pissa", "bias": "all"}, "cannot be combined with bias"),
        ({"init": "pissa", "rslora": True, "rank_pattern": {"q_proj": 2}}, "rslora with rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "greater than or equal to 1"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)  # fmt: skip
def test_combinations_that_cannot_be_right_are_refused(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        alignkit.config.validated(alignkit.config.RunConfig, {"method": "dpo", "model": "m", "data": "d", "lora": lora})


def test_an_initialisation_that_changes_the_base_is_refused_under_fsdp() -> None:
    with pytest.raises(
        ValueError, match=r"lora\.init: pissa saves the adapter as the difference.*fsdp.*use init: default"
    ):
        config(lora={"init": "pissa"}, fsdp=True)


# --------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("method", ["sft", "reward"])
def test_dropout_trains_methods_without_a_reference_and_is_off_in_evaluations(
    method: str, settings: dict[str, Any]
) -> None:
    settings |= {"data": make_rows("pairs", 16), "eval_fraction": 0.25, "save_every": 1, "max_steps": 3}
    dry = alignkit.run(method, name="dry", lora=4, **settings)
    wet = alignkit.run(method, name="wet", lora={"r": 4, "dropout": 0.5}, **settings)
    first = [next(line["eval/loss"] for line in read_metrics(r.folder)) for r in (dry, wet)]
    assert first[0] == first[1]
    assert not same(dry.model, wet.model)
    with killed_before(2):
        alignkit.run(method, name="halves", lora={"r": 4, "dropout": 0.5}, **settings)
    torch.manual_seed(99)
    halves = alignkit.run(method, name="halves", resume=True, lora={"r": 4, "dropout": 0.5}, **settings)
    assert same(halves.model, wet.model)


@pytest.mark.parametrize("method", ["sft", "orpo", "simpo", "cpo", "reward"])
def test_dropout_is_allowed_where_no_ratio_is_computed(method: str, settings: dict[str, Any]) -> None:
    from alignkit.engine.phases import Run

    assert Run(method, data=make_rows("pairs", 8), lora={"dropout": 0.1}, **settings).method.allows_dropout()


@pytest.mark.parametrize(
    ("method", "other"),
    [("dpo", "the reference"), ("ipo", "the reference"), ("kto", "the reference"), ("grpo", "the policy that sampled"),
     ("ppo", "the policy that sampled"), ("nash", "the policy that sampled")],
)  # fmt: skip
def test_dropout_is_refused_where_a_ratio_is_computed(method: str, other: str, settings: dict[str, Any]) -> None:
    message = rf"lora\.dropout is 0\.1, but '{method}' compares the policy with {other}.*remove it"
    with pytest.raises(ConfigError, match=message):
        alignkit.run(method, data=make_rows("pairs", 8), lora={"dropout": 0.1}, **settings)


def test_dropout_is_of_the_adapters_alone() -> None:
    from alignkit.models.adapters import set_adapter_dropout
    from alignkit.models.dropout import drop_dropout

    model = adapted("gpt 2", dropout=0.5)
    drop_dropout(model)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    set_adapter_dropout(model, 0.5)
    found = {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert {p for n, p in found.items() if "lora_dropout" in n} == {0.5}
    assert {p for n, p in found.items() if "lora_dropout" not in n} == {0.0}


def test_packed_rows_are_the_models_own_forward_with_dora(tmp_path: Path) -> None:
    model = adapted(moved=True, dora=True)
    batch = batch_of(examples(), Layout())
    assert Scorer(model).probe(batch) is None


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank_pattern": {"q_proj(": 4}}, r"rank_pattern: 'q_proj\(' is no regular expression"),
        ({"exclude_modules": "q_proj("}, r"exclude_modules: 'q_proj\(' is no regular expression"),
        ({"target_modules": "(q_proj"}, r"target_modules: '\(q_proj' is no regular expression"),
    ],
)
def test_a_pattern_that_cannot_be_read_names_its_setting(lora: dict[str, Any], message: str, settings: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        alignkit.run("sft", data=make_rows("text", 4), lora=lora, **settings)


@pytest.mark.parametrize("lora", [{"dora": True}, {"dropout": 0.1}, {"init": "pissa"}, {"init": "orthogonal"}])
def test_fused_experts_have_plain_adapters_only(lora: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    write_tiny(tmp_path / "moe", tf.MixtralConfig, num_local_experts=4, num_experts_per_tok=2)
    settings |= {"model": str(tmp_path / "moe"), "data": make_rows("text", 4), "max_steps": 1}
    with pytest.raises(
        ModelError, match=r"cannot be used on fused experts \(experts\.\w+.*target_modules: \[q_proj, v_proj\]"
    ):
        alignkit.run("sft", lora={"r": 4, **lora}, name="all", **settings)
    alignkit.run("sft", lora={"r": 4, **lora, "target_modules": ["q_proj", "v_proj"]}, name="named", **settings)


def test_the_head_of_a_reward_model_is_saved_or_the_run_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="its head would not be saved with the adapter; use init: default"):
        alignkit.run("reward", data=make_rows("pairs", 4), lora={"r": 4, "init": "pissa"}, **settings)
    saved = alignkit.run(
        "reward", data=make_rows("pairs", 4), lora={"r": 4, "modules_to_save": ["embed_tokens"]}, **settings
    )
    assert saved.folder.is_dir()


@pytest.mark.parametrize("place", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_end_of_tied_embeddings_is_not_merged(
    place: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    write_tiny(tmp_path / "tied", tie_word_embeddings=True)
    settings |= {"model": str(tmp_path / "tied"), "data": make_rows("text", 4), "max_steps": 1, "merge_adapter": True}
    with pytest.raises(ModelError, match="the embeddings and the head share their weights, and an adapter is on one"):
        alignkit.run("sft", lora={"r": 4, "target_modules": ["q_proj", place]}, **settings)


def test_the_part_that_is_taken_out_of_the_weights_is_not_rounded(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="which bfloat16 rounds, so that the reference would be another model"):
        alignkit.run("dpo", data=make_rows("pairs", 4), lora={"init": "pissa"}, dtype="bfloat16", **settings)
