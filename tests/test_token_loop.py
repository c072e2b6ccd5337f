"""The engine's own loop over tokens against transformers' `generate`, which samples the same tokens more slowly."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_vision_language import fresh as vision_language
from torch import Tensor, nn
from zoo import BASE, CONFIGS, fresh, made

from alignkit.rollout import Mixture, sample, shared_keys
from alignkit.rollout import decoder as decoder_module
from alignkit.rollout.decoder import refused
from alignkit.rollout.fast_layers import fast_layers
from alignkit.rollout_settings import Sampling
from alignkit.testing.world import EOS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [[7], [5, 9, 11, 4, 20, 31, 8, 9, 10, 12, 40], [3, 3, 8], [30, 31, 32, 33, 34, 35, 36]]
OTHERS = ("mamba", "mpt, a scale of None")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def both(lm: Any, sampling: Sampling, prompts: Any = PROMPTS, **options: Any) -> tuple[Any, Any]:
    """Completions by the own loop and by transformers."""
    own, other = (
        sample(lm, TOKENIZER, prompts, sampling, backend=backend, **options) for backend in ("generate", "transformers")
    )
    return own, other


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_samples_what_generate_samples(name: str) -> None:
    lm = fresh(name)
    own, other = both(lm, Sampling(max_new_tokens=14), n=3, seed=5)
    assert own == other
    assert (refused(lm, PROMPTS, 14) is None) == (name not in OTHERS)


def test_attention_with_sinks_is_computed_too() -> None:
    about = tf.GptOssConfig(
        **BASE, head_dim=12, num_local_experts=2, num_experts_per_tok=1, sliding_window=8, pad_token_id=0
    )
    lm = made(about)
    own, other = both(lm, Sampling(max_new_tokens=14), n=3, seed=5)
    assert own == other
    assert refused(lm, PROMPTS, 14) is None


def test_a_cache_of_something_else_than_keys_is_left_to_generate() -> None:
    about = tf.DeepseekV3Config(
        **BASE | {"num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=6, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    lm = made(about)
    own, other = both(lm, Sampling(max_new_tokens=8), n=2)
    assert own == other
    assert str(refused(lm, PROMPTS, 8)).startswith("the model's cache or attention is not known here (RuntimeError")


@pytest.mark.parametrize("name", ["llava", "gemma 3", "qwen 2.5 vl", "llama 4"])
def test_the_parts_of_a_multimodal_model_keep_their_attention(name: str) -> None:
    lm = vision_language(name)
    vision = next(m for n, m in lm.named_modules() if isinstance(m, tf.PreTrainedModel) and "vi" in n)
    vision.config._attn_implementation = "eager"  # another one than that of the language model
    before = {n: m.config._attn_implementation for n, m in lm.named_modules() if isinstance(m, tf.PreTrainedModel)}
    own, other = both(lm, Sampling(max_new_tokens=9), n=2)
    assert own == other
    after = {n: m.config._attn_implementation for n, m in lm.named_modules() if isinstance(m, tf.PreTrainedModel)}
    assert after == before


def test_what_short_prompts_cannot_show_is_found_before_long_ones_are_sampled() -> None:
    windowed = made(CONFIGS["mistral with a window"]())
    assert refused(windowed, [[3, 4]], 4) is None
    with pytest.MonkeyPatch.context() as patch:  # a window that is never applied
        patch.setattr(decoder_module, "masks_of", lambda keys, _: shared_keys._mask(keys, None))
        assert refused(windowed, [[3, 4]], 4) is None
        assert "differ by" in str(refused(windowed, PROMPTS, 4))
    chunked = tf.Llama4TextConfig(
        **BASE, head_dim=12, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=16, pad_token_id=0
    )
    assert refused(made(chunked), [[3, 4]], 4) == "the model has layers of type chunked_attention"


def test_prompts_of_one_length_do_not_hide_a_mask_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = shared_keys.Keys.hidden
    monkeypatch.setattr(shared_keys.Keys, "hidden", lambda *given: exact(*given) * 0)
    assert "differ by" in str(refused(tiny_model(), [[3, 4, 5], [6, 7, 8]], 4))


def test_an_answer_under_autocast_is_not_that_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = shared_keys._of_rows
    monkeypatch.setattr(shared_keys, "_of_rows", lambda *given: exact(*given) * 1.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert "differ by" in str(refused(tiny_model(), PROMPTS, 4))


@pytest.mark.parametrize("name", ["llama", "gpt 2"])
def test_the_types_of_numbers_that_autocast_mixes_are_made_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where attention stays in 16 bits: rotary positions leave queries and keys in float32."""
    lm = fresh(name)

    def as_on_a_gpu(part: Tensor) -> Tensor:
        return part.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else part

    monkeypatch.setattr(shared_keys, "as_attended", as_on_a_gpu)
    with torch.autocast("cpu", torch.bfloat16):
        assert refused(lm, PROMPTS, 4) is None
        assert len(sample(lm, TOKENIZER, PROMPTS, Sampling(max_new_tokens=5, min_new_tokens=5))) == len(PROMPTS)


