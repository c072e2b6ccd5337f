"""Loading models and scoring with them: every architecture's own forward, one sequence at a time, is the truth."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from alignkit import models
from alignkit.attention import attention_mask
from alignkit.config import LoraSettings, RunConfig
from alignkit.errors import ModelError
from alignkit.layouts import check_fit, choose_layout
from alignkit.loading import add_lora, causal_lm, drop_dropout, load_model, load_tokenizer
from alignkit.models import Scorer, probe
from alignkit.packing import batch_of, dense_mask, pack
from alignkit.types import Completion, Example, Layout
from alignkit_kernels import linear_logps

CPU = torch.device("cpu")
BASE = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
ENDS = {"bos_token_id": 0, "eos_token_id": 1}
GEMMA = {**BASE, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12}
OPT = {
    "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4,
    "max_position_embeddings": 128, "word_embed_proj_dim": 48,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**BASE),
    "llama, tied": lambda: tf.LlamaConfig(**BASE, tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3Config(**BASE, head_dim=12),
    "mistral with a window": lambda: tf.MistralConfig(**BASE, sliding_window=8),
    "gemma 2": lambda: tf.Gemma2Config(**GEMMA, final_logit_softcapping=5.0, attn_logit_softcapping=3.0),
    "gemma 3": lambda: tf.Gemma3TextConfig(**GEMMA),
    "gpt 2": lambda: tf.GPT2Config(vocab_size=96, n_embd=48, n_layer=3, n_head=4, n_positions=128, **ENDS),
    "gpt neox": lambda: tf.GPTNeoXConfig(**{k: v for k, v in BASE.items() if k != "num_key_value_heads"}, **ENDS),
    "cohere": lambda: tf.CohereConfig(**BASE, logit_scale=0.3, pad_token_id=0, **ENDS),
    "granite": lambda: tf.GraniteConfig(**BASE, logits_scaling=3.0),
    "phi, a bias on its head": lambda: tf.PhiConfig(**BASE, **ENDS),
    "opt": lambda: tf.OPTConfig(**OPT, **ENDS),
    "starcoder 2": lambda: tf.Starcoder2Config(**BASE, **ENDS),
    "mixtral": lambda: tf.MixtralConfig(**BASE, num_local_experts=2),
    "mpt, a scale of None": lambda: tf.MptConfig(vocab_size=96, d_model=48, n_heads=4, n_layers=2, max_seq_len=128),
    "mamba": lambda: tf.MambaConfig(vocab_size=96, hidden_size=48, num_hidden_layers=2),
}
FOREST = [name for name in CONFIGS if not name.startswith(("mamba", "mpt"))]


def fresh(name: str, **changes: Any) -> Any:
    """A model of that kind whose weights are large enough for a wrong mask to show."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            # matrices anew; norms and biases are moved from where they start, so that none is left out unnoticed
            parameter.mul_(parameter.dim() == 1).add_(torch.randn_like(parameter) * 0.2)
    drop_dropout(model)
    return model.train()


@cache
def model_of(name: str) -> Any:
    return fresh(name)


def examples() -> list[Example]:
    g = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> Tensor:
        n = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(3, 90, (n,), generator=g, dtype=torch.int32)

    made = [Example(tokens(1, 30), (Completion(tokens(1, 20)), Completion(tokens(1, 20))), row=i) for i in range(5)]
    some = Completion(torch.tensor([5, 6, 7, 8]), torch.tensor([False, True, False, True]))
    return [*made, Example(torch.tensor([9, 9, 4]), (some,), row=5)]


def one_at_a_time(model: Any, given: list[Example]) -> Tensor:
    """Log-probabilities by the model's own forward, every prompt and completion alone, nothing padded."""
    parts = []
    for e in given:
        for c in e.completions:
            sequence = torch.cat([e.prompt, c.tokens]).long()
            logp = model(input_ids=sequence[None], use_cache=False).logits[0].log_softmax(-1)
            kept = range(len(c.tokens)) if c.trained is None else c.trained.nonzero().flatten().tolist()
            parts += [logp[len(e.prompt) + i - 1, c.tokens[i].long()] for i in kept]
    return torch.stack(parts)


def same_tree_mask(rows: Any, window: int | None = None) -> Tensor:
    """A wrong mask: causal within the tree."""
    same = rows.tree_ids[:, None, :, None] == rows.tree_ids[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()


LAYOUTS = [Layout("forest", 64), Layout("forest", 1), Layout("forest", 200, multiple_of=16), Layout("padded")]


@pytest.mark.parametrize("name", FOREST)
def test_forest_and_padded_rows_score_as_the_model_itself_one_sequence_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name)
    with torch.no_grad():
        want = one_at_a_time(model, examples())
        for layout in LAYOUTS:
            batch = batch_of(examples(), layout)
            got = Scorer(model)(batch.rows, batch.targets)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5, msg=f"{layout}: {(got - want).abs().max()}")
        # a completion that saw its sibling would have shown
        monkeypatch.setattr("alignkit.attention.dense_mask", same_tree_mask)
        batch = batch_of(examples(), Layout("forest", 64))
        assert float((Scorer(model)(batch.rows, batch.targets) - want).abs().max()) > 0.05
    assert got.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gemma 2", "phi, a bias on its head"])
