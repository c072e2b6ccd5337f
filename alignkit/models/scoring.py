"""Scoring of tokens: trunk, the C positions that predict, head; and a probe of the result.

Only this package knows architectures, and it knows no method.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignkit.errors import ModelError, first_line
from alignkit.models.attention import attention_mask, without_flex
from alignkit.models.embedding_noise import noisy
from alignkit.models.loading import causal_lm
from alignkit.models.packing import batch_of
from alignkit.models.quantised import floating
from alignkit.models.rope import each_as_alone, forget_lengths
from alignkit.models.router import Router, check_router, router_of
from alignkit.models.towers import trunk_of
from alignkit.models.truncation import Truncation
from alignkit.types import Batch, Example, Layout, Outputs, PackedRows
from alignkit_kernels import linear_logps, selective_logps
from alignkit_kernels.transform import Transform

DIFFERS = " differ by "
BLOCK_LOGITS = 1 << 26  # logits at a time where the head's own forward is called


class Scorer(nn.Module):
    """A causal language model as a function from rows to log-probabilities; this module is wrapped for training.

    kept_logits: bytes of logits kept for the backward where the head is trained (None: the kernels' default).
    router: records the routing of a mixture of experts, None without an auxiliary loss.
    """

    def __init__(self, model: nn.Module, kept_logits: int | None = None) -> None:
        super().__init__()
        self.model, self.kept_logits = model, kept_logits
        self.router = router_of(causal_lm(model))

    def forward(
        self,
        rows: PackedRows,
        targets: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        truncation: Truncation | None = None,
        critic: nn.Module | None = None,
        frozen: bool = False,
    ) -> Outputs:
        """Return logps [C] float32 of `targets`, entropy [C] where requested, and `drawn` [C] with a truncation.

        critic: a layer that reads the last hidden states, for `values` [C]. frozen: all else has no gradient.
        """
        with torch.no_grad() if frozen else nullcontext():
            hidden_CH = trunk(self.model, rows, router=self.router)
            outputs = head(self.model, hidden_CH, targets, temperature, entropy, self.kept_logits, truncation)
        return outputs if critic is None else outputs._replace(values=critic(hidden_CH))

    def probe(self, batch: Batch) -> str | None:
        """Return how packed rows differ from the model's own forward, or None; see `probe`."""
        return probe(self, batch)

    def check_causal(self, example: Example, device: torch.device) -> None:
        """Raise ModelError for a model that sees the tokens that it predicts."""
        check_causal(self.model, example, device)

    def check_router(self, example: Example, device: torch.device) -> None:
        """Compare the auxiliary loss with transformers' own, see `alignkit.models.router.check_router`."""
        if self.router is None:
            return
        one = batch_of([replace(example, completions=example.completions[:1])], Layout("padded"), device)
        with torch.no_grad(), self.router.recording():
            trunk(self.model, one.rows, router=self.router)
        sequence = one.rows.input_ids[0]
        if not check_router(causal_lm(self.model), self.router, sequence):
            self.router = None


def trunk(model: nn.Module, rows: PackedRows, at: Tensor | None = None, router: Router | None = None) -> Tensor:
    """Return the last hidden states [C, H] at the positions that predict, or [k, H] at the flattened positions `at`.

    router: reads the pass where it records.
    """
    lm = causal_lm(model)
    mask = attention_mask(rows, lm.config.get_text_config(), floating(lm))
    inputs = {"input_ids": rows.input_ids, "attention_mask": mask, "position_ids": rows.position_ids}
    if router is not None:
        inputs["output_router_logits"] = router.on
    with each_as_alone(lm, rows), noisy(lm, rows):
        out = trunk_of(lm)(**inputs, use_cache=False)
    if router is not None and router.on:
        router.read(out.router_logits, rows)
    hidden_RTH = out.last_hidden_state
    return hidden_RTH.reshape(-1, hidden_RTH.shape[-1]).index_select(0, rows.predict_at if at is None else at)  # type: ignore[no-any-return]


def head(
    model: nn.Module,
    hidden_CH: Tensor,
    targets: Tensor,
    temperature: float,
    entropy: bool,
    kept_logits: int | None = None,
    truncation: Truncation | None = None,
) -> Outputs:
    """Return logps of the targets, and what else is requested; the architecture's logit transforms are applied."""
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    # some configurations hold None for "no scale"
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    layer = inside_adapter(lm.get_output_embeddings())
    if layer is None:
        raise ModelError(f"{type(lm).__name__} has no head to score tokens with: get_output_embeddings() is None")
    if type(layer) is nn.Linear:
        found = linear_logps(
            hidden_CH, layer.weight, targets, layer.bias, softcap, scale, temperature, entropy, kept_logits
        )
    else:
        # inplace is False: the head's own backward may need its output
        options = (temperature, entropy, False, softcap, scale)
        found = _by_rows(layer, hidden_CH, targets, options, config.vocab_size)
    outputs = Outputs(*found) if isinstance(found, tuple) else Outputs(found)
    if truncation is None:
        return outputs
    transform = Transform(softcap, scale, temperature)
    return outputs._replace(
        drawn=outputs.logps - _kept(layer, hidden_CH, targets, transform, truncation, config.vocab_size)
    )


def inside_adapter(layer: Any) -> Any:
    """Return the layer that peft's wrapper uses, or a low-rank layer itself, because it computes its own product."""
    # peft: a head trained in full is a copy next to the original; one with low-rank updates has it as base_layer
    if hasattr(layer, "modules_to_save"):
        active = [] if layer.disable_adapters else layer.active_adapters
        layer = layer.modules_to_save[active[0]] if active else layer.original_module
    if hasattr(layer, "base_layer") and layer.disable_adapters and not layer.merged:
        layer = layer.base_layer
    return layer


def _by_rows(layer: Any, hidden_CH: Tensor, targets: Tensor, options: tuple[Any, ...], vocabulary: int) -> Any:
    # only the own forward of a head with low-rank updates or 8-bit weights computes its product: it is called on a
    # block of rows at a time, and again in the backward
    def scored(hidden: Tensor, targets: Tensor) -> Any:
        return selective_logps(layer(hidden), targets, *options)

    n_rows = max(1, BLOCK_LOGITS // vocabulary)
    parts = [
        checkpoint(scored, h, t, use_reentrant=False)
        for h, t in zip(hidden_CH.split(n_rows), targets.split(n_rows), strict=True)
    ]
    return tuple(torch.cat(p) for p in zip(*parts, strict=True)) if options[1] else torch.cat(parts)


def _kept(
    layer: Any, hidden_CH: Tensor, targets: Tensor, transform: Transform, truncation: Truncation, vocabulary: int
) -> Tensor:
    """Return the log of the probability that a truncation leaves at each position, [C], a block of rows at a time."""
    parts, n_rows = [hidden_CH.new_empty(0, dtype=torch.float32)], 0
    for hidden in hidden_CH.split(max(1, BLOCK_LOGITS // vocabulary)):
        at = slice(n_rows, n_rows := n_rows + len(hidden))
        parts.append(truncation.kept(transform.apply(layer(hidden)), targets[at], at))
    return torch.cat(parts)


def plain_logps(model: nn.Module, sequence: Tensor, n_prompt: int) -> Tensor:
    """Return the log-probabilities of a sequence's tokens after the first `n_prompt`, by the model's own forward."""
    lm = causal_lm(model)
    forget_lengths(lm)
    with without_flex(lm):
        logits = lm(input_ids=sequence[None].long(), use_cache=False).logits[0].float()
    logps = logits[:-1].log_softmax(-1).gather(1, sequence[1:, None].long()).squeeze(1)
    return logps[n_prompt - 1 :]  # type: ignore[no-any-return]


def probe(scorer: Scorer, batch: Batch) -> str | None:
    """Compare a batch's packed rows with the model's own forward of each sequence; return the difference, or None.

    Up to 1e-4 nats a token are allowed in float32, 0.25 in lower precision: more than rounding, less than the effect of
    a wrong mask or position.
    """
    device = batch.device
    try:
        with torch.no_grad():
            got = scorer(batch.rows, batch.targets).logps
            want = [
                plain_logps(scorer.model, torch.cat([e.prompt, c.tokens]).to(device), len(e.prompt))[c.trained_at]
                for e in batch.examples
                for c in e.completions
            ]
    except Exception as error:  # architectures refuse a mask with any type of error
        return first_line(error)
    worst = float((got - torch.cat(want)).abs().max())
    if worst <= allowed_difference(scorer, device):
        return None
    return f"log-probabilities{DIFFERS}{worst:.2g} nats a token"


def allowed_difference(model: nn.Module, device: torch.device) -> float:
    """Return the largest allowed difference between packed rows and the model's own forward; see `probe`."""
    return 1e-4 if _is_exact(model, device) else 0.25


def _is_exact(model: nn.Module, device: torch.device) -> bool:
    return floating(model) == torch.float32 and not torch.is_autocast_enabled(device.type)


def check_causal(model: nn.Module, example: Example, device: torch.device) -> None:
    """Raise ModelError where a token's log-probability depends on later tokens, as in a masked language model."""
    sequence = torch.cat([example.prompt, example.completions[0].tokens]).to(device)
    other = torch.cat([sequence[:-1], (sequence[-1:] == 0).to(sequence.dtype)])  # with another last token
    try:
        with torch.no_grad():
            change = plain_logps(model, sequence, 1)[:-1] - plain_logps(model, other, 1)[:-1]
    except Exception:  # the probe reports why this model fails
        return
    if change.numel() and float(change.abs().max()) > (1e-4 if _is_exact(model, device) else 0.02):
        raise ModelError(
            f"{type(causal_lm(model)).__name__} sees the tokens that it predicts, as masked language models such "
            "as BERT do; give a causal language model"
        )
