"""A saved reward model scores a padded batch in plain transformers as each row alone, and as alignkit does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from classifiers import EOS, byte_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import alignkit
from alignkit.engine.padding import PAD, padding_tokenizer
from alignkit.models.critic import _vocabulary
from alignkit.models.packing import batch_of
from alignkit.models.values import Valuer
from alignkit.rewards.models import RewardModel
from alignkit.types import Completion, Example, Layout
from helpers import make_rows, write_tiny

ROWS = make_rows("pairs", 12)


def write_base(folder: Path, pad: int | None, padded_vocabulary: int = 0) -> None:
    """A tiny language model without a padding token, or whose padding token is its EOS (0), and its tokenizer."""
    write_tiny(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write_tiny(folder, pad_token_id=pad, vocab_size=len(tokenizer) + padded_vocabulary)
    if pad is None:
        tokenizer.pad_token = None
        tokenizer.save_pretrained(folder)


def trained(tmp_path: Path, **settings: Any) -> Any:
    return alignkit.run(
        "reward", model=str(tmp_path / "base"), data=ROWS, output=str(tmp_path / "runs"), batch_size=4, max_steps=3,
        learning_rate=1e-2, **settings,
    )  # fmt: skip


def texts() -> list[str]:
    return [r["prompt"] + r["chosen"] for r in ROWS] + ["0 the", ROWS[0]["prompt"] + " " + "fox owl " * 12]


def plain(model: Any, tokenizer: Any, side: str) -> torch.Tensor:
    """Scores of all texts, each with its EOS, in one padded batch."""
    ids = [{"input_ids": [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]} for t in texts()]
    batch = tokenizer.pad(ids, return_tensors="pt", padding_side=side)
    with torch.no_grad():
        return model.eval()(**batch).logits[:, 0]


def alone(model: Any, tokenizer: Any) -> torch.Tensor:
    found = []
    for text in texts():
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            found.append(model.eval()(input_ids=ids).logits[0, 0])
    return torch.stack(found)


def own(model: Any, tokenizer: Any) -> torch.Tensor:
    """alignkit's own score at the EOS."""
    examples = [
        Example(torch.tensor(ids[:1]), (Completion(torch.tensor([*ids[1:], tokenizer.eos_token_id])),))
        for ids in (tokenizer(t)["input_ids"] for t in texts())
    ]
    batch = batch_of(examples, Layout("padded"))
    with torch.no_grad():
        return Valuer(model)(batch.rows, batch.rows.last_at)


@pytest.mark.parametrize("pad", [None, 0], ids=["no pad", "pad is EOS"])
@pytest.mark.parametrize("how", ["full", "merged", "adapter", "adapter on its base"])
@pytest.mark.parametrize("spare", [0, 7], ids=["", "spare rows"])
def test_a_batch_is_scored_as_each_row_alone_and_as_by_alignkit(
    tmp_path: Path, pad: int | None, how: str, spare: int
) -> None:
    write_base(tmp_path / "base", pad, spare)
    lora: dict[str, Any] = {} if how == "full" else {"lora": {"r": 4}, "merge_adapter": how == "merged"}
    result = trained(tmp_path, **lora)
    folder = result.folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    if how == "adapter":
        model: Any = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
    elif how == "adapter on its base":
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(len(tokenizer))
        model = peft.PeftModel.from_pretrained(base, folder)
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.config.pad_token_id == tokenizer.pad_token_id
    want = alone(model, tokenizer)
    assert float(want.std()) > 1e-3  # of all different scores
    torch.testing.assert_close(plain(model, tokenizer, "right"), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(plain(model, tokenizer, "left"), want, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(own(result.model, tokenizer), want, atol=1e-5, rtol=1e-4)
    if how in ("full", "merged"):
        served = RewardModel(str(folder), "cpu", 10_000)(
            [r["prompt"] for r in ROWS], [r["chosen"] for r in ROWS], [True] * 12
        )
        torch.testing.assert_close(torch.tensor(served), want[:12], atol=1e-5, rtol=1e-4)


def test_a_padding_token_of_its_own_is_kept_and_a_reserved_one_preferred_to_a_new_one() -> None:
    tokenizer = byte_tokenizer()
    assert padding_tokenizer(tokenizer).pad_token == PAD
    assert tokenizer.pad_token_id == EOS  # the run's own is not changed
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|reserved_1|>", "<|right_pad|>"]})
    assert padding_tokenizer(tokenizer).pad_token == "<|right_pad|>"
    tokenizer.pad_token = "<|reserved_1|>"
    assert padding_tokenizer(tokenizer).pad_token == "<|reserved_1|>"
    tokenizer.pad_token = None
    tokenizer.chat_template += "<|right_pad|>"
    assert padding_tokenizer(tokenizer).pad_token == "<|reserved_1|>"


def test_a_reward_model_with_a_padding_row_still_starts_the_policys_critic(tmp_path: Path) -> None:
    write_base(tmp_path / "base", 0)
    folder = trained(tmp_path).folder / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert len(model.get_input_embeddings().weight) == len(base.get_input_embeddings().weight) + 1
    assert _vocabulary(model) == _vocabulary(base)


def test_the_model_cards_code_scores_an_adapter_with_its_end_of_sequence_token(tmp_path: Path) -> None:
    write_base(tmp_path / "base", 0)
    result = trained(tmp_path, lora={"r": 4})
    card = (result.folder / "model" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('folder = "."', f'folder = "{result.folder / "model"}"')
    code = code.replace(
        "print(model(torch.tensor([ids])).logits.item())", "SCORE = model(torch.tensor([ids])).logits.item()"
    )
    found: dict[str, Any] = {}
    exec(code, found)
    ids = torch.tensor(found["ids"])
    batch = batch_of([Example(ids[:1], (Completion(ids[1:]),))], Layout())
    assert found["SCORE"] == pytest.approx(float(Valuer(result.model)(batch.rows, batch.rows.last_at)), abs=1e-5)
