"""A language model that continues prompts a token at a time: a forward pass of transformers' model, and no more.

The prompts are read once and their keys are shared (`alignkit.rollout.shared_keys`). P prompts, R rows, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from alignkit.errors import first_line
from alignkit.models.loading import causal_lm
from alignkit.models.rope import switch_of
from alignkit.models.scoring import allowed_difference
from alignkit.models.towers import trunk_of
from alignkit.rollout.shared_keys import NAME, Keys, masks_of, register

logger = logging.getLogger(__name__)

_PROBED: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
_STEPS = 3  # of a probe


class Decoder:
    """The state of a model over a batch of prompts, one row for each at first; to be used inside `attending`.

    context: entered around each pass.
    """

    def __init__(
        self,
        lm: Any,
        prompts: Sequence[Sequence[int]],
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.lm, self.context, self.device = lm, context, next(lm.parameters()).device
        self.keys = Keys(torch.tensor([len(p) - 1 for p in prompts], device=self.device))
        self.config = lm.config.get_text_config()
        # only the last position's logits, where the architecture can be asked for them
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in signature(lm.forward).parameters else {}
        if self.keys.longest:
            self._read(prompts)
        self.keys.reading = False
        self.last = torch.tensor([p[-1] for p in prompts], device=self.device)

    def logits(self, tokens_R: Tensor) -> Tensor:
        """Return the model's logits after one more token of each row, float32 [R, V]."""
        positions = self.keys.lengths_P[self.keys.of_row] + self.keys.n_own
        with self.context():
            out = self.lm(
                input_ids=tokens_R[:, None], attention_mask=masks_of(self.keys, self.config),
                position_ids=positions[:, None], past_key_values=self.keys, use_cache=True, **self._last,
            )  # fmt: skip
        self.keys.n_own += 1
        return out.logits[:, -1].float()  # type: ignore[no-any-return]

    def _read(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read all but the prompts' last tokens; what stands behind a prompt's end is never seen."""
        ids = [[*p[:-1], *[p[0]] * (self.keys.longest + 1 - len(p))] for p in prompts]
        positions = torch.arange(self.keys.longest, device=self.device).expand(len(prompts), -1)
        with self.context():
            trunk_of(self.lm)(
                input_ids=torch.tensor(ids, device=self.device), attention_mask=masks_of(self.keys, self.config),
                position_ids=positions, past_key_values=self.keys, use_cache=True,
            )  # fmt: skip


@contextmanager
def attending(lm: Any) -> Iterator[None]:
    """Inside the block, the model attends to `Keys`."""
    before = lm.config._attn_implementation
    register()
    lm.set_attn_implementation(NAME)
    try:
        yield
    finally:
        lm.set_attn_implementation(before)


def refused(model: nn.Module, prompts: Sequence[Sequence[int]]) -> str | None:
    """Return why a Decoder does not compute what the model's own forward does, or None; found out once for a model.

    Compared are the log-probabilities of all tokens after the shortest and the longest prompt and a few tokens more;
    see `alignkit.models.scoring.probe` for what may differ.
    """
    lm = causal_lm(model)
    if lm not in _PROBED:
        if switch_of(lm):
            _PROBED[lm] = "its rotary frequencies depend on the length"
        elif not lm._can_set_attn_implementation():  # there is no public function for this
            _PROBED[lm] = "its attention cannot be replaced"
        else:
            _PROBED[lm] = _difference(lm, [list(one) for one in (min(prompts, key=len), max(prompts, key=len))])
        if _PROBED[lm]:
            logger.info("sampling by transformers' generate: %s", _PROBED[lm])
    return _PROBED[lm]


@torch.no_grad()
def _difference(lm: Any, prompts: list[list[int]]) -> str | None:
    try:
        with attending(lm):
            read = _read_on(lm, prompts)
        worst = max(float((_own_logps(lm, sequence) - logps).abs().max()) for sequence, logps in read)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # architectures refuse a cache or a mask with any type of error
        return first_line(error)
    if worst <= allowed_difference(lm, next(lm.parameters()).device):
        return None
    return f"log-probabilities differ by {worst:.2g} nats"


def _read_on(lm: Any, prompts: list[list[int]]) -> list[tuple[list[int], Tensor]]:
    """Return sequences with a Decoder's log-probabilities after them: of two prompts, the first one in two rows."""
    decoder, read = Decoder(lm, prompts), list[tuple[list[int], Tensor]]()
    rows, last = [0, 0, 1], decoder.last
    sequences = [list(prompts[i]) for i in rows]
    for step in range(_STEPS):
        logps = decoder.logits(last).log_softmax(-1)
        if step == 0:
            logps = logps[rows]
            decoder.keys.select(torch.tensor(rows, device=logps.device))
        read += [(list(sequence), found) for sequence, found in zip(sequences, logps, strict=True)]
        last = torch.stack([found.argsort()[-1 - i] for i, found in enumerate(logps)])  # three different ones
        for sequence, token in zip(sequences, last.tolist(), strict=True):
            sequence.append(token)
    return read


def _own_logps(lm: Any, sequence: list[int]) -> Tensor:
    ids = torch.tensor([sequence], device=next(lm.parameters()).device)
    return lm(input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1)  # type: ignore[no-any-return]
