"""Small things that many tests need: a tokenizer, a tiny Llama on disk, rows of each kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import WORDS


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from alignkit.demo.base import tokenizer_from

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tokenizer_from([" ".join(WORDS), "0 1 2 3 4 5 6 7 8 9 yes no :"], 300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(tiny: str, tmp_path: Path) -> dict[str, Any]:
    """Settings of a short run in a folder of its own."""
    return {
        "model": tiny,
        "output": tmp_path / "runs",
        "cache_file": tmp_path / "cache.sqlite",
        "batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "device": "cpu",
    }


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSONL and return the path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(path)

    return write
