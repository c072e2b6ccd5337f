"""Scoring: every architecture's own forward, one sequence at a time, is the truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from zoo import (
    CPU,
    FOREST,
    LAYOUTS,
    config,
    examples,
    fresh,
    model_of,
    one_at_a_time,
    same_tree_mask,
)

from alignkit.errors import ModelError
from alignkit.lora_settings import LoraSettings
from alignkit.models import scoring as models
from alignkit.models.adapters import add_lora
from alignkit.models.layouts import choose_layout
from alignkit.models.loading import causal_lm
from alignkit.models.packing import batch_of
from alignkit.models.scoring import Scorer, probe
from alignkit.types import Layout
from alignkit_kernels import linear_logps
from exact import assert_rounding_only, exact_copy, gradients


@pytest.mark.parametrize("name", FOREST)
def test_forest_and_padded_rows_score_as_the_model_itself_one_sequence_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name)
    with torch.no_grad():
        want, exact = (one_at_a_time(m, examples()) for m in (model, exact_copy(model)))
        for layout in LAYOUTS:
            batch = batch_of(examples(), layout)
            got = Scorer(model)(batch.rows, batch.targets).logps
            assert_rounding_only(got, want, exact, str(layout))
        # a completion that saw its sibling would have shown
        monkeypatch.setattr("alignkit.models.attention.dense_mask", same_tree_mask)
        batch = batch_of(examples(), Layout("forest", 64))
        assert float((Scorer(model)(batch.rows, batch.targets).logps - want).abs().max()) > 0.05
    assert got.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gemma 2", "phi, a bias on its head"])
@pytest.mark.parametrize("layout", [Layout("forest", 64), Layout("padded")], ids=["forest", "padded"])
def test_the_gradient_of_every_weight_is_that_of_one_sequence_at_a_time(name: str, layout: Layout) -> None:
    model, batch = fresh(name), batch_of(examples(), layout)
    want, exact = (gradients(m, lambda m: one_at_a_time(m, examples()).sum()) for m in (model, exact_copy(model)))
    got = gradients(model, lambda m: Scorer(m)(batch.rows, batch.targets).logps.sum())
    assert got.keys() == want.keys()
    for n, gradient in got.items():
        assert float(want[n].abs().max()) > 0, n
        assert_rounding_only(gradient, want[n], exact[n], n)


def test_temperature_and_entropy_are_those_of_the_capped_logits() -> None:
    model, given = model_of("gemma 2"), examples()[:2]
    batch = batch_of(given, Layout())
    with torch.no_grad():
        logps, entropy, *_ = Scorer(model)(batch.rows, batch.targets, temperature=0.5, entropy=True)
        e = given[0]
        n, sequence = len(e.completions[0].tokens), torch.cat([e.prompt, e.completions[0].tokens]).long()
        wanted = []
        for m in (model, exact_copy(model)):
            rows = (m(input_ids=sequence[None]).logits[0] / 0.5).log_softmax(-1)[len(e.prompt) - 1 : -1]
            wanted.append((rows[range(n), sequence[-n:]], -(rows.exp() * rows).sum(1)))
    (own_logps, own_entropy), (exact_logps, exact_entropy) = wanted
    assert_rounding_only(logps[:n], own_logps, exact_logps, "log-probabilities")
    assert_rounding_only(entropy[:n], own_entropy, exact_entropy, "entropy")


def lora_of(name: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    model = add_lora(fresh(name), LoraSettings(**settings))
    for n, p in model.named_parameters():
        if "lora_B" in n:  # zero at birth, and then nothing would show
            nn.init.normal_(p, 0, 0.2)
    return model


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", ["llama", "llama, tied", "gemma 2", "cohere", "granite"])
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2},
        {"r": 2, "target_modules": ["q_proj", "lm_head"]},
        {"r": 2, "modules_to_save": ["lm_head"]},
    ],
    ids=["all-linear", "lm_head adapted", "lm_head saved"],
)
def test_adapted_models_score_as_their_own_forward(name: str, settings: dict[str, Any]) -> None:
    model = lora_of(name, **settings)
    for n, p in model.named_parameters():
        if "modules_to_save" in n:
            nn.init.normal_(p, 0, 0.2)
    scorer = Scorer(model)
    with torch.no_grad():
        adapted, exact = (one_at_a_time(m, examples()) for m in (model, exact_copy(model)))
        for layout in (Layout("forest", 64), Layout("padded")):
            batch = batch_of(examples(), layout)
            assert_rounding_only(scorer(batch.rows, batch.targets).logps, adapted, exact, str(layout))
        with model.disable_adapter():
            base = scorer(batch.rows, batch.targets).logps
    # with the adapters off it is the model that they were put on, and with them on it is another one
    with torch.no_grad():
        own, exact = (one_at_a_time(m, examples()) for m in (model_of(name), exact_copy(model_of(name))))
        assert_rounding_only(base, own, exact, "adapters off")
    assert float((adapted - base).abs().max()) > 0.05
    assert probe(scorer, batch_of(examples(), Layout())) is None


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_on_the_head_are_trained_and_the_base_is_not(settings: dict[str, Any]) -> None:
    model = lora_of("llama", r=2, **settings)
    batch = batch_of(examples(), Layout())
    got = Scorer(model)(batch.rows, batch.targets).logps
    got.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any("lm_head" in n for n in grads)
    assert all("lora_" in n or "modules_to_save" in n for n in grads)
    own, exact = (gradients(m, lambda m: one_at_a_time(m, examples()).sum()) for m in (model, exact_copy(model)))
    for n, gradient in grads.items():
        assert_rounding_only(gradient, own[n], exact[n], n)


HEADS = [
    ("llama", None, 2),
    ("llama, tied", None, 2),
    ("llama", {"r": 2}, 1),
    ("llama, tied", {"r": 2}, 1),
    ("llama", {"r": 2, "modules_to_save": ["lm_head"]}, 2),
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(("name", "lora", "path"), HEADS)
def test_each_way_to_train_takes_its_path_through_the_head_and_never_calls_it(
    name: str, lora: dict[str, Any] | None, path: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lora_of(name, **lora) if lora else fresh(name)
    taken = []
    honest = type(linear_logps).plan
    monkeypatch.setattr(
        type(linear_logps), "plan", staticmethod(lambda *sizes: taken.append(honest(*sizes)) or taken[-1])
    )

    def called(*_: Any) -> None:
        raise AssertionError("the head was called")

    causal_lm(model).get_output_embeddings().register_forward_pre_hook(called)
    batch = batch_of(examples(), Layout())
    scorer = Scorer(model, kept_logits=1 << 30)
    scorer(batch.rows, batch.targets).logps.sum().backward()
    with torch.no_grad():  # a reference pass
        scorer(batch.rows, batch.targets)
    tight = Scorer(model, kept_logits=0)
    tight(batch.rows, batch.targets)
    assert [plan.path for plan in taken] == [path, 4, 3 if path == 2 else path]


def test_a_head_with_low_rank_updates_is_called_on_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_of("llama", r=2, target_modules=["q_proj", "lm_head"])
    batch = batch_of(examples(), Layout())

    def passes() -> tuple[list[torch.Tensor], list[int]]:
        rows: list[int] = []
        layer = causal_lm(model).get_output_embeddings()
        hook = layer.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
        model.zero_grad()
        logps, entropy, *_ = Scorer(model)(batch.rows, batch.targets, 0.7, True)
        (logps + 0.3 * entropy).sum().backward()
        hook.remove()
        return [logps.detach(), entropy.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], rows

    whole, rows = passes()
    assert rows == [len(batch.targets)] * 2  # forward, and again in the backward
    monkeypatch.setattr(models, "BLOCK_LOGITS", 3 * model.config.vocab_size)
    parts, rows = passes()
    assert max(rows) == 3
    assert sum(rows) == 2 * len(batch.targets)
    monkeypatch.undo()
    model.double()
    exact, _ = passes()
    for a, b, c in zip(parts, whole, exact, strict=True):
        assert_rounding_only(a, b, c)


class Bounded(nn.Linear):
    """A head that keeps its own output for its backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(x)) * 3


