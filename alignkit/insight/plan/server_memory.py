"""The memory of a run's vLLM servers: weights, and the keys and values of what is sampled at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.config import RunConfig
from alignkit.errors import ConfigError
from alignkit.models.loading import causal_lm, from_pretrained
from alignkit.types import Example

USED = 0.92  # of a GPU's memory, by default of vLLM 0.32 (--gpu-memory-utilization)


@dataclass(frozen=True)
class Servers:
    """Servers of a run, in bytes of one GPU. n: servers, of `gpus` GPUs each, which share one copy of the weights.

    per_token: keys and values of a token. length: tokens of the longest prompt with its completion. fit: sequences of
    that length that a server has space for, None where a GPU's memory is not known, 0 where the weights do not fit.
    """

    n: int
    gpus: int
    weights: int
    per_token: int
    length: int
    fit: int | None


def servers_of(
    config: RunConfig, n: int, gpus: int, examples: Sequence[Example], limit: int | None, bf16: bool
) -> Servers | None:
    """Return the servers of a run, None without. limit: bytes of a GPU. Raises ConfigError where they cannot be."""
    if not n:
        return None
    if config.rollout.backend != "vllm":
        raise ConfigError(
            f"--servers counts vLLM servers, but rollout.backend is {config.rollout.backend}; add --set "
            "rollout.backend=vllm, or leave out --servers"
        )
    model = causal_lm(from_pretrained(config.model, config.model_copy(update={"lora": None}), weights=False))
    about, size = model.config.get_text_config(), 2 if bf16 else 4
    if (heads := about.num_attention_heads) % gpus:
        raise ConfigError(f"--server-gpus {gpus}: the model's {heads} attention heads cannot be split; give a divisor")
    weights = -(-size * sum(p.numel() for p in model.parameters()) // gpus)
    per_token = size * about.num_hidden_layers * _kept(about, gpus)
    length = max(len(e.prompt) for e in examples) + config.longest_completion
    fit = None if limit is None else max(0, int((USED * limit - weights) // (per_token * length)))
    return Servers(n, gpus, weights, per_token, length, fit)


def _kept(about: Any, gpus: int) -> int:
    """Return the numbers that a layer keeps of a token on one GPU."""
    if (latent := getattr(about, "kv_lora_rank", None)) is not None:  # one latent vector for all heads, on each GPU
        return int(latent + about.qk_rope_head_dim)
    heads = getattr(about, "num_key_value_heads", None) or about.num_attention_heads
    width = getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads
    return int(2 * max(1, -(-heads // gpus)) * width)
