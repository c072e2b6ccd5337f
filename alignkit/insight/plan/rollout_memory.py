"""The memory that sampling takes in the process that trains: keys and values, choosing a token, copies of layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from alignkit.config import RunConfig
from alignkit.insight.plan.ledger import Ledger
from alignkit.models.loading import causal_lm
from alignkit.rollout.noise import GumbelNoise
from alignkit.types import Example


def rollout_bytes(
    config: RunConfig, examples: Sequence[Example], policy: nn.Module, mode: FakeTensorMode, cpu: bool, bf16: bool
) -> int:
    """Return the bytes at the end of the longest batch: all keys and values, and one layer's once more.

    On CPUs keys are in float32, and `alignkit.rollout.fast_layers` copies the linear layers, in 16 bits with `bf16`.
    """
    if config.rollout.local is None:
        return 0  # servers have their own memory
    lm, n_rows = causal_lm(policy), config.sampling.batch_size
    text = lm.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    length = max(len(e.prompt) for e in examples) + config.longest_completion
    per_layer = 2 * n_rows * heads * length * width * (4 if cpu else next(policy.parameters()).element_size())
    ledger = Ledger()
    with ledger, torch.no_grad():
        noise = GumbelNoise(0, [0] * n_rows, [0] * n_rows, 0, torch.device("cpu"))
        with mode:
            scores = torch.empty(n_rows, text.vocab_size)
        noise(torch.zeros(n_rows, 1, dtype=torch.int64), scores)
    copies = (2 if bf16 else 4) * _in_float32(lm) if cpu and config.rollout.local == "generate" else 0
    return int(per_layer * (text.num_hidden_layers + 1) + sum(ledger.peak.values())) + copies


def _in_float32(lm: nn.Module) -> int:
    """Return the number of float32 weights of linear layers."""
    layers = [m.weight for m in lm.modules() if type(m) is nn.Linear]
    return sum(weight.numel() for weight in layers if weight.dtype == torch.float32)
