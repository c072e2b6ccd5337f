"""The random numbers of a sequence: counter-based Gumbel noise, so that nothing else in the run changes it.

A token is argmax(logits + Gumbel noise), which is a draw from softmax(logits) (Maddison, Tarlow and Minka, 1411.0030,
eq. 2). The noise is a function of (seed, number of the prompt, completion, position, token), through SplitMix64
(Steele, Lea and Flood, 2014) in wrapping int64 arithmetic: every device computes the same bits. R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GAMMA, _FIRST, _SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def splitmix(state: Tensor, at: Tensor) -> Tensor:
    """Return the `at`-th output (from 0) of SplitMix64 generators that start at `state`: 64 random bits, int64."""
    # in place: with 64 bits for each token of the vocabulary, memory traffic takes most of the time
    z = state + (at + 1) * _GAMMA
    z.bitwise_xor_(_shifted(z, 30)).mul_(_FIRST)
    z.bitwise_xor_(_shifted(z, 27)).mul_(_SECOND)
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, by: int) -> Tensor:
    return (z >> by).bitwise_and_(2 ** (64 - by) - 1)  # int64's shift is arithmetic: it fills with the sign bit


def gumbel(bits: Tensor) -> Tensor:
    """Return standard Gumbel numbers from 64 random bits each, float32: from -2.8 to 37."""
    # large numbers come from fractions near 0, where float32 resolves 2^-54; a fraction of 1 would give -inf
    fraction = _shifted(bits, 11).float().add_(0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-24)
    return fraction.neg_().log1p_().neg_().log_().neg_()


class GumbelNoise:
    """The last logits processor of transformers' `generate`: the argmax of its result is a sample.

    numbers, completions: the prompt and the completion of each row. width: of the padded prompts.
    """

    def __init__(
        self, seed: int, numbers: Sequence[int], completions: Sequence[int], width: int, device: torch.device
    ) -> None:
        start = torch.tensor([seed], device=device)
        of_prompt_R = splitmix(start, torch.tensor(numbers, device=device))
        self.state_R = splitmix(of_prompt_R, torch.tensor(completions, device=device))
        self.width = width

    def select(self, rows: Tensor) -> None:
        """Continue with these rows."""
        self.state_R = self.state_R[rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add the noise of the next position to scores [R, V]."""
        here_R = splitmix(self.state_R, torch.full_like(self.state_R, input_ids.shape[1] - self.width))
        tokens_V = torch.arange(scores.shape[1], device=scores.device)
        return scores + gumbel(splitmix(here_R[:, None], tokens_V))
