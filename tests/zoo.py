"""One tiny model of each architecture, examples, and the models' log-probabilities of one sequence at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from alignkit.config import RunConfig
from alignkit.models.dropout import drop_dropout
from alignkit.types import Completion, Example, Layout

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
    """A model of that architecture, with weights large enough that a wrong mask changes its output."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    return made(config)


def made(config: Any) -> Any:
    """A model of that configuration, drawn so."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            # matrices are redrawn; norms and biases are shifted, so that a test fails if one of them is ignored
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
    """Log-probabilities by the model's own forward pass, each prompt and completion separately, without padding."""
    parts = []
    for e in given:
        for c in e.completions:
            sequence = torch.cat([e.prompt, c.tokens]).long()
            logp = model(input_ids=sequence[None], use_cache=False).logits[0].log_softmax(-1)
            kept = range(len(c.tokens)) if c.trained is None else c.trained.nonzero().flatten().tolist()
            parts += [logp[len(e.prompt) + i - 1, c.tokens[i].long()] for i in kept]
    return torch.stack(parts)


def same_tree_mask(rows: Any, window: int | None = None) -> Tensor:
    """A wrong mask: causal within the tree, so that answers see each other."""
    same = rows.tree_ids[:, None, :, None] == rows.tree_ids[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()


LAYOUTS = [Layout("forest", 64), Layout("forest", 1), Layout("forest", 200, multiple_of=16), Layout("padded")]


def config(**changes: Any) -> RunConfig:
    return RunConfig(**{"method": "dpo", "model": "m", "data": "d", **changes})
