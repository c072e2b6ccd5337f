"""Sampling: from the model's own distribution, with randomness that belongs to the sequence, each prompt read once."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alignkit.errors import ConfigError, DataError, ModelError
from alignkit.rollout import Mixture, Sampled, sample
from alignkit.rollout.noise import gumbel, splitmix
from alignkit.rollout_settings import Sampling
from alignkit.testing.world import EOS, VOCABULARY, tiny_model, tiny_tokenizer

PROMPTS = ["hello? what is there", "the fox. ", "a", "b?"]
TOKENIZER = tiny_tokenizer()
SHORT = Sampling(max_new_tokens=12)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": EOS, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": EOS}
MAMBA = {k: SIZES[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "eos_token_id", "initializer_range")}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "mistral with a window": ("Mistral", {**SIZES, "sliding_window": 8}),
    "gpt2": ("GPT2", GPT2),
    "gemma 2": ("Gemma2", {**SIZES, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma 3": ("Gemma3", {**SIZES, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def changed(**changes: Any) -> Sampling:
    return SHORT.model_copy(update=changes)


def flat(made: list[list[Sampled]]) -> list[Sampled]:
    return [one for some in made for one in some]


def build(name: str) -> Any:
    """A tiny model of an architecture, its weights drawn wide."""
    family, settings = ARCHITECTURES[name]
    config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")(**settings)
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, family + kind)(config)


@contextmanager
def counting(lm: Any) -> Iterator[list[int]]:
    """A list of how many tokens each pass of the model reads, padding included."""
    passes: list[int] = []
    handle = lm.get_input_embeddings().register_forward_hook(lambda _, given, __: passes.append(given[0].numel()))
    yield passes
    handle.remove()


def probabilities(models: Sequence[tuple[nn.Module, float]], sequence: Sequence[int], temperature: float) -> Tensor:
    """Softmax of the weighted logits / temperature after a sequence, in float64, by the models' plain forward."""
    logits = torch.zeros(VOCABULARY, dtype=torch.float64)
    with torch.no_grad():
        for model, weight in models:
            logits += weight * copy.deepcopy(model).double()(torch.tensor([sequence]), use_cache=False).logits[0, -1]
    return (logits / temperature).softmax(-1)


def assert_fits(seen: Sequence[int], wanted: Tensor) -> None:
    """Pearson's chi-square over the tokens that 5 or more are expected of and all others together, five sigma."""
    expected, counts = wanted * len(seen), torch.bincount(torch.tensor(seen), minlength=len(wanted)).double()
    often = expected >= 5
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected, counts = expected[expected > 0], counts[expected > 0]
    degrees = len(expected) - 1
    assert degrees >= 3
    assert float(((counts - expected) ** 2 / expected).sum()) < degrees + 5 * math.sqrt(2 * degrees)


# ------------------------------------------------------------------------------------------------------- the noise


def test_the_bits_are_those_of_splitmix64() -> None:
    # the outputs that the authors' C code gives for the seed 1234567
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    got = splitmix(torch.tensor(1234567), torch.arange(5)).tolist()
    assert [g % 2**64 for g in got] == want


@pytest.mark.parametrize(("bits", "want"), [(0, 54 * math.log(2)), (-1, -math.log(24 * math.log(2)))])
def test_the_noise_is_finite_at_both_ends(bits: int, want: float) -> None:
    # fractions 2^-54 and 1 - 2^-24: -log(-log(1 - u))
    assert gumbel(torch.tensor([bits])).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("varied", ["seed", "number", "completion", "position", "token"])
def test_the_noise_is_gumbel_in_each_of_the_things_that_it_counts(varied: str) -> None:
    n = 200_000
    state = torch.zeros(n, dtype=torch.int64)
    for name in ("seed", "number", "completion", "position", "token"):
        value = torch.arange(n) if name == varied else torch.full((n,), 3)
        state = value if name == "seed" else splitmix(state, value)
    uniform = (-(-gumbel(state).double()).exp()).exp()
    assert_fits((uniform * 100).long().tolist(), torch.full((100,), 0.01, dtype=torch.float64))
    # neighbours know nothing of each other: of all pairs, each hundredth has its share
    pairs = (uniform[:-1] * 10).long() * 10 + (uniform[1:] * 10).long()
    assert_fits(pairs[::2].tolist(), torch.full((100,), 0.01, dtype=torch.float64))


# -------------------------------------------------------------------------------------------------- reproducibility


