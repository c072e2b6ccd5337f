"""The kit's small world: a Llama with two layers, a tokenizer of single characters, rows and examples of each kind."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from alignkit.method import ColumnType, DataKind
from alignkit.types import Completion, Example

SPECIAL = ("<unk>", "<s>", "</s>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,?!:'\n-"
VOCABULARY = len(SPECIAL) + len(CHARACTERS)
EOS = SPECIAL.index("</s>")


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a Llama with 2 layers, hidden size 32 and a vocabulary of 64; the same one for the same seed.

    Its weights are large, so that its probabilities are far from uniform. The global generators do not change.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype)


def tiny_classifier(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a one-label classifier on `tiny_model`'s trunk, with a random head."""
    from alignkit.models.loading import classifier_like

    model: Any = classifier_like(tiny_model(seed, dtype))
    with torch.no_grad():
        model.score.weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(seed))
    return model


def blend(model: nn.Module, other: nn.Module, part: float) -> None:
    """Move the model's weights by this fraction towards the other's: a policy that has moved from its reference."""
    with torch.no_grad():
        for weight, target in zip(model.parameters(), other.parameters(), strict=True):
            weight.lerp_(target, part)


def tiny_tokenizer() -> Any:
    """Return a fast tokenizer with BOS, EOS and a token for each character, for the texts of `tiny_rows`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate((*SPECIAL, *CHARACTERS))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def column_values(columns: Mapping[str, ColumnType], i: int) -> dict[str, Any]:
    """Return row i's values of the columns that a method declares: numbers from 0 to 2, some of them 0."""
    by_type = {float: i % 5 / 2, int: i % 3, bool: i % 2 == 0, str: f"text {i}", list: [i], dict: {"i": i}}
    return {name: by_type[kind] for name, kind in columns.items()}


def tiny_rows(
    kind: DataKind, n: int = 12, seed: int = 0, columns: Mapping[str, ColumnType] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Return n rows of text as users write them, for a method with `data = kind` and these `columns`."""
    draw = random.Random(seed)

    def text(longest: int) -> str:
        return "".join(draw.choices(CHARACTERS[:27] + " ", k=draw.randint(2, longest))).strip() or "a"

    rows: list[dict[str, Any]] = []
    for i in range(n):
        prompt, good, bad = text(12) + "? ", text(16) + ".", text(16) + "!"
        if kind == "pairs":
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
        elif kind == "unpaired":
            rows.append({"prompt": prompt, "completion": bad if i % 3 else good, "label": i % 3 == 0})
        elif kind == "text":
            rows.append({"prompt": prompt, "completion": good})
        else:
            rows.append({"prompt": prompt})
        rows[-1] |= column_values(columns, i)
    return rows


def tiny_examples(
    kind: DataKind, n: int = 7, seed: int = 0, columns: Mapping[str, ColumnType] = MappingProxyType({})
) -> list[Example]:
    """Return n tokenised examples of the kind, with unequal lengths, one prompt twice, an answer of one token, and
    answers in which some tokens are read but not trained (as in a user's turn)."""
    draw = random.Random(seed)

    def tokens(n_tokens: int) -> torch.Tensor:
        return torch.tensor([draw.randrange(len(SPECIAL), VOCABULARY) for _ in range(n_tokens)], dtype=torch.int32)

    def answer(i: int) -> Completion:
        ids = torch.cat([tokens(0 if i == 0 else draw.randint(1, 18)), torch.tensor([EOS], dtype=torch.int32)])
        if i % 3 != 2 or len(ids) < 3:
            return Completion(ids)
        trained = torch.ones(len(ids), dtype=torch.bool)
        trained[draw.randrange(len(ids) - 1) : len(ids) - 1 : 2] = False
        return Completion(ids, trained)

    answers = {"pairs": 2, "unpaired": 1, "text": 1, "prompts": 0}[kind]
    examples = []
    for i in range(n):
        numbers = {"desirable": float(i % 2)} if kind == "unpaired" else {}
        completions = tuple(answer(i * answers + k) for k in range(answers))
        declared = column_values(columns, i)
        examples.append(Example(tokens(draw.randint(1, 12)), completions, numbers, row=i + 1, declared=declared))
    if n > 3:
        examples[3] = replace(examples[3], prompt=examples[1].prompt)
    return examples


def with_completions(example: Example, n: int, call: int = 0) -> Example:
    """Return the prompt with n random completions, which depend on its tokens: one of a single token, some cut, all of
    them equal where its row is a multiple of 4. call: other completions for each number; -1 stands for greedy."""
    seed = int(example.prompt.long().sum()) * 1009 + len(example.prompt)
    draw = torch.Generator().manual_seed(seed + (call % 1000) * 1_000_003)
    completions = []
    for k in range(n):
        length = 1 if k == 1 else int(torch.randint(1, 9, (1,), generator=draw))
        tokens = torch.randint(EOS + 1, EOS + 40, (length,), generator=draw, dtype=torch.int32)
        if k % 3 != 2:
            tokens[-1] = EOS
        completions.append(Completion(tokens))
    if example.row % 4 == 0:
        completions = completions[:1] * n
    return replace(example, completions=tuple(completions))


def same_answers(kind: DataKind) -> Example:
    """Return an example whose answers are equal token by token, so none can be preferred."""
    first = tiny_examples(kind, 1, seed=5)[0]
    return replace(first, completions=first.completions[:1] * len(first.completions))
