"""The geometric mixture of a policy and its reference, from which Nash-MD samples the policy's opponent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import ConfigError


@dataclass(frozen=True)
class Mixture:
    """policy^(1 - weight) * reference^weight, normalised token by token, both at the sampling temperature.

    reference: a causal language model, or the policy itself. weight: in [0, 1]; 0 is the policy, 1 the reference.
    context: entered around each pass of the reference, such as peft's `disable_adapter`. Raises ConfigError for a
    weight outside [0, 1]. Source: Nash-MD, 2312.00886, section 4.2 and appendix.
    """

    reference: nn.Module
    weight: float
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"the reference's weight in a mixture must be from 0 to 1, got {self.weight}")


def copyable(cache: Any) -> bool:
    """Return whether a cache of transformers holds keys and values of single tokens only, and no recurrent state."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in getattr(cache, "layers", [None]))


class MixedLogits:
    """The first logits processor of transformers' `generate`: it computes the reference's logits of the same tokens.

    lm: the reference. cache: its keys and values of the prompts, None without. mask: of the prompts [R, T].
    """

    def __init__(self, lm: Any, mixture: Mixture, cache: Any | None, mask: Tensor) -> None:
        self.lm, self.mixture, self.cache, self.mask = lm, mixture, cache, mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (1 - weight) * scores + weight * the reference's, [R, V]."""
        new = self.mask.new_ones(len(self.mask), input_ids.shape[1] - self.mask.shape[1])
        kept = {} if self.cache is None else {"past_key_values": self.cache}
        with self.mixture.context():
            # one step of its own loop, which knows which tokens the cache already has
            out = self.lm.generate(
                input_ids,
                attention_mask=torch.cat([self.mask, new], 1),
                max_new_tokens=1,
                output_logits=True,
                return_dict_in_generate=True,
                synced_gpus=False,
                **kept,
            )
        if self.cache is None and copyable(out.get("past_key_values")):
            self.cache = out.past_key_values  # keys keep the rotary frequencies of the step that made them
        weight, reference_RV = self.mixture.weight, torch.as_tensor(out.logits[0])
        # a token that the policy rules out has -inf, and -inf * 0 is nan
        return reference_RV if weight == 1 else (1 - weight) * scores + weight * reference_RV
