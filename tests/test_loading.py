"""Loading: what is found, what is refused, and that dropout is off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn
from zoo import (
    CPU,
    config,
    examples,
    fresh,
    model_of,
)

from alignkit.errors import ConfigError, ModelError
from alignkit.lora_settings import LoraSettings
from alignkit.models.adapters import add_lora
from alignkit.models.loading import load_model, load_tokenizer
from alignkit.models.packing import batch_of
from alignkit.models.scoring import Scorer
from alignkit.types import Layout


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt 2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("gpt neox", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("starcoder 2", {"residual_dropout": 0.5, "embedding_dropout": 0.5, "attention_dropout": 0.5}),
        ("mixtral", {"router_jitter_noise": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.9}),
    ],
)
def test_dropout_is_off_in_training_mode(name: str, changes: dict[str, float]) -> None:
    model = fresh(name, **changes)
    assert model.training
    batch = batch_of(examples(), Layout())
    with torch.no_grad():
        trained = [Scorer(model)(batch.rows, batch.targets).logps for _ in range(3)]
        model.eval()
        evaluated = Scorer(model)(batch.rows, batch.targets).logps
    assert all(torch.equal(t, evaluated) for t in trained)


def test_flex_attention_is_refused_on_a_cpu(tiny: str) -> None:
    with pytest.raises(ConfigError, match="attention: flex_attention needs a GPU"):
        load_model(config(model=tiny, attention="flex_attention"), CPU)


def test_a_folder_is_loaded_with_dropout_off_and_the_dtype_that_was_asked_for(tiny: str) -> None:
    model, came_with_adapter = load_model(config(model=tiny), CPU)
    assert not came_with_adapter
    assert not model.config.use_cache
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    low, _ = load_model(config(model=tiny, dtype="bfloat16"), CPU)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert load_model(config(model=tiny, attention="eager"), CPU)[0].config._attn_implementation == "eager"


def test_an_adapter_folder_is_loaded_on_its_base_and_trained_on(tiny: str, tmp_path: Path) -> None:
    base = tf.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    adapted = add_lora(base, LoraSettings(r=2))
    for n, p in adapted.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, 0, 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    model, came_with_adapter = load_model(config(model=str(tmp_path / "adapter")), CPU)
    assert came_with_adapter
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=0, atol=1e-6)
    with pytest.raises(ModelError, match="already has an adapter, which is trained further; leave out `lora`"):
        load_model(config(model=str(tmp_path / "adapter"), lora=True), CPU)


def test_what_can_only_be_a_folder_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    for load in (lambda: load_model(config(model=missing), CPU), lambda: load_tokenizer(config(model=missing))):
        with pytest.raises(ModelError, match=r"the folder '.*missing' does not exist; give a model's folder, or a hub"):
            load()


def test_a_name_that_may_be_a_folder_or_on_the_hub_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ModelError, match=r"cannot load a causal language model from 'org/missing' \(no local folder has this name"
    ):
        load_model(config(model="org/missing"), CPU)
    with pytest.raises(ModelError, match=r"cannot load a tokenizer from 'org/missing' \(no local folder has this name"):
        load_tokenizer(config(model="org/missing"))


def test_a_folder_without_a_model_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(ModelError, match="cannot load a causal language model from") as error:
        load_model(config(model=str(tmp_path)), CPU)
    assert "\n" not in str(error.value)
    assert "no local folder" not in str(error.value)


def test_a_model_that_writes_no_text_is_refused(tmp_path: Path) -> None:
    vision = tf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    vision.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load a causal language model from"):
        load_model(config(model=str(tmp_path)), CPU)


def test_an_adapter_whose_base_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    gone = {"base_model_name_or_path": str(tmp_path / "gone"), "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(gone))
    with pytest.raises(ModelError, match=f"cannot load a causal language model from '{tmp_path}'.*gone"):
        load_model(config(model=str(tmp_path)), CPU)


def test_weights_that_are_missing_from_a_checkpoint_are_an_error_and_not_drawn_at_random(
    tiny: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    for file in Path(tiny).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(Path(tiny) / "model.safetensors")
    lost = "model.layers.0.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weight.*model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(config(model=str(tmp_path)), CPU)


def test_a_model_object_needs_its_tokenizer_beside_it(tiny: str) -> None:
    with pytest.raises(ModelError, match="a model object was given without its tokenizer; pass tokenizer="):
        load_tokenizer(config(model=model_of("llama")))
    mine = object()
    assert load_tokenizer(config(model=model_of("llama"), tokenizer=mine)) is mine
    assert load_tokenizer(config(model=tiny)).eos_token == "<|end|>"
    assert load_tokenizer(config(model=model_of("llama"), tokenizer=tiny)).eos_token == "<|end|>"


def test_an_encoder_and_decoder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    tf.T5Config(vocab_size=97).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is an encoder-decoder model \(t5\); give a causal language model"):
        load_model(config(model=str(tmp_path)), CPU)
