"""Rows of each kind, made of a few words, and a tiny model of these words."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

WORDS = (
    "red", "blue", "green", "fox", "owl", "newt", "sees", "likes", "eats", "a", "the", "big", "small", "old", "moss",
    "tree", "king", "hill",
)  # fmt: skip


def sentence(rng: random.Random, low: int = 1, high: int = 9) -> str:
    """A few random words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def make_rows(kind: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """n rows of a data kind with different prompts."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(n):
        prompt = f"{i} {sentence(rng)}:"
        if kind == "pairs":
            rows.append({"prompt": prompt, "chosen": f" yes {sentence(rng)}", "rejected": f" no {sentence(rng)}"})
        elif kind == "unpaired":
            rows.append({"prompt": prompt, "completion": f" {sentence(rng)}", "label": i % 2 == 0})
        else:
            rows.append({"prompt": prompt, "completion": f" {sentence(rng)}"})
    return rows


def write_tiny(folder: Path, **changes: Any) -> None:
    """Write a tiny Llama, with these changes of its configuration, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from alignkit.demo.base import tokenizer_from

    tokenizer = tokenizer_from([" ".join(WORDS), "0 1 2 3 4 5 6 7 8 9 yes no :"], 300)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes | ends | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