@hypothesis_settings(max_examples=20, deadline=None)
@given(
    order=st.permutations(range(4)), size=st.integers(1, 14), parts=st.integers(1, 4), seed=st.integers(0, 2**63 - 1)
)
def test_a_sequence_is_the_same_whatever_is_sampled_beside_it(
    model: Any, order: list[int], size: int, parts: int, seed: int
) -> None:
    together = sample(model, TOKENIZER, PROMPTS, SHORT, n=3, seed=seed)
    apart: dict[int, list[Sampled]] = {}
    for part in range(parts):
        mine = order[part::parts]
        made = sample(
            model, TOKENIZER, [PROMPTS[i] for i in mine], changed(batch_size=size), n=3, seed=seed, numbers=mine
        )
        apart |= dict(zip(mine, made, strict=True))
    assert [apart[i] for i in range(4)] == together


def test_seed_number_and_completion_each_change_the_sample(model: Any) -> None:
    def drawn(seed: int, number: int, n: int = 1) -> list[list[int]]:
        return [s.tokens for s in sample(model, TOKENIZER, ["the "], SHORT, n=n, seed=seed, numbers=[number])[0]]

    different = [*drawn(0, 0, 3), *drawn(1, 0), *drawn(0, 1), *drawn(1, 1)]
    assert len({tuple(d) for d in different}) == len(different)
    assert drawn(0, 0, 3)[:2] == drawn(0, 0, 2)


@pytest.mark.parametrize("backend", ["generate", "continuous"])
def test_the_same_call_gives_the_same_samples_and_leaves_the_generators_alone(model: Any, backend: str) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = sample(model, TOKENIZER, PROMPTS, SHORT, n=2, seed=3, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)
    assert sample(model, TOKENIZER, PROMPTS, SHORT, n=2, seed=3, backend=backend) == first
    assert sample(model, TOKENIZER, PROMPTS, SHORT, n=2, seed=4, backend=backend) != first


def test_text_and_its_tokens_are_the_same_prompt(model: Any) -> None:
    ids = [TOKENIZER(p)["input_ids"] for p in PROMPTS]
    as_text = sample(model, TOKENIZER, PROMPTS, SHORT)
    assert sample(model, TOKENIZER, ids, SHORT) == as_text
    assert sample(model, TOKENIZER, [torch.tensor(i, dtype=torch.int32) for i in ids], SHORT) == as_text


# ---------------------------------------------------------------------------------------------------- distributions


@pytest.mark.parametrize(
    ("backend", "temperature", "n"),
    [("generate", 1.0, 20_000), ("generate", 0.6, 20_000), ("generate", 1.7, 20_000), ("continuous", 0.3, 500)],
)
def test_tokens_come_with_the_probabilities_of_the_model_at_that_temperature(
    model: Any, backend: str, temperature: float, n: int
) -> None:
    how = changed(max_new_tokens=2, temperature=temperature, batch_size=5000)
    # prompts of different lengths in one batch, so that padding on the left would show
    drawn = sample(model, TOKENIZER, PROMPTS[:2], how, n=n, seed=1, backend=backend)
    for prompt, made in zip(PROMPTS, drawn, strict=False):
        ids = TOKENIZER(prompt)["input_ids"]
        assert_fits([s.tokens[0] for s in made], probabilities([(model, 1.0)], ids, temperature))
        common = Counter(s.tokens[0] for s in made if len(s.tokens) == 2).most_common(1)[0][0]
        second = [s.tokens[1] for s in made if s.tokens[0] == common]
        assert_fits(second, probabilities([(model, 1.0)], [*ids, common], temperature))


@pytest.mark.parametrize("limits", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8}])
def test_only_the_likeliest_tokens_are_drawn_and_in_proportion(model: Any, limits: dict[str, Any]) -> None:
    temperature, ids = 0.8, TOKENIZER(PROMPTS[0])["input_ids"]
    want, order = probabilities([(model, 1.0)], ids, temperature).sort(descending=True)
    want = torch.where(torch.arange(VOCABULARY) < limits.get("top_k", VOCABULARY), want, 0.0)
    want = want / want.sum()
    want = torch.where(want.cumsum(0) - want < limits.get("top_p", 1.0), want, 0.0)
    want = torch.zeros_like(want).scatter(0, order, want / want.sum())
    how = changed(max_new_tokens=1, temperature=temperature, **limits)
    seen = [s.tokens[0] for s in sample(model, TOKENIZER, PROMPTS[:1], how, n=2000)[0]]
    assert set(seen) <= set(want.nonzero().flatten().tolist())
    assert_fits(seen, want)


