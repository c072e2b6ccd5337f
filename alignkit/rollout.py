"""Sampling completions from a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from alignkit.models import causal_lm


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[int]]:
    """Return one sampled completion a prompt, as token ids with the end-of-sequence token where it came.

    prompts: text, tokenised as they stand. temperature: above 0, divides the logits. The global generators are put
    back as they were, and the same seed gives the same samples.
    """
    device = next(model.parameters()).device
    out: list[list[int]] = []
    lm = causal_lm(model)
    was_training, had_cache = model.training, lm.config.use_cache
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        lm.config.use_cache = True
        for start in range(0, len(prompts), batch_size):
            ids = [tokenizer(p)["input_ids"] for p in prompts[start : start + batch_size]]
            width = max(len(i) for i in ids)
            padded = torch.tensor([[pad] * (width - len(i)) + i for i in ids], device=device)
            # from lengths, not from the pad token, which may be the end-of-sequence token
            mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids], device=device)
            done = model.generate(
                input_ids=padded,
                attention_mask=mask,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=pad,
            )
            out += [_cut(row, tokenizer.eos_token_id) for row in done[:, width:].tolist()]
    lm.config.use_cache = had_cache
    model.train(was_training)
    return out


def _cut(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids
