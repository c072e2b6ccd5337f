"""SFT: conformance, the average over tokens, and turns of the user that are read but not learned."""

from __future__ import annotations

import pytest
import torch

from alignkit import data
from alignkit.data import tokenise
from alignkit.testing import *
from alignkit.types import Completion, Example
from alignkit_sft import SFT

TURNS = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


class TestSFT(Conformance):
    method = SFT

    def expected_step(self, config, rows, bench):
        """An average over the step's tokens, so a long answer weighs more than a short one."""
        logps = [logp for row in rows for logp in row.only.policy]
        return -sum(logps) / len(logps)


def loss_and_gradient(bench, example):
    measured = bench.step([example])
    return measured.loss, measured.gradients


def test_user_tokens_are_ignored():
    """The tokens of a user's turn inside the completion are not targets, but the tokens after them depend on them."""
    bench = Bench(SFT(SFT.Config()))
    prompt, tokens = torch.tensor([9, 8], dtype=torch.int32), torch.tensor([10, 11, 12, 13, 14, 2], dtype=torch.int32)
    trained = torch.tensor([True, True, False, False, True, True])
    masked = Example(prompt, (Completion(tokens, trained),))
    (scored,) = bench.score([Example(prompt, (Completion(tokens),))])
    kept = [logp for logp, keep in zip(scored.only.policy, trained.tolist(), strict=True) if keep]
    assert bench.step([masked]).loss == pytest.approx(-sum(kept) / 4, rel=1e-9)


def test_user_turns_in_messages_are_not_trained():
    """From messages to the mask: with the last turns as completion, only the assistant's text is trained."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TURNS
    turns = [("assistant", "yes."), ("user", "why?"), ("assistant", "so.")]
    row = {
        "prompt": [{"role": "user", "content": "is it?"}],
        "completion": [{"role": role, "content": content} for role, content in turns],
    }
    (example,), _ = tokenise.tokenise(data.load([row], "text"), tokenizer)
    (completion,) = example.completions
    trained = tokenizer.decode(completion.tokens[completion.trained_at])
    whole = tokenizer.decode(completion.tokens)
    assert "why?" in whole
    assert "why?" not in trained
    assert "yes." in trained
    assert "so." in trained