@pytest.mark.parametrize("layout", [Layout("forest", 64), Layout("padded")], ids=["forest", "padded"])
def test_the_gradient_of_every_weight_is_that_of_one_sequence_at_a_time(name: str, layout: Layout) -> None:
    model, batch = fresh(name), batch_of(examples(), layout)
    one_at_a_time(model, examples()).sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    Scorer(model)(batch.rows, batch.targets).sum().backward()
    for n, p in model.named_parameters():
        scale = float(want[n].abs().max())
        assert scale > 0, n
        torch.testing.assert_close(p.grad, want[n], rtol=0, atol=2e-5 * max(scale, 1.0), msg=n)


def test_temperature_and_entropy_are_those_of_the_capped_logits() -> None:
    model, given = model_of("gemma 2"), examples()[:2]
    batch = batch_of(given, Layout())
    with torch.no_grad():
        logps, entropy = Scorer(model)(batch.rows, batch.targets, temperature=0.5, entropy=True)
        e = given[0]
        sequence = torch.cat([e.prompt, e.completions[0].tokens]).long()
        logp = (model(input_ids=sequence[None]).logits[0].double() / 0.5).log_softmax(-1)
    n = len(e.completions[0].tokens)
    rows = logp[len(e.prompt) - 1 : -1]
    torch.testing.assert_close(logps[:n].double(), rows[range(n), sequence[-n:]], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy[:n].double(), -(rows.exp() * rows).sum(1), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------ choosing a layout


def config(**changes: Any) -> RunConfig:
    return RunConfig(**{"method": "dpo", "model": "m", "data": "d", **changes})


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
        got, want = Scorer(model)(batch.rows, batch.targets), one_at_a_time(model, examples())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_scale_of_none_is_no_scale() -> None:
    model, batch = model_of("mpt, a scale of None"), batch_of(examples(), Layout("padded"))
    with torch.no_grad():
        got, want = Scorer(model)(batch.rows, batch.targets), one_at_a_time(model, examples())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


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
    with pytest.raises(ModelError, match=rf"row 7 holds the token {n}, and the model embeds {n} \(0 to {n - 1}\)"):
        check_fit(model, [*examples(), strange])
    check_fit(model, examples())


def test_rows_longer_than_learned_positions_are_an_error_and_than_rotary_ones_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpt2 = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=99, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    prompt = torch.tensor([1, 2, 3, 4, 5])
    fits, long = (Example(prompt, (Completion(torch.arange(n)),), row=n) for n in (3, 4))
    check_fit(gpt2, [fits])
    what = "1 of 2 sequences are longer than the model's 8 positions, the longest 9 tokens .row 4.; let max_prompt_tok"
    with pytest.raises(ModelError, match=what):
        check_fit(gpt2, [fits, long])
    # where completions are lent, the 5 tokens of one prompt may meet the 4 of another's completion
    lends = Example(prompt[:2], (Completion(torch.arange(4)),), row=9)
    check_fit(gpt2, [fits, lends])
    with pytest.raises(ModelError, match=r"1 of 2 sequences are longer .* the longest 9 tokens .row 9."):
        check_fit(gpt2, [fits, lends], mixes=True)
    llama = tf.LlamaConfig(vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                           num_attention_heads=1, max_position_embeddings=8)  # fmt: skip
    check_fit(tf.LlamaForCausalLM(llama), [fits, long])
    assert "1 of 2 sequences are longer than the model's 8 positions" in caplog.text


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

    monkeypatch.setattr("alignkit.models.attention_mask", causal)
    assert "log-probabilities differ by" in (probe(scorer, batch) or "")


def test_the_probe_finds_a_wrong_mask_in_bf16_too_and_forgives_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama").bfloat16()
    batch = batch_of(examples(), Layout())
    assert probe(Scorer(model), batch) is None
    monkeypatch.setattr("alignkit.models.attention_mask", lambda rows, *_: (rows.tree_ids >= 0).long())
    assert "log-probabilities differ by" in (probe(Scorer(model), batch) or "")


# --------------------------------------------------------------------------------------------------- dropout


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
        trained = [Scorer(model)(batch.rows, batch.targets) for _ in range(3)]
        model.eval()
        evaluated = Scorer(model)(batch.rows, batch.targets)
    assert all(torch.equal(t, evaluated) for t in trained)


# --------------------------------------------------------------------------------------------------- adapters


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
        adapted = one_at_a_time(model, examples())
        for layout in (Layout("forest", 64), Layout("padded")):
            batch = batch_of(examples(), layout)
            torch.testing.assert_close(scorer(batch.rows, batch.targets), adapted, rtol=1e-6, atol=1e-5)
        with model.disable_adapter():
            base = scorer(batch.rows, batch.targets)
    # with the adapters off it is the model that they were put on, and with them on it is another one
    with torch.no_grad():
        torch.testing.assert_close(base, one_at_a_time(model_of(name), examples()), rtol=1e-6, atol=1e-5)
    assert float((adapted - base).abs().max()) > 0.05
    assert probe(scorer, batch_of(examples(), Layout())) is None


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_on_the_head_are_trained_and_the_base_is_not(settings: dict[str, Any]) -> None:
    model = lora_of("llama", r=2, **settings)
    batch = batch_of(examples(), Layout())
    got = Scorer(model)(batch.rows, batch.targets)
    got.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any("lm_head" in n for n in grads)
    assert all("lora_" in n or "modules_to_save" in n for n in grads)
    names = list(grads)
    want = torch.autograd.grad(one_at_a_time(model, examples()).sum(), [model.get_parameter(n) for n in names])
    for n, w in zip(names, want, strict=True):
        torch.testing.assert_close(grads[n], w, rtol=0, atol=2e-5 * max(1.0, float(w.abs().max())), msg=n)


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
    scorer(batch.rows, batch.targets).sum().backward()
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
        logps, entropy = Scorer(model)(batch.rows, batch.targets, 0.7, True)
        (logps + 0.3 * entropy).sum().backward()
        hook.remove()
        return [logps.detach(), entropy.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], rows

    whole, rows = passes()
    assert rows == [len(batch.targets)] * 2  # forward, and again in the backward
    monkeypatch.setattr(models, "BLOCK_LOGITS", 3 * model.config.vocab_size)
    parts, rows = passes()
    assert max(rows) == 3
    assert sum(rows) == 2 * len(batch.targets)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


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
    logps, entropy = Scorer(model)(batch.rows, batch.targets, 0.7, True)
    (logps + 0.3 * entropy).sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    hidden = models.trunk(model, batch.rows)
    whole = (model.get_output_embeddings()(hidden) / 0.7).log_softmax(-1)
    picked = whole.gather(1, batch.targets[:, None]).squeeze(1)
    torch.testing.assert_close(logps, picked, rtol=0, atol=1e-5)
    (picked - 0.3 * (whole.exp() * whole).sum(1)).sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(got[n], p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()), msg=n)


