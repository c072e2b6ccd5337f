"""Models that say a number: packed rows say what the model's own forward says, and a critic beside a policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from alignkit.config import RunConfig
from alignkit.errors import ModelError
from alignkit.lora_settings import LoraSettings
from alignkit.models.adapters import add_lora
from alignkit.models.dropout import drop_dropout
from alignkit.models.layouts import choose_layout
from alignkit.models.loading import classifier_like, from_pretrained, load_model
from alignkit.models.packing import batch_of
from alignkit.models.scoring import Scorer
from alignkit.models.values import ActorCritic, Valuer, number_head, plain_score, value_head
from alignkit.testing.world import tiny_classifier, tiny_examples, tiny_model
from alignkit.types import Layout
from exact import assert_rounding_only, exact_copy

CPU = torch.device("cpu")
LAYOUTS = [Layout("forest", 64), Layout("padded")]


def config(**changes: Any) -> RunConfig:
    return RunConfig(**{"method": "reward", "model": "m", "data": "d", "device": "cpu", **changes})


def classifier(name: str) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_labels": 1}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    made: Any = {
        "llama": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**sizes, **more)),
        "gpt2": lambda: tf.GPT2ForSequenceClassification(
            tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, num_labels=1)
        ),
        "mistral": lambda: tf.MistralForSequenceClassification(tf.MistralConfig(**sizes, **more, sliding_window=6)),
        "qwen3": lambda: tf.Qwen3ForSequenceClassification(tf.Qwen3Config(**sizes, **more, head_dim=8)),
    }[name]()
    drop_dropout(made)
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3"])
def test_packed_scores_are_those_of_one_sequence_at_a_time(name: str, layout: Layout) -> None:
    model = classifier(name)
    batch = batch_of(tiny_examples("pairs"), layout)
    with torch.no_grad():
        got = Valuer(model)(batch.rows, batch.rows.last_at)
        sequences = [torch.cat([e.prompt, c.tokens])[None].long() for e in batch.examples for c in e.completions]
        own, exact = (
            torch.stack([m(input_ids=ids).logits[0, 0] for ids in sequences]) for m in (model, exact_copy(model))
        )
    assert_rounding_only(got, own, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_read_where_each_token_is_predicted(layout: Layout) -> None:
    """The value of a token is the head's output at the position before it, in one sequence at a time."""
    policy, critic = Scorer(tiny_model()), tiny_classifier(3)
    batch = batch_of(tiny_examples("pairs"), layout)
    with torch.no_grad():
        logps, entropy, values, _ = ActorCritic(policy, Valuer(critic))(batch.rows, batch.targets, 1.0, True)

        def alone_by(model: Any) -> torch.Tensor:
            parts = []
            for e in batch.examples:
                for c in e.completions:
                    hidden = model.model(input_ids=torch.cat([e.prompt, c.tokens])[None].long()).last_hidden_state[0]
                    parts.append(model.score(hidden).squeeze(-1)[len(e.prompt) - 1 : -1][c.trained_at])
            return torch.cat(parts)

        own, exact = alone_by(critic), alone_by(exact_copy(critic))
        alone = policy(batch.rows, batch.targets, 1.0, True)
    assert_rounding_only(values, own, exact)
    assert torch.equal(logps, alone[0])
    assert torch.equal(entropy, alone[1])


def test_a_shared_critic_reads_the_policys_hidden_states_and_a_frozen_policy_gets_no_gradient() -> None:
    model = tiny_model()
    policy, head = Scorer(model), value_head(model)
    assert not head.weight.any()
    nn.init.normal_(head.weight)
    batch = batch_of(tiny_examples("text"), Layout("padded"))
    both = ActorCritic(policy, head)
    _, _, values, _ = both(batch.rows, batch.targets)
    e = batch.examples[0]
    ids = torch.cat([e.prompt, e.completions[0].tokens])[None].long()
    own, exact = (
        h(m.model(input_ids=ids).last_hidden_state[0]).squeeze(-1)[len(e.prompt) - 1 : -1]
        for m, h in ((model, head), (exact_copy(model), exact_copy(head)))
    )
    assert_rounding_only(values[: len(own)], own, exact)
    _, _, values, _ = both(batch.rows, batch.targets, frozen=True)
    values.sum().backward()
    assert head.weight.grad is not None
    assert all(p.grad is None for p in model.parameters())