def test_what_a_models_folder_says_about_generation_is_no_part_of_its_distribution(model: Any) -> None:
    plain = sample(model, TOKENIZER, PROMPTS, SHORT, n=2)
    other = copy.deepcopy(model)
    other.generation_config.update(repetition_penalty=5.0, top_k=1, no_repeat_ngram_size=1, max_length=9)
    assert sample(other, TOKENIZER, PROMPTS, SHORT, n=2) == plain


# ---------------------------------------------------------------------------------------------------- where they end


def test_samples_end_at_their_end_of_sequence_or_at_the_limit(model: Any) -> None:
    made = flat(sample(model, TOKENIZER, PROMPTS, changed(max_new_tokens=40), n=20))
    assert {s.ended for s in made} == {True, False}
    for s in made:
        assert EOS not in s.tokens[:-1]
        assert s.ended == (s.tokens[-1] == EOS)
        assert s.ended or len(s.tokens) == 40


def test_no_sample_ends_before_the_smallest_number_of_tokens(model: Any) -> None:
    made = sample(model, TOKENIZER, PROMPTS, changed(max_new_tokens=40, min_new_tokens=20), n=20)
    lengths = {len(s.tokens) for s in flat(made) if s.ended}
    assert min(lengths) > 20
    assert len(lengths) > 3


@pytest.mark.parametrize("stop", [["e"], ["an", "Z"], ["\n", "abc", "?-"]])
def test_a_stop_string_ends_the_sample_that_would_have_gone_on(model: Any, stop: list[str]) -> None:
    long = changed(max_new_tokens=60)
    plain = sample(model, TOKENIZER, PROMPTS, long, n=8)
    stopped = sample(model, TOKENIZER, PROMPTS, long.model_copy(update={"stop": stop}), n=8)
    n_stopped = 0
    for before, after in zip(flat(plain), flat(stopped), strict=True):
        texts = [TOKENIZER.decode(before.tokens[: i + 1]) for i in range(len(before.tokens))]
        at = next((i + 1 for i, text in enumerate(texts) if any(s in text for s in stop)), len(texts))
        found = any(s in texts[at - 1] for s in stop)
        assert after == Sampled(before.tokens[:at], before.ended or found)
        n_stopped += found
    assert n_stopped > 0


def test_a_stop_string_that_begins_in_the_prompt_ends_nothing(model: Any) -> None:
    first = sample(model, TOKENIZER, ["say yes"], SHORT)[0][0]
    after = TOKENIZER.decode(first.tokens[:1])
    assert sample(model, TOKENIZER, ["say yes"], changed(stop=["yes" + after]))[0][0] == first


def test_a_special_token_that_a_chat_model_ends_its_turn_with_ends_a_sample(model: Any) -> None:
    talker, tokenizer = copy.deepcopy(model), tiny_tokenizer()
    ordinary = tokenizer("e")["input_ids"][0]
    talker.generation_config.eos_token_id = [EOS, tokenizer.bos_token_id, ordinary]
    made = flat(sample(talker, tokenizer, PROMPTS, changed(max_new_tokens=40), n=20))
    assert {s.tokens[-1] for s in made if s.ended} == {EOS, tokenizer.bos_token_id}
    assert any(ordinary in s.tokens[:-1] for s in made)


# ------------------------------------------------------------------------------------------------ prompts read once


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prompt_is_read_once_for_all_its_completions(name: str) -> None:
    lm, how = build(name), changed(max_new_tokens=14, min_new_tokens=14)
    sample(lm, TOKENIZER, PROMPTS, SHORT)  # the first call compares with the model's own forward pass
    with counting(lm) as passes:
        together = sample(lm, TOKENIZER, PROMPTS, how, n=5)
    width = max(len(p) for p in PROMPTS)  # a token is a character
    # all but the last tokens of 4 prompts; these last ones; then a token of each of 4 * 5 rows
    assert passes == [4 * (width - 1), 4] + [20] * 13
    for i, prompt in enumerate(PROMPTS):
        for k, one in enumerate(together[i]):
            alone = sample(lm, TOKENIZER, [prompt], how, n=k + 1, numbers=[i])
            assert alone[0][k] == one