def test_a_token_that_the_model_does_not_know_is_no_fault_of_the_loop(model: Any) -> None:
    lm = copy.deepcopy(model)
    with pytest.raises(IndexError):
        sample(lm, TOKENIZER, [[3, 9999]], Sampling(max_new_tokens=4))
    assert refused(lm, PROMPTS, 4) is None


def test_memory_that_runs_out_while_prompts_are_read_is_relieved_by_fewer(model: Any) -> None:
    lm = copy.deepcopy(model)
    sampling = Sampling(max_new_tokens=6)
    want = sample(lm, TOKENIZER, PROMPTS, sampling)

    def full(_: Any, given: tuple[Tensor, ...]) -> None:
        if len(given[0]) > 2:
            raise torch.OutOfMemoryError("planted")

    handle = lm.get_input_embeddings().register_forward_pre_hook(full)
    assert sample(lm, TOKENIZER, PROMPTS, sampling) == want
    handle.remove()


def test_nothing_that_is_sampled_keeps_a_graph(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[shared_keys.Keys] = []
    begin = shared_keys.Keys.__init__

    def noted(keys: shared_keys.Keys, *given: Any) -> None:
        begin(keys, *given)
        seen.append(keys)

    monkeypatch.setattr(shared_keys.Keys, "__init__", noted)
    with torch.enable_grad():
        sample(model, TOKENIZER, PROMPTS, Sampling(max_new_tokens=70, min_new_tokens=70))
    for keys in seen:
        assert not any(part.requires_grad for pair in (*keys.prompts.values(), *keys.own.values()) for part in pair)
    assert {part.shape[2] for pair in seen[-1].own.values() for part in pair} == {70}  # no room beyond what is asked


def test_a_model_that_fails_in_the_middle_is_given_back(model: Any) -> None:
    lm = copy.deepcopy(model)
    sample(lm, TOKENIZER, PROMPTS, Sampling(max_new_tokens=4))
    calls: list[int] = []

    def fails(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("planted")

    handle = lm.lm_head.register_forward_hook(fails)
    with pytest.raises(ValueError, match="planted"):
        sample(lm, TOKENIZER, PROMPTS, Sampling(max_new_tokens=9, min_new_tokens=9))
    handle.remove()
    assert lm.config._attn_implementation == model.config._attn_implementation
    assert not any("forward" in vars(m) for m in lm.modules())
    ids = torch.tensor([PROMPTS[1]])
    assert torch.equal(lm(input_ids=ids).logits, model(input_ids=ids).logits)


@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)  # in float32, one token in a million may differ
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), n=st.integers(1, 4), size=st.integers(1, 9),
    seed=st.integers(0, 2**31), longest=st.integers(1, 80),
    how=st.fixed_dictionaries({}, optional={
        "temperature": st.just(1.5), "top_k": st.just(5), "top_p": st.just(0.8), "min_new_tokens": st.just(1),
        "stop": st.just(["e", "an"]),
    }), mixed=st.sampled_from([None, 0.0, 0.4, 1.0]),
)  # fmt: skip
def test_whatever_ends_when_and_whatever_is_asked(
    model: Any, lengths: list[int], n: int, size: int, seed: int, longest: int, how: dict[str, Any],
    mixed: float | None,
) -> None:  # fmt: skip
    prompts = [[3 + (7 * i + j) % 50 for j in range(length)] for i, length in enumerate(lengths)]
    sampling = Sampling(max_new_tokens=longest, batch_size=size, **how)
    options: dict[str, Any] = {"n": 1} if mixed is not None else {"n": n}
    if mixed is not None:
        options["mixture"] = Mixture(tiny_model(1), mixed)
    own, other = both(model, sampling, prompts, seed=seed, **options)
    assert own == other


