"""The attention that a run uses on this machine, and why."""

from __future__ import annotations

import os
from collections.abc import Iterator

from alignkit.insight.doctor.probe import Fact, Trouble

_REASONS = {
    "alignkit_branches": "branch by branch: no kernel skips a mask's empty blocks on a CPU",
    "flex_attention": "FlexAttention, which skips a mask's empty blocks",
    "sdpa": "SDPA under a dense mask",
    "eager": "eager, under a dense mask",
}


def attention() -> Iterator[Fact | Trouble]:
    """Yield which attention a Llama gets here, and what keeps it from working well."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from alignkit.config import RunConfig
    from alignkit.insight.model_paths import device
    from alignkit.models.loading import set_up

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    set_up(model, RunConfig(method="doctor", model="-", data="-"), device())
    found = str(model.config._attn_implementation)
    yield Fact(f"of a Llama on {device().type}", f"{found}, {_REASONS.get(found, 'as the model sets it')}")
    yield Fact("of other models", "each run's probe decides, and logs where it differs from this")
    off = [name for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE") if os.environ.get(name) == "1"]
    if found == "flex_attention" and off:
        what = f"{off[0]} is set: FlexAttention is not compiled, and takes the memory of a dense mask"
        yield Trouble("problem", what, f"unset {off[0]}")
