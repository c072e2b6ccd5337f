"""The loop over the tokens of completions: one forward pass a token, and rows that have ended leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.rollout.decoder import Decoder
from alignkit.rollout.noise import GumbelNoise
from alignkit.rollout.processors import Stops

_LEAVE = 0.75  # rows leave when this part of the batch or less is left: each time, keys are copied
_LOOK = 8  # tokens between looks at a GPU's results, for which it waits


def decode(
    parts: Sequence[tuple[Decoder, float]],
    prompt_of: Sequence[int],
    max_new_tokens: int,
    ends: Sequence[int],
    warpers: Sequence[Any],
    noise: GumbelNoise | None,
    stops: Stops | None,
) -> list[list[int]]:
    """Return the tokens of rows, which may go on behind their ends.

    parts: models and the weights of their logits. prompt_of: the prompt of each row, in ascending order. warpers:
    logits processors of transformers. noise: None takes the most likely token.
    """
    first = parts[0][0]
    device = first.device
    rows = torch.arange(len(prompt_of), device=device)
    made_RN = torch.full((len(rows), max_new_tokens), ends[0], dtype=torch.int64, device=device)
    last, over = first.last, torch.zeros(len(rows), dtype=torch.bool, device=device)
    ends_E = torch.tensor(ends, device=device)
    for n in range(max_new_tokens):
        logits = _mixed(parts, last)
        if n == 0:  # each prompt's last token was read once
            at_R = torch.tensor(prompt_of, device=device)
            logits = logits[at_R]
            _select(parts, at_R)
        so_far = made_RN[rows, :n]
        for warper in warpers:
            logits = warper(so_far, logits)
        last = (logits if noise is None else noise(so_far, logits)).argmax(-1)
        made_RN[rows, n] = last
        over = over | torch.isin(last, ends_E)
        if stops is not None:
            stops.rows = rows.tolist()
            over = over | stops(made_RN[rows, : n + 1], None)
        if device.type != "cpu" and (n + 1) % _LOOK:
            continue
        left = (~over).nonzero()[:, 0]
        if not len(left):
            break
        if len(left) <= _LEAVE * len(rows):
            rows, last, over = rows[left], last[left], over[left]
            _select(parts, left)
            if noise is not None:
                noise.select(left)
    return made_RN.tolist()  # type: ignore[no-any-return]


def _mixed(parts: Sequence[tuple[Decoder, float]], last: Tensor) -> Tensor:
    if len(parts) == 1:  # the other one's weight is 0, and -inf * 0 is nan
        return parts[0][0].logits(last)
    return torch.stack([weight * part.logits(last) for part, weight in parts]).sum(0)


def _select(parts: Sequence[tuple[Decoder, float]], rows: Tensor) -> None:
    for part, _ in parts:
        part.keys.select(rows)
