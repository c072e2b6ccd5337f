"""A game that goes in circles, a beats b beats c beats a: Nash-MD finds its mixed equilibrium, DPO does not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alignkit
from alignkit.engine.loop import Loop

pytestmark = pytest.mark.slow

ANSWERS = "abc"
TAU = 0.1
# P(row beats column). By average wins a is best (0.6), then c (0.53); in the game c is played most
WINS = torch.tensor([[0.5, 1.0, 0.3], [0.0, 0.5, 0.6], [0.7, 0.4, 0.5]], dtype=torch.float64)


def player() -> tuple[Any, Any]:
    """A model of five tokens that answers the prompt "?" by one of them, at random, and its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("</s>", "?", *ANSWERS))}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=5, num_key_value_heads=2, bos_token_id=None, eos_token_id=0, **sizes)
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="?")


def judge(first: list[str], second: list[str]) -> list[float]:
    """P(the first wins) by the table; whoever says none of the three loses."""
    return [float(whole_table()[_place(a), _place(b)]) for a, b in zip(first, second, strict=True)]


def _place(answer: str) -> int:
    return 2 + ANSWERS.index(answer) if answer in ANSWERS and answer else 0


def whole_table() -> Tensor:
    """The table with the two tokens that always lose before the three."""
    table = torch.full((5, 5), 0.5, dtype=torch.float64)
    table[2:, 2:], table[2:, :2], table[:2, 2:] = WINS, 1.0, 0.0
    return table


def plays(model: Any) -> Tensor:
    """What the model answers: the probabilities of the five tokens."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1]])).logits[0, -1].double().softmax(-1)  # type: ignore[no-any-return]


def equilibrium(reference: Tensor) -> Tensor:
    """The policy that answers itself best under tau KL: p = reference e^(P(. beats p) / tau) / Z, by small steps."""
    p = reference.clone()
    for _ in range(20_000):
        best = (reference.log() + whole_table() @ p / TAU).softmax(0)
        p = p**0.99 * best**0.01
        p = p / p.sum()
    torch.testing.assert_close(p, (reference.log() + whole_table() @ p / TAU).softmax(0))
    return p


def test_nash_md_finds_the_mixed_equilibrium_and_dpo_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = player()
    want = equilibrium(plays(model))
    assert want[2:].min() > 0.1  # it is mixed
    played: list[Tensor] = []
    original = Loop.step

    def step(self: Loop, number: int, total: int) -> dict[str, float]:
        values = original(self, number, total)
        played.append(plays(self.state.parts.model))
        return values

    monkeypatch.setattr(Loop, "step", step)
    shared = {"tokenizer": tokenizer, "output": tmp_path, "device": "cpu", "warmup_fraction": 0.0}
    shared |= {"cache_file": tmp_path / "cache.sqlite", "batch_size": 128}
    alignkit.run(
        "nash", model=model, data=[{"prompt": "?"}] * 128, judge=judge, tau=TAU, sampling={"max_new_tokens": 1},
        max_steps=200, learning_rate=3e-3, schedule="cosine", **shared,
    )  # fmt: skip
    nash = torch.stack(played[100:]).mean(0)
    assert (nash - want).abs().sum() / 2 < 0.1, f"played {nash.tolist()}, the equilibrium is {want.tolist()}"

    rows = []
    for a, b in itertools.permutations(range(3), 2):
        rows += [{"prompt": "?", "chosen": ANSWERS[a], "rejected": ANSWERS[b]}] * round(20 * float(WINS[a, b]))
    model, _ = player()
    alignkit.run("dpo", model=model, data=rows, max_steps=200, learning_rate=3e-3, beta=TAU, **shared)
    dpo = plays(model)
    assert (dpo - want).abs().sum() / 2 > 0.25, f"DPO plays {dpo.tolist()}, the equilibrium is {want.tolist()}"
    assert dpo.argmax() == 2 + ANSWERS.index("a")
    assert nash.argmax() == want.argmax() == 2 + ANSWERS.index("c")
