"""QLoRA: a base in 4 bits under every method, the reference beside it, and what is saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors import safe_open
from test_data_parallel import torchrun
from test_engine import lines, same
from test_online import asks
from zoo import config, examples, fresh

import alignkit
from alignkit.engine.phases import Run
from alignkit.errors import ConfigError, ModelError
from alignkit.models.adapters import before_training
from alignkit.models.loading import load_model
from alignkit.models.packing import batch_of
from alignkit.models.quantised import is_4bit, layers_4bit, merged, nf4, settle, weight
from alignkit.models.scoring import Scorer, plain_logps
from alignkit.reference.keys import fingerprint
from alignkit.runs.folder import read_metrics
from alignkit.types import Layout
from helpers import killed_before, make_rows, write_tiny

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])
ONLINE = ["ppo", "grpo", "rloo", "reinforce", "online_dpo", "nash"]
METHODS = ["sft", "dpo", "ipo", "kto", "bco", "orpo", "simpo", "cpo", "reward", *ONLINE]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama whose layers have biases, and several blocks of 64 weights a row."""
    folder = tmp_path_factory.mktemp("base")
    write_tiny(folder, hidden_size=64, intermediate_size=128, attention_bias=True)
    return str(folder)


@pytest.fixture
def quantised(base: str, settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {
        "model": base, "quantize": "nf4", "lora": {"r": 4}, "max_steps": 2, "learning_rate": 1e-3,
    }  # fmt: skip


def asked(method: str) -> dict[str, Any]:
    if method not in ONLINE:
        return {"data": make_rows("pairs", 8)}
    rows = [{"prompt": r["prompt"]} for r in make_rows("text", 8)]
    return {"data": rows, "sampling": {"max_new_tokens": 6}, **asks(method)}


def plain(base: str) -> Any:
    """The base by plain transformers. Training mode: in evaluation some CPUs compute 4-bit products in bfloat16."""
    model = tf.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=nf4(torch.float32), dtype=torch.float32, device_map="cpu"
    )
    return model.train()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------- the layers


def test_the_linear_layers_are_in_4_bits_and_the_rest_in_the_runs_dtype(base: str) -> None:
    model, _ = load_model(config(model=base, quantize="nf4", lora=2), CPU)
    found = layers_4bit(model)
    assert len(found) == 2 * 7
    assert not is_4bit(model.get_base_model().lm_head)
    for layer in found.values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
        assert layer.weight.numel() == layer.in_features * layer.out_features / 2
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    exact = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    own = exact.model.layers[0].mlp.up_proj.weight
    error = (weight(found["base_model.model.model.layers.0.mlp.up_proj.base_layer"]) - own).abs()
    # NF4's values are at most 0.30 apart, in units of a block's largest weight; statistics add a little
    bound = own.view(-1, 64).abs().amax(1).repeat_interleave(64).view_as(own) * 0.16
    assert bool((error <= bound + 1e-3).all())
    assert float(error.max()) > 0


def test_evaluation_mode_computes_the_same_and_leaves_the_gradient(base: str) -> None:
    model, _ = load_model(config(model=base, quantize="nf4", lora=2), CPU)
    layer = layers_4bit(model)["base_model.model.model.layers.0.mlp.up_proj.base_layer"]
    x = torch.randn(5, 64)
    want = x.double() @ weight(layer).double().T
    for mode in (True, False, True):
        layer.train(mode)
        with torch.no_grad():
            torch.testing.assert_close(layer(x).double(), want, rtol=0, atol=1e-5)
    y = x.clone().requires_grad_()
    layer(y).sum().backward()
    torch.testing.assert_close(y.grad.double(), weight(layer).double().sum(0).expand(5, -1), rtol=0, atol=1e-5)


def test_packed_rows_are_the_models_own_forward(base: str) -> None:
    model, _ = load_model(config(model=base, quantize="nf4", lora=2), CPU)
    assert Scorer(model).probe(batch_of(examples(), Layout())) is None