def test_what_a_head_refuses_is_not_told_as_a_difference_of_numbers() -> None:
    model = fresh("llama")
    model.set_output_embeddings(model.get_output_embeddings().to(torch.bfloat16))
    with pytest.raises(ModelError, match=r"cannot score tokens with LlamaForCausalLM: \w+Error: "):
        choose_layout(Scorer(model), examples(), config(), CPU)


def test_a_model_that_names_no_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    batch = batch_of(examples(), Layout())
    with pytest.raises(ModelError, match=r"LlamaForCausalLM names no head \(get_output_embeddings\(\) is None\)"):
        Scorer(model)(batch.rows, batch.targets)


def test_lora_on_modules_that_do_not_exist_names_those_that_do() -> None:
    with pytest.raises(ModelError, match=r"LoRA: .*The linear modules are down_proj, gate_proj, .*v_proj"):
        add_lora(fresh("llama"), LoraSettings(target_modules=["nothing"]))


def test_causal_lm_finds_the_model_inside_an_adapter() -> None:
    model = lora_of("llama", r=2)
    assert type(causal_lm(model)) is tf.LlamaForCausalLM
    assert causal_lm(model_of("llama")) is model_of("llama")


# ---------------------------------------------------------------------------------------------------- loading


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
    with pytest.raises(ModelError, match="already carries an adapter: it is trained on; leave out `lora`"):
        load_model(config(model=str(tmp_path / "adapter"), lora=True), CPU)


def test_what_can_only_be_a_folder_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    for load in (lambda: load_model(config(model=missing), CPU), lambda: load_tokenizer(config(model=missing))):
        with pytest.raises(ModelError, match=r"there is no folder '.*missing'; give one that holds a model, or a hub"):
            load()


def test_a_name_that_may_be_a_folder_or_on_the_hub_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"cannot load a causal language model from 'org/missing' \(no such folder"):
        load_model(config(model="org/missing"), CPU)
    with pytest.raises(ModelError, match=r"cannot load a tokenizer from 'org/missing' \(no such folder"):
        load_tokenizer(config(model="org/missing"))


