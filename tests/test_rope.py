"""Rotary positions that depend on the length: every sequence is scored and sampled as if it were alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from zoo import BASE, CPU, config

import alignkit
from alignkit.errors import ConfigError, ModelError
from alignkit.models.critic import with_critic
from alignkit.models.layouts import choose_layout
from alignkit.models.packing import batch_of
from alignkit.models.passes import scored
from alignkit.models.rope import switch_of
from alignkit.models.scoring import Scorer
from alignkit.models.values import Valuer
from alignkit.reference.keys import fingerprint
from alignkit.rewards.classifier import Classifier
from alignkit.rollout import Mixture, sample
from alignkit.rollout.noise import GumbelNoise
from alignkit.rollout_settings import Sampling
from alignkit.testing.world import tiny_tokenizer
from alignkit.types import Completion, Example, Layout, Switch
from helpers import write_tiny

LIMIT = 24
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "short_factor": [1.0] * 6, "long_factor": [6.0] * 6,
    "original_max_position_embeddings": LIMIT,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 6.0}
SMALL = {**BASE, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
CONFIGS: dict[str, Any] = {
    "phi 3": lambda: tf.Phi3Config(**SMALL, original_max_position_embeddings=LIMIT, rope_parameters=dict(LONGROPE)),
    "llama, longrope": lambda: tf.LlamaConfig(**SMALL, rope_parameters=dict(LONGROPE)),
    "llama, dynamic": lambda: tf.LlamaConfig(
        **{**SMALL, "max_position_embeddings": LIMIT}, rope_parameters=dict(DYNAMIC)
    ),
}
ARCHITECTURES = pytest.mark.parametrize("name", CONFIGS)


def build(name: str, kind: Any = tf.AutoModelForCausalLM) -> Any:
    """A tiny model whose frequencies change at LIMIT tokens, with weights large enough for it to show."""
    torch.manual_seed(0)
    made = CONFIGS[name]()
    made.num_labels = 1
    model = kind.from_config(made).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(parameter.dim() == 1).add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(100 * n + seed)
    return torch.randint(3, 90, (n,), generator=g, dtype=torch.int32)


def answers(prompt: int, *lengths: int, row: int = 0) -> Example:
    return Example(tokens(prompt, row), tuple(Completion(tokens(n, i)) for i, n in enumerate(lengths, 1)), row=row)


# trees with completions on both sides, at the border (24 = LIMIT, 25), and short trees beside long ones
EXAMPLES = [
    answers(10, 5, 14, 15, 30, 30, row=1), answers(6, 8, 3, row=2), answers(30, 4, 9, row=3), answers(2, 60, 3, row=4),
    answers(12, 12, 13, row=5), answers(3, 2, 2, row=6),
]  # fmt: skip


def alone(model: Any, examples: list[Example]) -> Tensor:
    """Log-probabilities of each sequence by transformers alone: a model that has seen no other length."""
    parts = []
    for e in examples:
        for c in e.completions:
            ids = torch.cat([e.prompt, c.tokens]).long()
            logits = copy.deepcopy(model)(input_ids=ids[None], use_cache=False).logits[0, :-1]
            logps = logits.double().log_softmax(-1).gather(1, ids[1:, None])
            parts.append(logps[len(e.prompt) - 1 :, 0])
    return torch.cat(parts)


@ARCHITECTURES
def test_the_switch_is_read_from_the_model(name: str) -> None:
    exact = "dynamic" in name
    assert switch_of(build(name)) == (Switch((), LIMIT) if exact else Switch((LIMIT,)))
    assert switch_of(tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL))) is None


@pytest.mark.parametrize(
    ("switch", "given", "same"),
    [
        (Switch((24,)), [1, 24, 25, 99], [1, 1, 25, 25]),
        (Switch((8, 24)), [8, 9, 24, 25], [1, 9, 9, 25]),
        (Switch((), 24), [1, 24, 25, 26], [1, 1, 25, 26]),
    ],
)
def test_lengths_with_equal_frequencies_have_one_stand_in(switch: Switch, given: list[int], same: list[int]) -> None:
    assert [switch.same_as(n) for n in given] == same


@ARCHITECTURES
@pytest.mark.parametrize("kind", ["forest", "padded"])
@pytest.mark.parametrize("max_tokens", [1, 90, 10_000])
@torch.no_grad()
def test_every_row_is_scored_as_if_it_were_alone_at_every_cut(name: str, kind: Any, max_tokens: int) -> None:
    model = build(name)
    layout = choose_layout(Scorer(model), EXAMPLES, config(layout=kind), CPU)
    assert layout.kind == kind
    got = scored(Scorer(model), batch_of(EXAMPLES, layout), max_tokens)
    torch.testing.assert_close(got.double(), alone(model, EXAMPLES), atol=2e-5, rtol=0)
    # without the switch the same rows are wrong: the test can fail
    mixed = batch_of(EXAMPLES, Layout(kind))
    assert (Scorer(model)(mixed.rows, mixed.targets).logps.double() - alone(model, EXAMPLES)).abs().max() > 0.1


@ARCHITECTURES
def test_gradients_are_those_of_the_rows_alone_with_and_without_checkpointing(name: str) -> None:
    want_model = build(name)
    for e in EXAMPLES[1:3]:
        for c in e.completions:
            # one that has seen no other length
            want_model.model.rotary_emb = type(want_model.model.rotary_emb)(want_model.config)
            ids = torch.cat([e.prompt, c.tokens]).long()
            logps = want_model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
            logps[len(e.prompt) - 1 :].sum().backward()
    for checkpointing in (False, True):
        model = build(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        batch = batch_of(EXAMPLES[1:3], Layout(switch=switch_of(model)))
        Scorer(model)(batch.rows, batch.targets).logps.sum().backward()
        for (path, own), want in zip(model.named_parameters(), want_model.parameters(), strict=True):
            torch.testing.assert_close(own.grad, want.grad, atol=2e-4, rtol=1e-3, msg=lambda m, p=path: f"{p}: {m}")


def test_a_tree_that_is_cut_at_the_switch_counts_its_prompt_twice() -> None:
    example = answers(10, 5, 30, 6)
    batch = batch_of([example], Layout(switch=Switch((LIMIT,))))
    assert batch.cost(0) == 10 + 5 + 6 + 10 + 30
    assert int((batch.rows.tree_ids >= 0).sum()) == batch.cost(0)
    assert batch_of([example], Layout()).cost(0) == 10 + 5 + 30 + 6


@ARCHITECTURES
@torch.no_grad()
def test_reward_models_score_and_probe_each_answer_alone(name: str, tmp_path: Path) -> None:
    model = build(name, tf.AutoModelForSequenceClassification)
    model.config.pad_token_id = 0
    layout = choose_layout(Valuer(model), EXAMPLES, config(), CPU)
    batch = batch_of(EXAMPLES, layout)
    sequences = [torch.cat([e.prompt, c.tokens]).long() for e in EXAMPLES for c in e.completions]
    want = torch.stack([copy.deepcopy(model)(input_ids=s[None]).logits[0, 0] for s in sequences])
    torch.testing.assert_close(Valuer(model)(batch.rows, batch.rows.last_at), want, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    served = Classifier(str(tmp_path), "cpu", 10_000).scores([s.tolist() for s in sequences])
    torch.testing.assert_close(torch.tensor(served), want, atol=2e-5, rtol=1e-4)


PROMPTS = [tokens(n, i).tolist() for i, n in enumerate((4, 20, 24, 25, 20, 30))]


def own_generation(model: Any, prompt: list[int], number: int, completion: int, n: int) -> list[int]:
    """One row by transformers' own `generate`, by a model that has seen no other, with the noise of its place."""
    fresh = copy.deepcopy(model)
    fresh.generation_config = tf.GenerationConfig()
    made = fresh.generate(
        torch.tensor([prompt]), max_new_tokens=n, eos_token_id=1, pad_token_id=0,
        logits_processor=[GumbelNoise(0, [number], [completion], len(prompt), CPU)],
    )  # fmt: skip
    return made[0, len(prompt) :].tolist()


