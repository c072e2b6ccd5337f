"""Sampling: reproducible, cut at the end of the sequence, and from the model's own distribution."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.rollout import sample

PROMPTS = ["1 the fox sees:", "2 a:", "3 the big old king likes:"]


@pytest.fixture
def loaded(tiny: str) -> tuple[torch.nn.Module, object]:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), AutoTokenizer.from_pretrained(tiny)


def test_the_same_seed_gives_the_same_samples_and_leaves_the_generators_as_they_were(loaded: tuple) -> None:
    model, tokenizer = loaded
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = sample(model, tokenizer, PROMPTS, max_new_tokens=8, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert sample(model, tokenizer, PROMPTS, max_new_tokens=8, seed=3) == first
    assert sample(model, tokenizer, PROMPTS, max_new_tokens=8, seed=4) != first


def test_samples_end_at_their_end_of_sequence_or_at_the_limit(loaded: tuple) -> None:
    model, tokenizer = loaded
    for ids in sample(model, tokenizer, PROMPTS * 20, max_new_tokens=40, temperature=2.0):
        assert tokenizer.eos_token_id not in ids[:-1]
        assert len(ids) <= 40
        assert len(ids) == 40 or ids[-1] == tokenizer.eos_token_id


def test_the_model_is_given_back_as_it_was(loaded: tuple) -> None:
    model, tokenizer = loaded
    model.train()
    model.config.use_cache = False
    sample(model, tokenizer, PROMPTS, max_new_tokens=2)
    assert model.training
    assert model.config.use_cache is False


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_come_with_the_probabilities_of_the_model_at_that_temperature(
    loaded: tuple, temperature: float
) -> None:
    model, tokenizer = loaded
    n = 4000
    # prompts of different lengths in one batch, so that padding on the left would show
    prompts = [PROMPTS[0], PROMPTS[1]] * n
    drawn = sample(model, tokenizer, prompts, max_new_tokens=1, temperature=temperature, batch_size=1000)
    for which in (0, 1):
        ids = torch.tensor([tokenizer(prompts[which])["input_ids"]])
        with torch.no_grad():
            want = (model(ids).logits[0, -1].double() / temperature).softmax(-1)
        seen = torch.bincount(torch.tensor([d[0] for d in drawn[which::2]]), minlength=len(want)).double() / n
        # total variation of n draws from k likely tokens is about sqrt(k / (2 pi n)); a wrong temperature gives > 0.3
        assert float((seen - want).abs().sum() / 2) < 0.16