@pytest.mark.parametrize("wrap", [False, True], ids=["a subclass of Linear", "no width of its own"])
def test_a_head_of_another_kind_is_asked_itself_and_its_gradients_are_right(wrap: bool) -> None:
    model = fresh("llama")
    layer = Bounded(48, 96, bias=False)
    nn.init.normal_(layer.weight, 0, 0.2)
    model.set_output_embeddings(nn.Sequential(layer) if wrap else layer)
    batch = batch_of(examples(), Layout())
    logps = Scorer(model)(batch.rows, batch.targets, 0.7).logps

    def plain(m: Any) -> tuple[torch.Tensor, torch.Tensor]:
        whole = (m.get_output_embeddings()(models.trunk(m, batch.rows)) / 0.7).log_softmax(-1)
        return whole.gather(1, batch.targets[:, None]).squeeze(1), -(whole.exp() * whole).sum(1)

    def loss(scores: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (scores[0] + 0.3 * scores[1]).sum()

    exact = exact_copy(model)
    assert_rounding_only(logps, plain(model)[0], plain(exact)[0], "log-probabilities")
    got = gradients(model, lambda m: loss(Scorer(m)(batch.rows, batch.targets, 0.7, True)[:2]))
    own, true = (gradients(m, lambda m: loss(plain(m))) for m in (model, exact))
    for n, gradient in got.items():
        assert_rounding_only(gradient, own[n], true[n], n)


def test_what_a_head_refuses_is_not_told_as_a_difference_of_numbers() -> None:
    model = fresh("llama")
    model.set_output_embeddings(model.get_output_embeddings().to(torch.bfloat16))
    with pytest.raises(ModelError, match=r"cannot score tokens with LlamaForCausalLM: \w+Error: "):
        choose_layout(Scorer(model), examples(), config(), CPU)


def test_a_model_that_names_no_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    batch = batch_of(examples(), Layout())
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM has no head to score tokens with: get_output_embeddings\(\) is None"
    ):
        Scorer(model)(batch.rows, batch.targets)


def test_lora_on_modules_that_do_not_exist_names_those_that_do() -> None:
    with pytest.raises(ModelError, match=r"LoRA: .*The linear modules are down_proj, gate_proj, .*v_proj"):
        add_lora(fresh("llama"), LoraSettings(target_modules=["nothing"]))


def test_causal_lm_finds_the_model_inside_an_adapter() -> None:
    model = lora_of("llama", r=2)
    assert type(causal_lm(model)) is tf.LlamaForCausalLM
    assert causal_lm(model_of("llama")) is model_of("llama")
