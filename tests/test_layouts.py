"""Which layout a model can read, and what is refused because no layout would be right."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from zoo import (
    CPU,
    config,
    examples,
    fresh,
    model_of,
    one_at_a_time,
)

from alignkit.errors import ModelError
from alignkit.models.layouts import check_fit, choose_layout
from alignkit.models.packing import batch_of
from alignkit.models.scoring import Scorer, probe
from alignkit.types import Completion, Example, Layout
from exact import assert_rounding_only, exact_copy


def test_a_model_that_takes_the_forest_gets_it_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    layout = choose_layout(Scorer(model_of("llama")), examples(), config(row_tokens=77), CPU)
    assert (layout.kind, layout.row_tokens, layout.multiple_of) == ("forest", 77, 1)
    assert not caplog.records


def test_a_recurrent_model_gets_padded_rows_with_one_warning_and_stays_exact(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "alignkit")
    model = model_of("mamba")
    layout = choose_layout(Scorer(model), examples(), config(), CPU)
    assert layout.kind == "padded"
    own = [r.getMessage() for r in caplog.records if r.name.startswith("alignkit")]
    assert len(own) == 1
    assert "cannot read the packed forest" in own[0]
    batch = batch_of(examples(), layout)
    with torch.no_grad():
        got = Scorer(model)(batch.rows, batch.targets).logps
        own, exact = (one_at_a_time(m, examples()) for m in (model, exact_copy(model)))
    assert_rounding_only(got, own, exact)


def test_a_scale_of_none_is_no_scale() -> None:
    model, batch = model_of("mpt, a scale of None"), batch_of(examples(), Layout("padded"))
    with torch.no_grad():
        got = Scorer(model)(batch.rows, batch.targets).logps
        own, exact = (one_at_a_time(m, examples()) for m in (model, exact_copy(model)))
    assert_rounding_only(got, own, exact)


def test_a_recurrent_model_told_to_read_the_forest_is_an_error_that_says_what_to_set() -> None:
    with pytest.raises(ModelError, match=r"cannot read the packed forest .*use layout: auto or padded"):
        choose_layout(Scorer(model_of("mamba")), examples(), config(layout="forest"), CPU)


def test_padded_rows_that_were_asked_for_are_given_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_layout(Scorer(model_of("llama")), examples(), config(layout="padded"), CPU).kind == "padded"
    assert not [r for r in caplog.records if r.name.startswith("alignkit")]


def test_tokens_that_the_model_does_not_embed_are_named_with_their_row() -> None:
    model = model_of("llama")
    n = model.get_input_embeddings().num_embeddings
    strange = Example(torch.tensor([3, 4]), (Completion(torch.tensor([5])), Completion(torch.tensor([n]))), row=7)
    with pytest.raises(
        ModelError, match=rf"row 7 holds the token {n}, but the model has {n} embeddings \(0 to {n - 1}\)"
    ):
        check_fit(model, [*examples(), strange])
    check_fit(model, examples())


def test_rows_longer_than_the_models_positions_are_an_error() -> None:
    gpt2 = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=99, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    prompt = torch.tensor([1, 2, 3, 4, 5])
    fits, long = (Example(prompt, (Completion(torch.arange(n)),), row=n) for n in (3, 4))
    check_fit(gpt2, [fits])
    what = (
        "1 of 2 sequences are longer than the model's 8 positions, the longest 9 tokens .row 4.; lower max_prompt_tok"
    )
    with pytest.raises(ModelError, match=what):
        check_fit(gpt2, [fits, long])
    # where completions are lent, the 5 tokens of one prompt may meet the 4 of another's completion
    lends = Example(prompt[:2], (Completion(torch.arange(4)),), row=9)
    check_fit(gpt2, [fits, lends])
    with pytest.raises(ModelError, match=r"1 of 2 sequences are longer .* the longest 9 tokens .row 9."):
        check_fit(gpt2, [fits, lends], mixes=True)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default"}, 8),
        ({"rope_type": "linear", "factor": 2.0}, 16),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 32),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2}, 8),
    ],
)
def test_rotary_positions_end_where_the_configuration_ends_them(rope: dict[str, Any], positions: int) -> None:
    llama = tf.LlamaConfig(vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                           num_attention_heads=1, max_position_embeddings=8, rope_parameters=rope)  # fmt: skip
    model = tf.LlamaForCausalLM(llama)
    prompt = torch.tensor([1, 2, 3, 4, 5])
    fits, long = (Example(prompt, (Completion(torch.arange(n)),), row=n) for n in (positions - 5, positions - 4))
    check_fit(model, [fits])
    what = f"longer than the model's {positions} positions, the longest {positions + 1} tokens .*rope_parameters"
    with pytest.raises(ModelError, match=what):
        check_fit(model, [fits, long])


class Doubled(nn.Module):
    """Something between trunk and logits that alignkit has never heard of."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, **kwargs: Any) -> Any:
        out = self.inner(**kwargs)
        out.logits = out.logits * 2
        return out