def test_a_model_with_recurrent_states_reads_the_prompt_for_each_completion() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA, state_size=4))
    together = sample(lm, TOKENIZER, PROMPTS, SHORT, n=3)
    alone = [sample(lm, TOKENIZER, [p], SHORT, numbers=[i])[0][0] for i, p in enumerate(PROMPTS)]
    assert [some[0] for some in together] == alone
    ids = TOKENIZER(PROMPTS[0])["input_ids"]
    drawn = sample(lm, TOKENIZER, PROMPTS[:2], changed(max_new_tokens=1), n=2000)[0]
    assert_fits([s.tokens[0] for s in drawn], probabilities([(lm, 1.0)], ids, 1.0))


def test_no_batch_has_more_sequences_than_allowed(model: Any) -> None:
    sample(model, TOKENIZER, PROMPTS, SHORT)  # the first call compares with the model's own forward pass
    with counting(model) as passes:
        sample(model, TOKENIZER, PROMPTS, changed(batch_size=5, max_new_tokens=3, min_new_tokens=3), n=2)
    width, third = len(PROMPTS[0]), len(PROMPTS[3])
    assert passes == [2 * (width - 1), 2, 4, 4, 2 * (third - 1), 2, 4, 4]
    with counting(model) as passes:
        sample(model, TOKENIZER, PROMPTS[:1], changed(batch_size=5, max_new_tokens=2, min_new_tokens=2), n=7)
    assert passes == [width - 1, 1, 5, width - 1, 1, 2]


# ------------------------------------------------------------------------------------------------- left as it was


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("backend", ["generate", "continuous"])
def test_the_model_is_given_back_as_it_was(backend: str, fails: bool) -> None:
    lora = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny_model(), lora)
    lm = wrapped.get_base_model()
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lm.config.use_cache = False
    wrapped.train()
    lm.model.layers[0].eval()
    settings = lm.generation_config
    modes = [m.training for m in wrapped.modules()]
    gradients = [p.requires_grad for p in wrapped.parameters()]
    wanted = sample(tiny_model(), TOKENIZER, PROMPTS, SHORT, n=2, backend=backend)
    if fails:
        handle = lm.lm_head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError if backend == "generate" else ModelError):
            sample(wrapped, TOKENIZER, PROMPTS, SHORT, n=2, backend=backend)
        handle.remove()
    else:
        with counting(lm) as passes:
            assert sample(wrapped, TOKENIZER, PROMPTS, SHORT, n=2, backend=backend) == wanted
        assert max(passes[1:]) <= 4 * (len(PROMPTS[0]) + 1)  # the cache is used, in training with checkpointing too
    assert [m.training for m in wrapped.modules()] == modes
    assert [p.requires_grad for p in wrapped.parameters()] == gradients
    assert lm.config.use_cache is False
    assert lm.is_gradient_checkpointing
    assert lm.generation_config is settings
    assert lm.config._attn_implementation == "sdpa"


# ------------------------------------------------------------------------------------------------------ the mixture


@pytest.mark.parametrize("weight", [0.25, 0.7])
def test_the_mixture_is_geometric_token_by_token(model: Any, weight: float) -> None:
    reference, temperature = tiny_model(1), 0.8
    how = changed(max_new_tokens=2, temperature=temperature, batch_size=5000)
    drawn = sample(model, TOKENIZER, PROMPTS[:2], how, n=10_000, mixture=Mixture(reference, weight))
    models = [(model, 1 - weight), (reference, weight)]
    for prompt, made in zip(PROMPTS, drawn, strict=False):
        ids = TOKENIZER(prompt)["input_ids"]
        assert_fits([s.tokens[0] for s in made], probabilities(models, ids, temperature))
        common = Counter(s.tokens[0] for s in made if len(s.tokens) == 2).most_common(1)[0][0]
        second = [s.tokens[1] for s in made if s.tokens[0] == common]
        assert_fits(second, probabilities(models, [*ids, common], temperature))


@pytest.mark.parametrize("n", [1, 3])
def test_a_mixture_with_no_weight_on_one_of_the_two_is_the_other(model: Any, n: int) -> None:
    reference, how = tiny_model(1), changed(min_new_tokens=3, top_p=0.9)
    policys = sample(model, TOKENIZER, PROMPTS, how, n=n)
    references = sample(reference, TOKENIZER, PROMPTS, how, n=n)
    assert policys != references
    assert sample(model, TOKENIZER, PROMPTS, how, n=n, mixture=Mixture(reference, 0.0)) == policys
    assert sample(model, TOKENIZER, PROMPTS, how, n=n, mixture=Mixture(reference, 1.0)) == references


