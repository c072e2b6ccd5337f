"""The 8-bit reference: exact about batch-mates, close to float32, the same as a model quantised while loading."""

from __future__ import annotations

import builtins
import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from alignkit.errors import ConfigError, ModelError
from alignkit.reference.int8 import to_int8
from alignkit.reference.keys import fingerprint

bnb = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")

ERROR = 0.06  # nats a token; 0.029 was measured


@pytest.fixture
def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=False,
        initializer_range=0.08,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)  # a lost bias shall show
    return model


def logps(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Log-probabilities of each next token, float32 [B, T - 1]."""
    with torch.no_grad():
        logits = model(input_ids=ids_BT).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).squeeze(-1)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 512, (8, 48), generator=torch.Generator().manual_seed(1))


def test_batch_mates_do_not_matter(llama, ids):
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.input_layernorm.weight[::16] *= 4  # activations above 6, which LLM.int8's default treats apart
            layer.post_attention_layernorm.weight[::16] *= 4
    model, given = to_int8(llama), {}
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    hooks = [
        layer.register_forward_hook(lambda _, x, out, name=name: given.update({name: (x[0], out)}))
        for name, layer in layers
    ]
    together = logps(model, ids)
    for hook in hooks:
        hook.remove()
    assert max(float(x.abs().max()) for x, _ in given.values()) > 6
    with torch.no_grad():
        for name, layer in layers:  # integer products do not round, whatever the processor and the batch
            x, out = given[name]
            assert all(torch.equal(layer(x[i : i + 1]), out[i : i + 1]) for i in range(len(ids))), name
    # between them is float32, whose rounding may depend on the batch and now and then move an integer by one
    alone = torch.cat([logps(model, row[None]) for row in ids])
    assert float((together - alone).abs().median()) < 1e-6


def test_threshold_is_zero_and_the_layers_are_in_evaluation(llama):
    model = to_int8(llama.train())
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    assert len(layers) == 4 * 7
    assert all(m.state.threshold == 0.0 and not m.training and not m.state.has_fp16_weights for m in layers)
    assert type(model.lm_head) is nn.Linear
    assert not any(p.requires_grad for p in model.parameters())


def test_error_against_float32_is_small(llama, ids):
    exact = logps(llama, ids)
    error = (logps(to_int8(copy.deepcopy(llama)), ids) - exact).abs()
    assert 0 < error.mean() < ERROR
    assert exact.std() > 0.3, "a model that says the same of every token would hide errors"


def test_equal_to_a_model_quantised_while_loading(llama, ids, tmp_path: Path):
    llama.save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    assert torch.equal(logps(to_int8(llama), ids), logps(loaded.eval(), ids))


def test_memory_of_the_linear_layers_is_a_quarter(llama):
    def size(model: nn.Module) -> int:
        return sum(
            t.nbytes
            for n, t in model.state_dict().items()
            if "_proj" in n and not n.endswith(("bias", "weight_format"))
        )

    before = size(llama)
    assert size(to_int8(llama)) == pytest.approx(before / 4, rel=0.05)


def test_conv1d_layers_are_converted(ids):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2)
    ).eval()
    exact = logps(model, ids)
    error = (logps(to_int8(model), ids) - exact).abs().mean()
    assert isinstance(model.transformer.h[0].mlp.c_fc, bnb.nn.Linear8bitLt)
    assert error < 0.1 * exact.std()


def test_fingerprint_sees_the_weights_of_a_quantised_model(llama, ids):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight.mul_(2)  # the same int8 weights, other scales
    first, second = (fingerprint(to_int8(m), quantisation="int8", dtype=torch.float32) for m in (llama, other))
    assert first != second
    logps(llama, ids)  # the first forward pass moves the scales about
    assert fingerprint(llama, quantisation="int8", dtype=torch.float32) == first


def test_nothing_to_convert_is_an_error(llama):
    with pytest.raises(ModelError, match="no linear layer"):
        to_int8(nn.LayerNorm(4))
    with pytest.raises(ModelError, match="quantised already"):
        to_int8(to_int8(llama))


def test_missing_bitsandbytes_says_what_to_install(monkeypatch, llama):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "bitsandbytes":
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'alignkit\[int8\]'"):
        to_int8(llama)