class Ends:
    """A tokenizer as far as `sample` reads it."""

    def __init__(self) -> None:
        self.eos_token_id, self.chat_template, self.added_tokens_decoder = 1, None, dict[int, Any]()


@ARCHITECTURES
@pytest.mark.parametrize("batch_size", [3, 64])
def test_rows_that_cross_the_switch_are_sampled_as_by_a_generate_of_their_own(name: str, batch_size: int) -> None:
    model = build(name)
    sampling = Sampling(max_new_tokens=6, batch_size=batch_size)
    made = sample(model, Ends(), PROMPTS, sampling, n=2)
    for i, prompt in enumerate(PROMPTS):
        for k in range(2):
            assert made[i][k].tokens == own_generation(model, prompt, i, k, 6), (i, k)


@ARCHITECTURES
def test_a_mixture_with_a_copy_of_itself_samples_what_the_policy_samples(name: str) -> None:
    model = build(name)
    sampling = Sampling(max_new_tokens=6)
    mixed = sample(model, Ends(), PROMPTS, sampling, mixture=Mixture(copy.deepcopy(model), 0.5))
    assert mixed == sample(model, Ends(), PROMPTS, sampling)


def test_continuous_batching_is_refused_where_a_row_can_pass_the_switch() -> None:
    with pytest.raises(ModelError, match=r"change beyond 24 tokens, and prompt and completion may have 30; use back"):
        sample(build("phi 3"), Ends(), [PROMPTS[1]], Sampling(max_new_tokens=10), backend="continuous")


