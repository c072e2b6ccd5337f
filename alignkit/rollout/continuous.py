"""transformers' continuous batching as a backend: new rows start as others end, without padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from alignkit.errors import ConfigError, ModelError, first_line
from alignkit.models.attention import dense_instead_of
from alignkit.models.branches import BRANCHES
from alignkit.models.loading import causal_lm
from alignkit.models.rope import switch_of
from alignkit.rollout.batched import sampling_mode
from alignkit.rollout.sampler import Sampled
from alignkit.rollout_settings import Sampling, continuous_lacks

PAGE = 32  # tokens


def sample_continuously(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ends: Sequence[int],
    n: int,
    seed: int,
    greedy: bool = False,
) -> list[list[Sampled]]:
    """Return n completions of each prompt, see `alignkit.rollout.sample`."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    if why := continuous_lacks(sampling):
        raise ConfigError(why)
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    lm = causal_lm(model)
    switch = switch_of(lm)
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
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        **({"do_sample": False} if greedy else drawn),
        num_return_sequences=n,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    with sampling_mode(model):
        made = _generated(lm, prompts, settings, sizes)
    if len(made) != len(prompts) * n or any(one.error for one in made):
        why = next(
            (str(one.error) for one in made if one.error), f"{len(made)} of {len(prompts) * n} completions returned"
        )
        raise ModelError(f"continuous batching failed ({why}); use backend: generate")
    done = [Sampled(list(one.generated_tokens), one.generated_tokens[-1] in ends) for one in made]
    return [done[i * n : (i + 1) * n] for i in range(len(prompts))]


def _generated(lm: Any, prompts: Sequence[Sequence[int]], settings: Any, sizes: Any) -> list[Any]:
    """Return transformers' results, prompt by prompt. Raises ModelError where it cannot serve the model."""
    device = next(lm.parameters()).device
    # it seeds the global generator; a run's attention branch by branch, which is for a CPU, is unknown to it
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), dense_instead_of(lm, BRANCHES):
        try:
            return list(lm.generate_batch([list(p) for p in prompts], settings, sizes).values())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of many types: architectures and attention that it does not know
            raise ModelError(f"continuous batching failed ({first_line(error)}); use backend: generate") from error
