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
from alignkit.models.attention import window_of
from alignkit.models.loading import causal_lm
from alignkit.models.rope import switch_of
from alignkit.models.scoring import allowed_difference
from alignkit.models.towers import trunk_of
from alignkit.rollout.shared_keys import NAME, Keys, masks_of, register, unknown_layers

logger = logging.getLogger(__name__)

Context = Callable[[], AbstractContextManager[Any]]

_PROBED: WeakKeyDictionary[nn.Module, dict[Any, str | None]] = WeakKeyDictionary()
_STEPS = 3  # of a probe
_LENGTHS = (3, 9)  # of its prompts


class Decoder:
    """The state of a model over a batch of prompts, one row for each at first; to be used inside `attending`.

    most: tokens of a row that are read one by one, its prompt's last one first. context: entered around each pass.
    """

    def __init__(self, lm: Any, prompts: Sequence[Sequence[int]], most: int, context: Context = nullcontext) -> None:
        self.lm, self.context, self.device = lm, context, next(lm.parameters()).device
        self.keys = Keys(torch.tensor([len(p) - 1 for p in prompts], device=self.device), most)
        self.config = lm.config.get_text_config()
        self._last = _last_only(lm)
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
    """Inside the block, the language model attends to `Keys`; other parts, such as towers, stay as they are."""
    register()
    found = [lm.config.get_text_config(), *(m.config for m in trunk_of(lm).modules() if hasattr(m, "config"))]
    configs = list({id(config): config for config in found}.values())
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            # not set_attn_implementation: it changes the towers too, and gives back one name for all
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def refused(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> str | None:
    """Return why a Decoder does not compute what the model's own forward does, or None.

    Found out once for a model, its types of numbers, and lengths within or beyond its sliding window. Compared are the
    log-probabilities after tokens of the prompts, see `alignkit.models.scoring.probe` for what may differ.
    """
    lm = causal_lm(model)
    parameter, window = next(lm.parameters()), window_of(lm.config.get_text_config(), None)
    kind = parameter.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    longest = max(prompts, key=len)
    beyond = window is not None and len(longest) + max_new_tokens > window
    known = _PROBED.setdefault(lm, {})
    key = (parameter.device, parameter.dtype, cast, beyond)
    if key not in known:
        lengths = [*_LENGTHS, *([window + 2] if beyond and window else [])]
        probed = [[longest[i % len(longest)] for i in range(n)] for n in lengths]
        with torch.no_grad():
            known[key] = _problem(lm, probed)
        if known[key]:
            logger.info("sampling by transformers' generate: %s", known[key])
    return known[key]


def _problem(lm: Any, prompts: list[list[int]]) -> str | None:
    """Compare exactly where the weights are in float32, and as the passes are made under autocast."""
    if switch_of(lm):
        return "the model's rotary frequencies depend on the length"
    if not lm._can_set_attn_implementation():  # there is no public function for this
        return "the model's attention cannot be replaced"
    if unknown := unknown_layers(lm.config.get_text_config()):
        return f"the model has layers of type {', '.join(sorted(unknown))}"
    device = next(lm.parameters()).device
    with torch.autocast(device.type, enabled=False):
        problem = _difference(lm, prompts, device)
    return problem or (_difference(lm, prompts, device) if torch.is_autocast_enabled(device.type) else None)


def _difference(lm: Any, prompts: list[list[int]], device: torch.device) -> str | None:
    _own_logps(lm, prompts[0])  # what is wrong with the tokens or the model itself is not the loop's problem
    try:
        with attending(lm):
            read = _read_on(lm, prompts)
        worst = torch.stack([(_own_logps(lm, sequence) - logps).abs().max() for sequence, logps in read]).max()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # architectures refuse a cache or a mask with any type of error
        return f"the model's cache or attention is not known here ({first_line(error)})"
    if float(worst) <= allowed_difference(lm, device):
        return None
    return f"log-probabilities of the loop over tokens differ by {float(worst):.2g} nats"


def _read_on(lm: Any, prompts: list[list[int]]) -> list[tuple[list[int], Tensor]]:
    """Return sequences with a Decoder's log-probabilities after them: of all prompts, the first one in two rows."""
    decoder, read = Decoder(lm, prompts, _STEPS), list[tuple[list[int], Tensor]]()
    rows, last = [0, *range(len(prompts))], decoder.last
    sequences = [list(prompts[i]) for i in rows]
    for step in range(_STEPS):
        logps = decoder.logits(last).log_softmax(-1)
        if step == 0:
            logps = logps[rows]
            decoder.keys.select(torch.tensor(rows, device=logps.device))
        read += [(list(sequence), found) for sequence, found in zip(sequences, logps, strict=True)]
        last = torch.stack([found.argsort()[-1 - i] for i, found in enumerate(logps)])  # different ones
        for sequence, token in zip(sequences, last.tolist(), strict=True):
            sequence.append(token)
    return read


def _own_logps(lm: Any, sequence: list[int]) -> Tensor:
    ids = torch.tensor([sequence], device=next(lm.parameters()).device)
    out = lm(input_ids=ids, use_cache=False, **_last_only(lm))
    return out.logits[0, -1].float().log_softmax(-1)  # type: ignore[no-any-return]


def _last_only(lm: Any) -> dict[str, int]:
    """Return the option for the last position's logits alone, where the architecture can be asked for them."""
    return {"logits_to_keep": 1} if "logits_to_keep" in signature(lm.forward).parameters else {}