class Custom(nn.Module):
    """Rotary positions of a model's own code: the longest sequence of a pass decides, and no attribute says so."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return self.inner(x, position_ids)


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_unknown_positions_that_depend_on_the_pass_are_refused_with_that_cause(layout: str) -> None:
    model = build("phi 3")
    rotary = model.model.rotary_emb
    model.model.rotary_emb = Custom(rotary)
    rotary.rope_type, kept = _Hidden("longrope"), EXAMPLES * 3
    assert switch_of(model) is None
    with pytest.raises(ModelError, match=r"differently when others are in the same pass .*of \d+ to 62 tokens.*rotary"):
        choose_layout(Scorer(model), kept, config(layout=layout), CPU)


class _Hidden:
    """A rope type that transformers compares with its own, and alignkit does not know."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __contains__(self, part: str) -> bool:
        return part in self.name

    def __eq__(self, other: object) -> bool:
        return self.name == other

    def __hash__(self) -> int:
        return hash(self.name)


def test_a_critic_with_another_switch_is_refused(tmp_path: Path) -> None:
    policy = Scorer(tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)))
    build("phi 3", tf.AutoModelForSequenceClassification).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"critic's rotary frequencies .* \(beyond 24 tokens\)"):
        with_critic(policy, config(critic=str(tmp_path)), None, CPU)


def test_cached_values_of_mixed_rows_are_not_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("phi 3")
    now = fingerprint(model, dtype=torch.float32)
    monkeypatch.setattr("alignkit.reference.keys.switch_of", lambda _: None)
    assert fingerprint(model, dtype=torch.float32) != now


@pytest.mark.parametrize("layout", ["forest", "padded"])
@pytest.mark.parametrize("max_tokens", [64, 8192])
@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_the_first_loss_of_dpo_is_ln_2(tmp_path: Path, rope: dict[str, Any], layout: str, max_tokens: int) -> None:
    head_dim_half = 4
    changes = {k: [v[0]] * head_dim_half if isinstance(v, list) else v for k, v in rope.items()}
    write_tiny(tmp_path / "m", rope_parameters=changes, max_position_embeddings=24)
    rows = [
        {"prompt": f"{i} the fox", "chosen": " sees" * (1 + i % 3), "rejected": " eats" * (60 if i == 3 else 2)}
        for i in range(8)
    ]
    result = alignkit.run(
        "dpo", model=str(tmp_path / "m"), data=rows, output=str(tmp_path / "runs"), batch_size=8, max_steps=1,
        layout=layout, max_tokens=max_tokens, cache_file=str(tmp_path / "cache"),
    )  # fmt: skip
    assert result.metrics["loss"] == pytest.approx(math.log(2), abs=2e-6)