def test_a_folder_without_a_model_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(ModelError, match="cannot load a causal language model from") as error:
        load_model(config(model=str(tmp_path)), CPU)
    assert "\n" not in str(error.value)
    assert "no such folder" not in str(error.value)


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


# -------------------------------------------------------------------------------------------------- attention


class Attention:
    """As much of a configuration as a mask depends on."""

    def __init__(self, implementation: str, **more: Any) -> None:
        self._attn_implementation = implementation
        self.__dict__.update(more)


def test_eager_attention_gets_minus_a_lot_where_sdpa_gets_false() -> None:
    rows = pack(examples(), Layout("forest", 64))
    boolean = attention_mask(rows, Attention("sdpa"), torch.float32)
    additive = attention_mask(rows, Attention("eager"), torch.bfloat16)
    assert boolean.dtype == torch.bool
    assert additive.dtype == torch.bfloat16
    assert torch.equal(boolean, dense_mask(rows))
    assert torch.equal(additive == 0, boolean)
    assert bool((additive[~boolean] < -1e37).all())
    assert additive.isfinite().all()


def test_layers_of_different_types_get_a_mask_each() -> None:
    rows = pack(examples(), Layout("forest", 64))
    mixed = Attention("sdpa", layer_types=["sliding_attention", "full_attention"], sliding_window=5)
    masks = attention_mask(rows, mixed, torch.float32)
    assert set(masks) == {"sliding_attention", "full_attention"}
    assert torch.equal(masks["full_attention"], dense_mask(rows))
    assert torch.equal(masks["sliding_attention"], dense_mask(rows, 5))
    full = Attention("sdpa", layer_types=["full_attention"], sliding_window=5)
    assert torch.equal(attention_mask(rows, full, torch.float32), dense_mask(rows))
    untyped = Attention("sdpa", sliding_window=5)
    assert torch.equal(attention_mask(rows, untyped, torch.float32), dense_mask(rows, 5))


def test_padded_rows_get_the_plain_mask() -> None:
    rows = pack(examples(), Layout("padded"))
    mask = attention_mask(rows, Attention("sdpa", sliding_window=5), torch.float32)
    assert mask.shape == rows.input_ids.shape
    lengths = [len(e.prompt) + len(c.tokens) for e in examples() for c in e.completions]
    assert mask.sum(1).tolist() == lengths


@pytest.mark.parametrize("window", [None, 6])
def test_the_block_mask_allows_what_the_dense_mask_allows(window: int | None) -> None:
    rows = pack([*examples(), *examples()], Layout("forest", 384, multiple_of=128))
    n_rows, width = rows.input_ids.shape
    blocks = attention_mask(rows, Attention("flex_attention", sliding_window=window), torch.float32)
    dense = dense_mask(rows, window)
    assert blocks.BLOCK_SIZE == (128, 128)
    assert blocks.shape == (n_rows, 1, width, width)
    # a block is computed where any of its cells is allowed ...
    n = width // 128
    tiles = dense[:, 0].view(n_rows, n, 128, n, 128).transpose(2, 3)
    assert torch.equal(blocks.to_dense()[:, 0].bool(), tiles.flatten(3).any(-1))
    # ... without asking for each cell only where all of them are ...
    full = torch.zeros_like(tiles[..., 0, 0])
    if blocks.full_kv_num_blocks is not None:
        for b in range(n_rows):
            for q in range(n):
                full[b, q, blocks.full_kv_indices[b, 0, q, : blocks.full_kv_num_blocks[b, 0, q]].long()] = True
    assert not (full & ~tiles.flatten(3).all(-1)).any()
    # ... and within a block cell by cell
    b, q, k = torch.meshgrid(torch.arange(n_rows), torch.arange(width), torch.arange(width), indexing="ij")
    assert torch.equal(blocks.mask_mod(b, torch.zeros_like(b), q, k), dense[:, 0])


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", ["llama", "mistral with a window", "gemma 2"])
def test_flex_attention_scores_the_forest_as_the_model_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    # uncompiled: the same mathematics, without a compiler
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_attention)
    model = fresh(name).eval()
    with torch.no_grad():
        want = one_at_a_time(model, examples())
        model.set_attn_implementation("flex_attention")
        batch = batch_of(examples(), Layout("forest", 128, multiple_of=128))
        got = Scorer(model)(batch.rows, batch.targets)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


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
    with pytest.raises(ModelError, match="BertLMHeadModel reads the tokens that it has to predict"):
        choose_layout(Scorer(bert), examples(), config(), CPU)


def test_an_encoder_and_decoder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    tf.T5Config(vocab_size=97).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is an encoder and a decoder \(t5\); give a causal language model"):
        load_model(config(model=str(tmp_path)), CPU)
