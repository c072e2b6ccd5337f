"""A model whose weights are read in parts is the model that transformers loads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from zoo import CONFIGS, CPU, fresh

from alignkit.config import RunConfig
from alignkit.errors import ModelError
from alignkit.models.loading import causal_lm, classifier_like, load_model
from alignkit.models.unread import is_unread, read_parts

# whose weights transformers 5 rearranges while it loads them
REARRANGED = {"mixtral", "gpt neox"}


def config(folder: Path, **changes: Any) -> RunConfig:
    return RunConfig(**{"method": "dpo", "model": str(folder), "data": "-", "device": "cpu"} | changes)


def both(folder: Path, kind: Any = "causal", **changes: Any) -> tuple[Any, Any]:
    """The model that is read in parts, of one rank that has all of them, and the one that is loaded as a whole."""
    torch.manual_seed(7)
    parts, _ = load_model(config(folder, fsdp=True, **changes), CPU, kind)
    drawn = torch.rand(3)
    assert is_unread(parts)
    read_parts(parts, causal_lm(parts), CPU)
    torch.manual_seed(7)
    whole, _ = load_model(config(folder, **changes), CPU, kind)
    assert torch.equal(torch.rand(3), drawn)  # the generators are where they would be
    return parts, whole


def assert_same(parts: Any, whole: Any) -> None:
    assert not is_unread(parts)
    ours, theirs = parts.state_dict(keep_vars=True), whole.state_dict(keep_vars=True)
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert ours[name].dtype == t.dtype, name
        assert ours[name].requires_grad == t.requires_grad, name
        assert torch.equal(ours[name], t), name
    tied = [{n for n, t in state.items() if t is state[name]} for state in (ours, theirs) for name in state]
    assert tied[: len(ours)] == tied[len(ours) :]
    for (name, a), (other, b) in zip(parts.named_buffers(), whole.named_buffers(), strict=True):  # rotary frequencies
        assert name == other
        assert torch.equal(a, b), name
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        assert torch.equal(causal_lm(parts)(ids).logits, causal_lm(whole)(ids).logits)


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - REARRANGED))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_architecture_is_read_as_transformers_loads_it(name: str, dtype: str, tmp_path: Path) -> None:
    fresh(name).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    assert_same(*both(tmp_path, dtype=dtype))


@pytest.mark.parametrize(
    "lora", [{"r": 4}, {"r": 4, "modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}]
)
def test_new_adapters_have_the_random_numbers_of_any_other_model(lora: dict[str, Any], tmp_path: Path) -> None:
    fresh("llama").save_pretrained(tmp_path)
    parts, whole = both(tmp_path, lora=lora, dtype="bfloat16")
    assert_same(parts, whole)
    assert any(bool(p.any()) for n, p in parts.named_parameters() if ".lora_A." in n or "embedding_B" in n)


def test_a_trained_copy_of_a_tied_head_is_read_too(tmp_path: Path) -> None:
    """The files hold it under the embedding's name alone."""
    fresh("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    parts, whole = both(tmp_path, lora={"r": 4, "modules_to_save": ["lm_head"]})
    assert_same(parts, whole)


@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}], ids=str)
def test_an_adapter_with_more_than_matrices_is_loaded_with_a_whole_base(more: dict[str, Any], tmp_path: Path) -> None:
    """peft reads such weights into a model that is there, and into no other one."""
    fresh("llama", attention_bias=True).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], **more))
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.fill_(0.125)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, came = load_model(config(tmp_path / "adapter", fsdp=True), CPU)
    assert came
    assert not is_unread(loaded)
    trained = [p for p in loaded.parameters() if p.requires_grad]
    assert len(trained) > 2
    assert all(bool((p == 0.125).all()) for p in trained)


def test_ends_are_those_of_the_generation_settings(tmp_path: Path) -> None:
    model = fresh("llama")
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(tmp_path)
    parts, whole = both(tmp_path)
    assert parts.generation_config.eos_token_id == whole.generation_config.eos_token_id == [2, 7]


def test_a_trained_adapter_is_read_with_its_base(tmp_path: Path) -> None:
    fresh("llama").save_pretrained(tmp_path / "base")
    model, _ = load_model(config(tmp_path / "base", lora=4), CPU)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.normal_()
    model.save_pretrained(tmp_path / "adapter")
    assert_same(*both(tmp_path / "adapter"))
    unread = load_model(config(tmp_path / "adapter", fsdp=True), CPU)[0]
    with pytest.raises(ModelError, match="a critic cannot start from a trained adapter: merge it first"):
        classifier_like(unread)


@pytest.mark.parametrize("lora", [None, 4])
def test_a_new_head_begins_at_zero(lora: int | None, tmp_path: Path) -> None:
    fresh("llama, tied").save_pretrained(tmp_path)
    parts, whole = both(tmp_path, "classifier", lora=lora)
    causal_lm(whole).config.pad_token_id = causal_lm(parts).config.pad_token_id = 0
    assert_same(parts, whole)


def test_a_critic_is_read_from_the_policys_files(tmp_path: Path) -> None:
    fresh("llama").save_pretrained(tmp_path)
    made: list[Any] = []
    for fsdp in (True, False):
        critic = classifier_like(load_model(config(tmp_path, fsdp=fsdp, lora=4), CPU)[0])
        assert is_unread(critic) == fsdp
        if fsdp:
            read_parts(critic, critic, CPU)
        critic.config.pad_token_id = 0
        made.append(critic)
    assert_same(*made)
    assert not made[0].score.weight.any()


def test_what_cannot_be_read_in_parts_is_loaded_as_a_whole_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "alignkit")
    fresh("mixtral").save_pretrained(tmp_path / "experts")
    fresh("llama").save_pretrained(tmp_path / "plain")
    torch.save(fresh("llama").state_dict(), tmp_path / "plain" / "pytorch_model.bin")
    (tmp_path / "plain" / "model.safetensors").unlink()
    for name, reason in (
        ("experts", "transformers rearranges the weights of MixtralForCausalLM"),
        ("plain", "it is not in safetensors files"),
    ):
        caplog.clear()
        assert not is_unread(load_model(config(tmp_path / name, fsdp=True), CPU)[0])
        assert f"each rank loads the whole model before it is sharded: {reason}" in caplog.text
    caplog.clear()
    assert not is_unread(load_model(config(tmp_path / "experts"), CPU)[0])
    assert "each rank loads" not in caplog.text
    for more, reason in (
        ({"trust_remote_code": True}, "its code is not known"),
        ({"lora": {"dora": True}}, "(lora.dora"),
    ):
        caplog.clear()
        fresh("llama").save_pretrained(tmp_path / "plain")
        assert not is_unread(load_model(config(tmp_path / "plain", fsdp=True, **more), CPU)[0])
        assert "each rank loads the whole model before it is sharded: its" in caplog.text
        assert reason in caplog.text
