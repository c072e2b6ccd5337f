"""transformers' continuous batching as a backend: new rows start as others end, without padding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from alignkit.config import Sampling
from alignkit.errors import ModelError
from alignkit.models.loading import causal_lm
from alignkit.models.rope import switch_of
from alignkit.rollout.batched import Sampled, sampling_mode

PAGE = 32  # tokens


def sample_continuously(
    model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, ends: Sequence[int], n: int, seed: int
) -> list[list[Sampled]]:
    """Return n completions of each prompt, see `alignkit.rollout.sample`."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    switch = switch_of(causal_lm(model))
    if switch and switch.same_as(longest) != switch.same_as(1):
        raise ModelError(
            f"backend: continuous computes sequences of all lengths in one pass, but this model's rotary frequencies "
            f"change {switch}, and prompt and completion may have {longest}; use backend: generate, or lower "
            "max_new_tokens"
        )
    rows = min(len(prompts) * n, sampling.batch_size)
    # sized by the job: the defaults take most of the memory. Only the blocks limit how many rows run at once, because
    # transformers 5.23 fails where one prompt's completions start together and exceed max_requests_per_batch
    sizes = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=rows * (math.ceil(longest / PAGE) + 1),
        max_batch_tokens=rows + longest,
        max_requests_per_batch=len(prompts) * n,
        seed=seed,
    )
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        num_return_sequences=n,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    device = next(model.parameters()).device
    # generate_batch seeds the global generator
    with sampling_mode(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        made = list(causal_lm(model).generate_batch([list(p) for p in prompts], settings, sizes).values())
    if len(made) != len(prompts) * n or any(one.error for one in made):
        why = next(
            (str(one.error) for one in made if one.error), f"{len(made)} of {len(prompts) * n} completions returned"
        )
        raise ModelError(f"continuous batching failed ({why}); use backend: generate")
    done = [Sampled(list(one.generated_tokens), one.generated_tokens[-1] in ends) for one in made]
    return [done[i * n : (i + 1) * n] for i in range(len(prompts))]