@pytest.mark.parametrize("layout", ["auto", "forest", "padded"])
def test_a_head_that_does_something_unknown_to_the_logits_is_refused(layout: str) -> None:
    scorer = Scorer(Doubled(model_of("llama")))
    with pytest.raises(ModelError, match=r"differ by [\d.]+ nats a token"):
        choose_layout(scorer, examples(), config(layout=layout), CPU)


def test_the_probe_finds_a_wrong_mask_and_says_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(examples(), Layout())
    scorer = Scorer(model_of("llama"))
    assert probe(scorer, batch) is None

    def causal(rows: Any, *_: Any) -> Tensor:
        width = rows.input_ids.shape[1]
        return torch.ones(width, width, dtype=torch.bool).tril().expand(len(rows.input_ids), 1, -1, -1)

    monkeypatch.setattr("alignkit.models.scoring.attention_mask", causal)
    assert "log-probabilities differ by" in (probe(scorer, batch) or "")


def test_the_probe_finds_a_wrong_mask_in_bf16_too_and_forgives_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama").bfloat16()
    batch = batch_of(examples(), Layout())
    assert probe(Scorer(model), batch) is None
    monkeypatch.setattr("alignkit.models.scoring.attention_mask", lambda rows, *_: (rows.tree_ids >= 0).long())
    assert "log-probabilities differ by" in (probe(Scorer(model), batch) or "")


@pytest.mark.parametrize("layout", ["auto", "forest"])
def test_where_flex_attention_refuses_the_forest_is_read_with_a_dense_mask_and_that_is_said(
    layout: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.integrations.flex_attention import WrappedFlexAttention

    def refuse(self: object) -> None:
        raise NotImplementedError("NYI: embedding dimension must be at least 16")

    monkeypatch.setattr(WrappedFlexAttention, "__call__", refuse)
    model = fresh("llama").eval()
    model.set_attn_implementation("flex_attention")
    with caplog.at_level(logging.WARNING, "alignkit"):
        chosen = choose_layout(Scorer(model), examples(), config(layout=layout), CPU)
    assert chosen.kind == "forest"
    assert model.config._attn_implementation == "sdpa"
    assert "FlexAttention cannot be used with this model (NotImplementedError: NYI: emb" in caplog.text
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ModelError, match="at least 16"):
        choose_layout(Scorer(model), examples(), config(layout="forest", attention="flex_attention"), CPU)


def test_a_model_that_sees_what_it_predicts_is_refused() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = tf.BertLMHeadModel(tf.BertConfig(vocab_size=97, **sizes)).eval()
    for p in bert.parameters():
        p.data *= 5  # as drawn, it hardly looks at other tokens
    with pytest.raises(ModelError, match="BertLMHeadModel sees the tokens that it predicts"):
        choose_layout(Scorer(bert), examples(), config(), CPU)