# ---------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_adapters_on_it_and_changes_nothing_else(method: str, quantised: dict[str, Any]) -> None:
    run = Run(method, **quantised, **asked(method))
    run.read()
    state = run.build()
    before = {n: p.clone() for n, p in state.parts.policy.named_parameters()}
    if state.parts.reference:
        assert state.parts.reference.mode == "adapter-off"
    run.loop.train()
    changed = {n for n, p in state.parts.policy.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_" in n or "score" in n for n in changed)
    assert all(math.isfinite(line["loss"]) and not line["skipped"] for line in read_metrics(state.folder))


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_a_resumed_run_equals_the_uninterrupted_one_and_its_checkpoints_hold_no_base(
    method: str, quantised: dict[str, Any]
) -> None:
    settings = quantised | asked(method) | {"save_every": 1}
    whole = alignkit.run(method, name="whole", **settings)
    with killed_before(1):
        alignkit.run(method, name="halves", **settings)
    torch.manual_seed(99)
    halves = alignkit.run(method, name="halves", resume=True, **settings)

    def untimed(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if "seconds/" not in k} for line in lines(folder)]

    assert untimed(halves.folder) == untimed(whole.folder)
    assert same(halves.model, whole.model)
    file = sorted((whole.folder / "checkpoints").glob("*/model.safetensors"))[-1]
    with safe_open(file, "pt") as tensors:
        assert all("lora_" in n or "score" in n for n in tensors.keys())  # noqa: SIM118


def test_the_reference_is_the_quantised_base_and_the_first_loss_is_ln_2(base: str, quantised: dict[str, Any]) -> None:
    run = Run("dpo", **quantised | {"data": make_rows("pairs", 4)})
    run.read()
    state = run.build()
    run.loop.train()
    assert read_metrics(state.folder)[0]["loss"] == pytest.approx(float(torch.tensor(2.0).log()), abs=1e-12)
    model, given = plain(base), state.splits.train
    want = torch.cat(
        [plain_logps(model, torch.cat([e.prompt, c.tokens]), len(e.prompt))[c.trained_at] for e in given
         for c in e.completions]
    ).detach()  # fmt: skip
    assert state.parts.reference is not None
    torch.testing.assert_close(state.parts.reference.logps(given), want, rtol=0, atol=2e-5)
    exact = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    other = plain_logps(exact, torch.cat([given[0].prompt, given[0].completions[0].tokens]), len(given[0].prompt))
    assert float((other - want[: len(other)]).abs().max().detach()) > 1e-3  # not that of the base in full


def test_the_reference_has_a_fingerprint_of_its_own(base: str) -> None:
    found = []
    for changes in ({}, {"quantize": "nf4"}, {"quantize": "nf4"}):
        model, _ = load_model(config(model=base, lora=2, **changes), CPU)
        found.append(fingerprint(model, dtype=torch.float32, adapters=False))
        logits(model)
        with before_training(model):
            assert fingerprint(model, dtype=torch.float32) == found[-1]
    assert found[1] == found[2] != found[0]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(quantised: dict[str, Any], write_rows: Any) -> None:
    settings = quantised | {"data": write_rows(make_rows("pairs", 8)), "lora": 4, "learning_rate": 1e-4}
    one = alignkit.run("dpo", name="one", **settings)
    given = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    done = torchrun(["run", "dpo", *given, "--set", "name=two"])
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [[line["loss"] for line in read_metrics(settings["output"] / name)] for name in (one.folder.name, "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# ----------------------------------------------------------------------------------------------------- what is saved


@pytest.mark.parametrize("lora", [{"r": 4}, {"dora": True, "modules_to_save": ["lm_head"]}])
def test_the_saved_adapter_on_a_plain_quantised_base_computes_the_same(
    lora: dict[str, Any], base: str, quantised: dict[str, Any]
) -> None:
    settings = quantised | {"data": make_rows("pairs", 8), "lora": lora}
    result = alignkit.run("dpo", **settings)
    loaded = PeftModel.from_pretrained(plain(base), str(result.folder / "model")).train()
    for module in loaded.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert torch.equal(logits(loaded), logits(result.model.train()))
    further = settings | {"model": str(result.folder / "model"), "lora": None, "name": "further"}
    assert read_metrics(alignkit.run("dpo", **further).folder)[0]["kl"] == 0.0  # against the adapted model


@pytest.mark.parametrize("lora", [{"r": 4}, {"dora": True, "target_modules": ["up_proj", "lm_head"]}])
def test_a_merged_model_is_plain_and_computes_what_was_trained(lora: dict[str, Any], quantised: dict[str, Any]) -> None:
    settings = quantised | {"data": make_rows("pairs", 8), "lora": lora, "learning_rate": 1e-2}
    adapted = alignkit.run("dpo", name="adapted", **settings)
    merged = alignkit.run("dpo", name="merged", merge_adapter=True, **settings)
    loaded = tf.AutoModelForCausalLM.from_pretrained(merged.folder / "model", dtype=torch.float32)
    assert not layers_4bit(loaded)
    assert "quantization_config" not in (merged.folder / "model" / "config.json").read_text()
    torch.testing.assert_close(logits(loaded), logits(adapted.model), rtol=0, atol=2e-4)
    torch.testing.assert_close(logits(merged.model), logits(adapted.model), rtol=0, atol=2e-4)


def test_gpt_2_is_merged_into_the_layers_that_it_has(tmp_path: Path) -> None:
    fresh("gpt 2").save_pretrained(tmp_path / "base")
    model, _ = load_model(config(model=str(tmp_path / "base"), quantize="nf4", lora=2), CPU)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    want = logits(model)
    merged(model).save_pretrained(tmp_path / "merged")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), want, rtol=0, atol=1e-3)


