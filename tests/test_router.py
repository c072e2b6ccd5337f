"""Mixtures of experts: the router's auxiliary loss is transformers' own at every cut, and its load is logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from zoo import BASE, CPU, config, examples

import alignkit
from alignkit.engine.averages import TermSums, sum_terms
from alignkit.engine.balance import Balance
from alignkit.errors import ModelError
from alignkit.models.dropout import drop_dropout
from alignkit.models.layouts import choose_layout
from alignkit.models.packing import batch_of
from alignkit.models.ranks import SINGLE
from alignkit.models.router import balance_loss, router_of, token_weights
from alignkit.models.scoring import Scorer
from alignkit.models.values import Valuer
from alignkit.types import Batch, Layout, Term
from helpers import write_tiny

SMALL = {**BASE, "num_hidden_layers": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
CONFIGS: dict[str, Any] = {
    "mixtral": lambda: tf.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen 2 moe": lambda: tf.Qwen2MoeConfig(**SMALL, **QWEN, shared_expert_intermediate_size=16),
    "qwen 3 moe, one dense layer": lambda: tf.Qwen3MoeConfig(**SMALL, **QWEN, head_dim=12, mlp_only_layers=[0]),
    "olmoe": lambda: tf.OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
    "gpt oss": lambda: tf.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, head_dim=12),
    "phi moe": lambda: tf.PhimoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "granite moe": lambda: tf.GraniteMoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}
ARCHITECTURES = pytest.mark.parametrize("name", CONFIGS)


def build(name: str, kind: Any = tf.AutoModelForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    made = CONFIGS[name]()
    made.num_labels, made.pad_token_id = 1, 0
    for key, value in changes.items():
        setattr(made, key, value)
    model = kind.from_config(made).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(parameter.dim() == 1).add_(torch.randn_like(parameter) * 0.2)
    drop_dropout(model)  # phi moe shakes its router in training
    return model.train()


def padded(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Every prompt and completion in a row of its own: ids, mask and labels, as transformers' users make them."""
    rows = [(e.prompt.long(), c) for e in batch.examples for c in e.completions]
    width = max(len(p) + len(c.tokens) for p, c in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for i, (p, c) in enumerate(rows):
        n = len(p) + len(c.tokens)
        ids[i, :n], mask[i, :n] = torch.cat([p, c.tokens.long()]), 1
        labels[i, len(p) + c.trained_at] = c.tokens.long()[c.trained_at]
    return ids, mask, labels


def step(model: Any, batch: Batch, max_tokens: int) -> dict[str, float]:
    """The loss of SFT and its gradient, cut into micro-batches, as the loop computes them."""
    scorer = Scorer(model)

    def summed(micro: Batch) -> TermSums:
        assert scorer.router is not None
        with scorer.router.recording():
            logps = scorer(micro.rows, micro.targets).logps
        return sum_terms({"nll": Term(-logps, over="tokens")}, micro, "sft")

    passes = [(micro, 1.0) for micro in batch.micro_batches(max_tokens)]
    balance = Balance(scorer.router, summed, SINGLE)
    balance.look_ahead(passes)
    nll = 0.0
    for micro, _ in passes:
        terms, routing = balance.measured(micro)
        loss = terms.loss_share({"tokens": len(batch.targets)})
        nll += float(loss.detach())
        (loss + balance.share(routing, only=len(passes) == 1)).backward()
    return balance.added({"loss": nll})


@ARCHITECTURES
@pytest.mark.parametrize("layout", [Layout(), Layout("padded")], ids=["forest", "padded"])
def test_loss_and_gradient_are_those_of_transformers_at_every_cut(name: str, layout: Layout) -> None:
    batch, theirs = batch_of(examples(), layout), build(name)
    ids, mask, labels = padded(batch)
    want = theirs(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True)
    want.loss.backward()
    for max_tokens in (1, 60, 10_000):
        model = build(name)
        values = step(model, batch, max_tokens)
        assert values["router/aux_loss"] == pytest.approx(float(want.aux_loss.detach()), rel=1e-5)
        assert values["loss"] == pytest.approx(float(want.loss.detach()), rel=1e-5)
        for (path, own), parameter in zip(model.named_parameters(), theirs.parameters(), strict=True):
            wanted = torch.zeros_like(own) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(
                torch.zeros_like(own) if own.grad is None else own.grad, wanted, atol=2e-5, rtol=1e-3,
                msg=lambda m, p=path: f"{p}: {m}",
            )  # fmt: skip
    assert float(want.aux_loss.detach()) > 2.001  # unbalanced, or a gradient of 0 would be right


def test_gradient_checkpointing_changes_no_gradient() -> None:
    batch, gradients = batch_of(examples(), Layout()), []
    for checkpointing in (False, True):
        model = build("mixtral")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        step(model, batch, 60)
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_load_and_loss_by_hand() -> None:
    # two layers, three experts, top 1, four tokens: layer 0 sends 3, 1, 0; layer 1 sends 2, 2, 0
    sent = torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 0.0]], dtype=torch.float64)
    likely = torch.tensor([[2.0, 1.5, 0.5], [2.0, 1.0, 1.0]], dtype=torch.float64)
    sums = torch.stack([likely, sent])
    # shares (5, 3, 0) / 8, mean probabilities (4, 2.5, 1.5) / 8: 3 * (20 + 7.5) / 64
    assert float(balance_loss(sums, sums, 1)) == pytest.approx(3 * 27.5 / 64)
    balance = Balance(router_of(build("mixtral", num_experts_per_tok=1)), lambda _: None, SINGLE)  # type: ignore[arg-type, return-value]
    balance._total = sums
    values = balance.added({"loss": 2.0})
    assert values["router/max_load"] == pytest.approx(3 / (4 / 3))
    assert values["router/unused"] == pytest.approx(2 / 6)
    assert values["loss"] == pytest.approx(2.0 + 0.5 * 3 * 27.5 / 64)