def test_a_greedy_completion_and_one_of_an_adapter_are_the_same_too(model: Any) -> None:
    own, other = both(model, Sampling(max_new_tokens=30), greedy=True)
    assert own == other
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = peft.get_peft_model(copy.deepcopy(model), config)
    own, other = both(policy, Sampling(max_new_tokens=30), n=2)
    assert own == other
    assert own != sample(model, TOKENIZER, PROMPTS, Sampling(max_new_tokens=30), n=2)


def test_rows_that_have_ended_leave_the_batch(model: Any) -> None:
    sampling = Sampling(max_new_tokens=60)
    made = [one for some in sample(model, TOKENIZER, PROMPTS, sampling, n=8) for one in some]
    rows: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    assert [one for some in sample(model, TOKENIZER, PROMPTS, sampling, n=8) for one in some] == made
    handle.remove()
    rows = rows[1:]  # the prompts
    alive = [sum(len(one.tokens) > n for one in made) for n in range(1, len(rows))]
    assert rows[0] == 4
    assert all(there * 0.75 < left <= there for there, left in zip(rows[1:], alive, strict=True) if there > 1)
    assert rows[-1] < 16


def test_an_attention_that_computes_something_else_is_found_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exact = shared_keys._of_rows

    def wrong(*given: Any) -> Tensor:
        return exact(*given) * 1.01

    lm, sampling = tiny_model(), Sampling(max_new_tokens=12)
    want = sample(lm, TOKENIZER, PROMPTS, sampling, n=2, backend="transformers")
    monkeypatch.setattr(shared_keys, "_of_rows", wrong)
    with caplog.at_level("INFO"):
        assert sample(lm, TOKENIZER, PROMPTS, sampling, n=2) == want
    assert "sampling by transformers' generate: log-probabilities of the loop over tokens differ by" in caplog.text


def test_running_out_of_memory_while_it_compares_is_not_kept_as_an_answer(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    lm = copy.deepcopy(model)
    monkeypatch.setattr(decoder_module, "_read_on", full)
    with pytest.raises(torch.OutOfMemoryError):
        refused(lm, PROMPTS, 4)
    monkeypatch.undo()
    assert refused(lm, PROMPTS, 4) is None


# ------------------------------------------------------------------------------------------------- faster layers


def test_faster_layers_compute_the_same_and_are_taken_off_again(model: Any) -> None:
    lm, ids = copy.deepcopy(model), torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        want = lm(input_ids=ids).logits
        with fast_layers(lm):
            replaced = {name for name, m in lm.named_modules() if "forward" in vars(m)}
            got = lm(input_ids=ids).logits
        assert torch.equal(lm(input_ids=ids).logits, want)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    linear = {name for name, m in lm.named_modules() if type(m) is nn.Linear}
    assert replaced >= linear
    assert any("layernorm" in name for name in replaced)
    assert not any("forward" in vars(m) for m in lm.modules())


def test_they_are_taken_off_after_an_error_too() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(ZeroDivisionError), fast_layers(layer):
        1 / 0  # noqa: B018
    assert "forward" not in vars(layer)


def test_under_autocast_the_weights_are_read_in_16_bits() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, inputs = nn.Linear(64, 48), torch.randn(5, 64)
    exact = inputs.bfloat16().double() @ layer.weight.bfloat16().double().T + layer.bias.bfloat16().double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False), fast_layers(layer):
        got = layer(inputs)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=2**-7)


def test_layers_of_other_kinds_stay_as_they_are() -> None:
    class Shifted(nn.Module):  # as in Gemma: 1 is added to the weight
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.full((8,), 0.5)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.rms_norm(x, (8,), 1 + self.weight, self.variance_epsilon)

    class Mine(nn.Linear):
        pass

    layers = nn.ModuleList([Shifted(), Mine(4, 4), nn.Linear(4, 4).bfloat16(), nn.Embedding(4, 4)])
    with fast_layers(layers):
        assert not any("forward" in vars(m) for m in layers)


def test_prompts_end_with_the_end_token_too(model: Any) -> None:
    own, other = both(model, Sampling(max_new_tokens=9), [[EOS], [5, EOS], [5, 6, EOS]], n=2)
    assert own == other