def test_the_reference_reads_a_prompt_once_too(model: Any) -> None:
    reference = tiny_model(1)
    sample(reference, TOKENIZER, PROMPTS, SHORT)
    with counting(reference) as passes:
        how = changed(max_new_tokens=4, min_new_tokens=4)
        sample(model, TOKENIZER, PROMPTS, how, n=5, mixture=Mixture(reference, 0.5))
    assert passes == [4 * (len(PROMPTS[0]) - 1), 4, 20, 20, 20]


def test_the_reference_may_be_the_policy_without_its_adapter() -> None:
    lora = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = peft.get_peft_model(tiny_model(), lora)
    apart = sample(policy, TOKENIZER, PROMPTS, SHORT, n=3, mixture=Mixture(tiny_model(), 0.5))
    assert apart != sample(policy, TOKENIZER, PROMPTS, SHORT, n=3)
    one = Mixture(policy, 0.5, policy.disable_adapter)
    assert sample(policy, TOKENIZER, PROMPTS, SHORT, n=3, mixture=one) == apart


def test_a_mixture_with_recurrent_states() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm, other = (transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA, state_size=4)) for _ in range(2))
    references = sample(other, TOKENIZER, PROMPTS, SHORT, n=2)
    assert sample(lm, TOKENIZER, PROMPTS, SHORT, n=2, mixture=Mixture(other, 1.0)) == references


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_weight_that_is_none_is_refused(model: Any, weight: float) -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        Mixture(model, weight)


# -------------------------------------------------------------------------------------------------------- refusals


def test_an_empty_prompt_is_named(model: Any) -> None:
    with pytest.raises(DataError, match="prompt 2 of 3 is empty"):
        sample(model, TOKENIZER, [[5], [], [6]], SHORT)


def test_no_prompts_give_no_completions(model: Any) -> None:
    for backend in ("generate", "continuous"):
        assert sample(model, TOKENIZER, [], SHORT, backend=backend) == []


def test_more_tokens_than_learned_positions_are_refused_before_anything_is_sampled() -> None:
    lm, prompts = build("gpt2"), [[5] * 10, [5] * 60]
    assert len(sample(lm, TOKENIZER, prompts, changed(max_new_tokens=4))) == 2
    with counting(lm) as passes:
        with pytest.raises(ModelError, match=r"prompt 2 of 2 has 60 tokens, and with max_new_tokens 5 .* 64 positions"):
            sample(lm, TOKENIZER, prompts, changed(max_new_tokens=5))
    assert passes == []
    # rotary positions go on for ever
    assert len(sample(tiny_model(), TOKENIZER, [[5] * 1030], changed(max_new_tokens=2))) == 1


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        sample(model, tokenizer, PROMPTS, SHORT)


@pytest.mark.parametrize("asked", [{"stop": ["."]}, {"min_new_tokens": 2}])
def test_what_continuous_batching_cannot_do_is_refused(model: Any, asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"does not support `{next(iter(asked))}`.*backend: generate"):
        sample(model, TOKENIZER, PROMPTS, changed(**asked), backend="continuous")


def test_continuous_batching_cannot_mix(model: Any) -> None:
    with pytest.raises(ConfigError, match="does not support mixtures of two models; use backend: generate"):
        sample(model, TOKENIZER, PROMPTS, SHORT, mixture=Mixture(model, 0.5), backend="continuous")


def test_a_model_that_continuous_batching_cannot_serve_is_an_error_with_the_way_out(model: Any) -> None:
    other = copy.deepcopy(model)
    other.config._attn_implementation = "somebodys_own"
    with pytest.raises(ModelError, match=r"continuous batching failed .*somebodys_own is not.* use backend: gen"):
        sample(other, TOKENIZER, PROMPTS, SHORT, backend="continuous")


def test_continuous_batching_keeps_the_order_of_the_prompts_and_the_limits(model: Any) -> None:
    prompts = [[5] * (20 - i) for i in range(9)]
    how = changed(max_new_tokens=30, batch_size=4)
    made = sample(model, TOKENIZER, prompts, how, n=3, backend="continuous")
    assert [len(some) for some in made] == [3] * 9
    for s in flat(made):
        assert EOS not in s.tokens[:-1]
        assert s.ended == (s.tokens[-1] == EOS)
        assert s.ended or len(s.tokens) == 30
    # a sharp model says the same whatever the randomness, so a prompt's completions show whose they are
    sharp = changed(temperature=1e-4, max_new_tokens=5, batch_size=4)
    mixed = [PROMPTS[i % 4] for i in range(9)]
    want = sample(model, TOKENIZER, mixed, sharp, n=2)
    assert sample(model, TOKENIZER, mixed, sharp, n=2, backend="continuous") == want