def test_a_prompt_counts_once_for_each_completion_and_padding_never() -> None:
    batch = batch_of(examples(), Layout("forest", 64))
    total = sum(len(e.prompt) + len(c.tokens) for e in batch.examples for c in e.completions)
    assert int(token_weights(batch.rows).sum()) == total < batch.rows.input_ids.numel() + total
    assert token_weights(batch.rows)[batch.rows.tree_ids.flatten() < 0].sum() == 0


def test_the_loss_is_added_only_where_the_configuration_asks_for_it() -> None:
    assert router_of(build("mixtral", output_router_logits=False)) is None
    assert router_of(tf.LlamaForCausalLM(tf.LlamaConfig(**BASE))) is None
    with pytest.raises(ModelError, match=r"no router_aux_loss_coef .* set output_router_logits: false"):
        router_of(tf.LlamaForCausalLM(tf.LlamaConfig(**BASE, output_router_logits=True, num_experts_per_tok=2)))


def test_a_formula_that_differs_from_transformers_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(build("mixtral"))
    choose_layout(scorer, examples(), config(), CPU)
    assert scorer.router is not None
    module = "transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func"
    monkeypatch.setattr(module, lambda *_: torch.tensor(9.0))
    with pytest.raises(ModelError, match=r"MixtralForCausalLM is 9 and not [\d.]+: alignkit does not know its formula"):
        choose_layout(scorer, examples(), config(), CPU)
    monkeypatch.setattr(module, lambda *_: None)
    choose_layout(scorer, examples(), config(), CPU)
    assert scorer.router is None


def test_reward_models_have_the_loss_too() -> None:
    valuer = Valuer(build("mixtral", tf.AutoModelForSequenceClassification))
    assert valuer.router is not None
    batch = batch_of(examples(), Layout())
    with valuer.router.recording():
        valuer(batch.rows, batch.rows.last_at)
    assert valuer.router.take() is not None


MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.3}


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "grpo", "ppo"])
def test_runs_of_every_kind_log_the_load_and_add_the_loss(tmp_path: Path, method: str) -> None:
    write_tiny(tmp_path / "m", tf.MixtralConfig, **MIXTRAL)
    rows: list[dict[str, Any]] = [
        {"prompt": f"{i} the fox", "completion": f" sees {i}"} if method == "sft"
        else {"prompt": f"{i} the fox"} if method in ("grpo", "ppo")
        else {"prompt": f"{i} the fox", "chosen": f" sees {i}", "rejected": " eats the old owl"}
        for i in range(6)
    ]  # fmt: skip
    more: dict[str, Any] = (
        {"reward": lambda completions, **_: [float(len(c)) for c in completions], "sampling": {"max_new_tokens": 4}}
        if method in ("grpo", "ppo")
        else {}
    )
    logged = []
    for max_tokens in (40, 8192):
        result = alignkit.run(
            method, model=str(tmp_path / "m"), data=rows, output=str(tmp_path / "runs"), batch_size=4, max_steps=1,
            max_tokens=max_tokens, cache_file=str(tmp_path / "cache"), eval_fraction=0.3, **more,
        )  # fmt: skip
        lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        logged.append({k: v for line in lines for k, v in line.items() if "router/" in k or k.endswith("loss")})
    assert logged[0]["router/aux_loss"] >= 1.9
    assert logged[0]["router/max_load"] >= 1
    assert 0 <= logged[0]["router/unused"] < 1
    assert "eval/router/aux_loss" in logged[0]
    for name, value in logged[0].items():
        assert logged[1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_the_loss_of_sft_is_transformers_loss(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m", tf.MixtralConfig, **MIXTRAL)
    rows = [{"prompt": f"{i} the fox", "completion": " sees" * (1 + i)} for i in range(4)]
    result = alignkit.run(
        "sft", model=str(tmp_path / "m"), data=rows, output=str(tmp_path / "runs"), batch_size=4, max_steps=1,
        learning_rate=1e-9,
    )  # fmt: skip
    model = tf.MixtralForCausalLM.from_pretrained(tmp_path / "m")
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "m")
    prompts = [tokenizer(r["prompt"])["input_ids"] for r in rows]
    answers = [[*tokenizer(r["completion"])["input_ids"], tokenizer.eos_token_id] for r in rows]
    width = max(map(len, [p + a for p, a in zip(prompts, answers, strict=True)]))
    ids = torch.tensor([p + a + [0] * (width - len(p + a)) for p, a in zip(prompts, answers, strict=True)])
    mask = torch.tensor([[1] * len(p + a) + [0] * (width - len(p + a)) for p, a in zip(prompts, answers, strict=True)])
    labels = torch.tensor(
        [[-100] * len(p) + a + [-100] * (width - len(p + a)) for p, a in zip(prompts, answers, strict=True)]
    )
    want = float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    without = float(model(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=False).loss)
    assert result.metrics["loss"] == pytest.approx(want, abs=1e-4)
    assert want - without > 0.5