def test_a_classifier_made_of_a_language_model_has_its_trunk_and_a_head_of_zeros() -> None:
    model = tiny_model(4)
    made = classifier_like(model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(made.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
        assert float(plain_score(made, ids[0])) == 0.0
        made.model.embed_tokens.weight.zero_()
    assert model.model.embed_tokens.weight.any()  # a copy
    adapted = add_lora(tiny_model(4), LoraSettings(r=2))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    with torch.no_grad():
        merged = classifier_like(adapted)
        own, exact = (m.get_base_model().model(ids).last_hidden_state for m in (adapted, exact_copy(adapted)))
        assert_rounding_only(merged.model(ids).last_hidden_state, own, exact)
    assert not [n for n, _ in merged.named_parameters() if "lora" in n]


def test_a_model_with_three_labels_is_no_reward_model(tmp_path: Path) -> None:
    model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**{**SMALL, "num_labels": 3}))
    with pytest.raises(ModelError, match="a reward model has 1 label, got LlamaForSequenceClassification with 3"):
        number_head(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a classifier with 3 labels; a reward model has 1"):
        from_pretrained(str(tmp_path), config(), "classifier")
    with pytest.raises(ModelError, match="LlamaForCausalLM has no head `score`"):
        number_head(tiny_model())


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def test_a_language_models_folder_becomes_a_classifier_with_a_new_head(tmp_path: Path) -> None:
    tiny_model(2).save_pretrained(tmp_path)
    model, came_with_adapter = load_model(config(model=str(tmp_path)), CPU, "classifier")
    assert not came_with_adapter
    assert torch.equal(model.model.embed_tokens.weight, tiny_model(2).model.embed_tokens.weight)
    assert number_head(model).weight.shape == (1, 32)
    assert not number_head(model).weight.any()
    adapted, _ = load_model(config(model=str(tmp_path), lora=4), CPU, "classifier")
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert any("score" in n for n in trained)  # a new head that is not trained would stay noise
    assert all("lora" in n or "score" in n for n in trained)
    batch = batch_of(tiny_examples("pairs"), Layout("forest", 64))
    with torch.no_grad():
        got = Valuer(adapted)(batch.rows, batch.rows.last_at)
        e = batch.examples[0]
        ids = torch.cat([e.prompt, e.completions[0].tokens])
        own, exact = (plain_score(m, ids) for m in (adapted, exact_copy(adapted)))
    assert_rounding_only(got[0], own, exact)


def test_the_layout_of_a_classifier_is_probed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny_examples("pairs")
    assert choose_layout(Valuer(tiny_classifier()), rows, config(), CPU).kind == "forest"
    monkeypatch.setattr("alignkit.models.scoring.attention_mask", lambda rows, *_: (rows.tree_ids >= 0).long())
    valuer = Valuer(tiny_classifier())
    assert "scores differ by" in (valuer.probe(batch_of(rows, Layout("forest", 64))) or "")
    assert valuer.probe(batch_of(rows, Layout("padded"))) is None
    monkeypatch.setattr("alignkit.models.scoring.attention_mask", lambda *_: None)
    with pytest.raises(ModelError, match="this model cannot read the packed forest"):
        choose_layout(valuer, rows, config(layout="forest"), CPU)


def test_a_pad_that_is_the_end_does_not_hide_the_last_token() -> None:
    """transformers looks for the last token that is no pad, which is the one before an EOS that pads."""
    model = tiny_classifier()
    ids = torch.tensor([9, 8, 2])
    model.config.pad_token_id = 2
    hidden = model.model(input_ids=ids[None]).last_hidden_state[0, -1]
    assert plain_score(model, ids).item() == pytest.approx(model.score(hidden).item(), abs=1e-6)
    assert model.config.pad_token_id == 2
    (example,) = tiny_examples("text", 1)
    batch = batch_of([replace(example, prompt=ids[:1].int())], Layout("padded"))
    assert Valuer(model).probe(batch) is None
