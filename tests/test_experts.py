"""LoRA on mixtures of experts: what is adapted, what is not and how to, and that the saved adapter holds it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from test_router import build

import alignkit
from alignkit.errors import ModelError
from alignkit.lora_settings import LoraSettings
from alignkit.models.adapters import adapted, add_lora, fused, own_linears, summary
from alignkit.models.scoring import plain_logps
from helpers import make_rows, write_tiny

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}


def test_all_linear_says_which_experts_it_leaves_out_and_what_to_set() -> None:
    line = summary(add_lora(build("gpt oss"), LoraSettings(r=2)))
    assert "LoRA adapts self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj (1,344 trained" in line
    assert "set lora.target_parameters to [experts.gate_up_proj, experts.down_proj]" in line
    # 2 layers x 4 experts x (48 x 128 + 64 x 48) weights, of all
    n_all = sum(p.numel() for p in build("gpt oss").parameters())
    assert f"not adapted ({2 * 4 * (48 * 128 + 64 * 48) / n_all:.0%} of all weights)" in line


def test_target_parameters_adapt_the_experts() -> None:
    model = add_lora(build("gpt oss"), LoraSettings(r=2, target_parameters=EXPERTS))
    # per layer and expert: rank 2 times (48 + 128), and (64 + 48)
    found = adapted(model)
    assert found["experts.gate_up_proj"] == 2 * 4 * 2 * (48 + 128)
    assert found["experts.down_proj"] == 2 * 4 * 2 * (64 + 48)
    assert "not adapted" not in summary(model)
    assert sum(found.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen 2 moe", "qwen 3 moe, one dense layer", "olmoe", "gpt oss", "phi moe"]
)
@pytest.mark.parametrize("experts", [False, True])
def test_every_architecture_with_adapters_is_the_base_at_first_and_learns(name: str, experts: bool) -> None:
    base = build(name)
    sequence = torch.tensor([5, 6, 7, 8, 9])
    want = plain_logps(base, sequence, 1).detach()
    model = add_lora(base, LoraSettings(r=2, target_parameters=list(fused(base))[-2:] if experts else None))
    torch.testing.assert_close(plain_logps(model, sequence, 1), want, atol=1e-5, rtol=0)
    plain_logps(model, sequence, 1).sum().backward()
    grown = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert grown
    assert any("experts" in n for n in grown) == any("experts" in n for n in adapted(model))


def test_a_router_that_is_a_linear_module_of_its_own_is_not_wrapped() -> None:
    model = build("phi moe")
    assert own_linears(model) == ["model.layers.0.mlp.router", "model.layers.1.mlp.router"]
    assert "mlp.router" not in adapted(add_lora(model, LoraSettings(r=2)))
    assert own_linears(build("gpt oss")) == []


def test_a_parameter_that_is_not_there_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ModelError, match=r"no parameter is called 'experts.gate_up'.* mean 'experts.gate_up_proj'"):
        add_lora(build("gpt oss"), LoraSettings(target_parameters=["experts.gate_up"]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_trains_and_saves_the_experts_adapters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, checkpointing: bool
) -> None:
    caplog.set_level(logging.INFO, "alignkit")
    write_tiny(tmp_path / "m", tf.GptOssConfig, **GPT_OSS)
    rows = [{"prompt": f"{i} the fox", "chosen": f" sees {i}", "rejected": " eats"} for i in range(6)]
    lora: dict[str, Any] = {"r": 2, "target_parameters": EXPERTS}
    result = alignkit.run(
        "dpo", model=str(tmp_path / "m"), data=rows, output=str(tmp_path / "runs"), batch_size=6, max_steps=2,
        lora=lora, learning_rate=1e-2, gradient_checkpointing=checkpointing, cache_file=str(tmp_path / "cache"),
    )  # fmt: skip
    assert "LoRA adapts" in caplog.text
    assert "experts.gate_up_proj" in caplog.text
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    sequence = torch.tensor([5, 6, 7, 8, 9, 10])
    before = plain_logps(base, sequence, 1).detach()
    loaded = peft.PeftModel.from_pretrained(base, result.folder / "model")
    moved = [p for n, p in loaded.named_parameters() if "lora_B" in n and "experts" in n]
    assert moved
    assert all(float(p.abs().sum()) > 0 for p in moved)
    got = plain_logps(loaded, sequence, 1)
    assert float((got - before).abs().max()) > 1e-3
    torch.testing.assert_close(got, plain_logps(result.model, sequence, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["generate", "continuous"])
def test_a_router_with_a_loss_is_sampled_without_it(backend: str, settings: dict[str, Any], tmp_path: Path) -> None:
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    write_tiny(tmp_path / "moe", tf.MixtralConfig, **moe)
    rows = [{"prompt": row["prompt"]} for row in make_rows("text", 6)]
    settings |= {"model": str(tmp_path / "moe"), "data": rows, "max_steps": 1, "rollout": {"backend": backend}}
    settings |= {"sampling": {"max_new_tokens": 6}}
    reward = {"reward": lambda completions: [float(len(text)) for text in completions], "group_size": 2}
    result = alignkit.run("grpo", **settings | reward)
    assert result.metrics["router/aux_loss"] > 0
    assert result.model.config.output_router_logits is True