def test_the_card_of_an_adapter_loads_its_base_in_4_bits(quantised: dict[str, Any]) -> None:
    result = alignkit.run("dpo", data=make_rows("pairs", 4), **quantised)
    card = (result.folder / "model" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].split("\n")
    names: dict[str, Any] = {}
    loading = "\n".join(
        line for line in code if line.startswith(("import", "from", "folder", "tokenizer =", "model ="))
    )
    exec(loading.replace('folder = "."', f"folder = {str(result.folder / 'model')!r}"), names)
    assert layers_4bit(names["model"])
    torch.testing.assert_close(logits(names["model"].train()), logits(result.model), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp": True, "lora": {}}, "4-bit weights cannot be sharded; remove quantize or fsdp"),
        ({"lora": {"init": "pissa"}}, "init: pissa changes the base, which would be rounded to 4 bits again"),
        ({"lora": {}, "reference": "int8"}, "reference: int8 would round 4-bit weights again; use reference: auto"),
    ],
)
def test_what_cannot_be_done_in_4_bits_is_refused(
    changes: dict[str, Any], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        Run("dpo", data=make_rows("pairs", 8), quantize="nf4", **settings | changes)


def test_a_frozen_base_without_adapters_has_nothing_to_train(base: str) -> None:
    with pytest.raises(ModelError, match="4-bit weights, which are frozen: only adapters can be trained; add `lora`"):
        load_model(config(model=base, quantize="nf4"), CPU)
    with pytest.raises(ModelError, match="only adapters can be trained; add `lora`"):
        load_model(config(model=plain(base)), CPU)
    whole = tf.AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ModelError, match="has no 4-bit layer: a loaded model is trained as it is"):
        load_model(config(model=whole, quantize="nf4", lora=2), CPU)
    loaded, _ = load_model(config(model=plain(base), lora=2), CPU)  # loaded by its owner
    assert layers_4bit(loaded)


def test_a_critic_does_not_start_from_a_trained_adapter_on_it(base: str) -> None:
    from alignkit.models.loading import classifier_like

    model, _ = load_model(config(model=base, quantize="nf4", lora=2), CPU)
    critic = classifier_like(model)
    names = {n.replace("base_model.model.", "").replace(".base_layer", "") for n in layers_4bit(model)}
    assert layers_4bit(critic).keys() == names
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(1)
    with pytest.raises(ModelError, match="merging it would round its update away; use critic: shared, or a folder"):
        classifier_like(model)


def test_settling_rounds_biases_before_the_first_pass(base: str) -> None:
    model = plain(base)
    settle(model, torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.bias.clone()
    assert before.dtype == torch.bfloat16
    layer(torch.randn(2, 64))
    assert torch.equal(layer.bias, before)
