"""Tiny sequence classifiers on disk, and their scores of one sequence at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

END, EOS = "<|end|>", 0
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '" + END + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def byte_tokenizer() -> Any:
    """A tokenizer with a token for each byte; its end-of-sequence token is also its pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ids_of(text: str) -> list[int]:
    """The tokens of a text."""
    return list(byte_tokenizer()(text)["input_ids"])


def write_classifier(folder: Path, architecture: str = "llama", labels: int = 1, seed: int = 0, **changes: Any) -> str:
    """Write a tiny classifier whose pad token is its end-of-sequence token, and its tokenizer; return the folder."""
    from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, LlamaConfig

    options = {"vocab_size": 257, "num_labels": labels, "pad_token_id": EOS, "initializer_range": 0.2, **changes}
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture == "llama":
        config: Any = LlamaConfig(eos_token_id=EOS, bos_token_id=None, max_position_embeddings=32, **small | options)
    elif architecture == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=EOS, **options)
    else:
        config = BertConfig(**small | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def alone(folder: str, ids: list[int]) -> float:
    """The model's own score of one sequence: without padding or a pad token, so it is read at the last position."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.pad_token_id = None
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])
