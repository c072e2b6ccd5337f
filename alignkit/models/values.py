"""Models with a scalar output: a reward model's score of an answer, a critic's value at each token.

Both are sequence classifiers with one label. The critic can also be a linear layer on the policy's trunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import ModelError, first_line
from alignkit.models.loading import causal_lm
from alignkit.models.rope import forget_lengths
from alignkit.models.router import Router, router_of
from alignkit.models.scoring import DIFFERS, Scorer, allowed_difference, inside_adapter, trunk
from alignkit.models.truncation import Truncation
from alignkit.types import Batch, Example, Outputs, PackedRows


class Valuer(nn.Module):
    """A sequence classifier with one label as a function from rows to numbers; this module is wrapped for training."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.router = model, router_of(causal_lm(model))

    def forward(self, rows: PackedRows, at: Tensor) -> Tensor:
        """Return float32 [k]: the head's value at the flattened positions `at` [k]."""
        return _number(number_head(self.model), trunk(self.model, rows, at, self.router))

    def probe(self, batch: Batch) -> str | None:
        """Return how packed rows differ from the model's own forward, or None; see `probe_scores`."""
        return probe_scores(self, batch)

    def check_causal(self, example: Example, device: torch.device) -> None:
        """Do nothing: a score may depend on all tokens of the answer."""

    def check_router(self, example: Example, device: torch.device) -> None:
        """Do nothing: transformers' classifiers have no auxiliary loss to compare with."""


class Grader(nn.Module):
    """A sequence classifier with one label as a function from padded rows to a number for each.

    It is called as a module, because FSDP2 gathers the weights of a module that is called.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, last: Tensor) -> Tensor:
        """Return float32 [B]. ids, mask: [B, T], padded on the right. last: the position of each row's last token."""
        model: Any = self.model
        forget_lengths(model)
        head = getattr(model, "score", None)
        if head is None:  # an encoder's head reads its first token, so padding does not matter
            return model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).float()  # type: ignore[no-any-return]
        # a decoder's own forward reads the last token that is not the padding token: the last but one where EOS pads
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return head(hidden[torch.arange(len(ids), device=ids.device), last]).squeeze(-1).float()  # type: ignore[no-any-return]


class ValueHead(nn.Linear):
    """A critic on the policy's trunk: a linear layer [H, 1]."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return float32 [k]: the values of hidden states [k, H]."""
        return _product(self, hidden)


class ActorCritic(nn.Module):
    """Policy and critic as one module: one forward pass computes both, and data parallelism wraps both.

    critic: a Valuer with its own trunk, or a layer that reads the policy's last hidden states. Each is called as a
    module, because FSDP2 gathers the weights of a module that is called.
    """

    def __init__(self, policy: Scorer, critic: Valuer | ValueHead) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(
        self,
        rows: PackedRows,
        targets: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        truncation: Truncation | None = None,
        frozen: bool = False,
    ) -> Outputs:
        """Return what `Scorer.forward` does, and values [C]; frozen: the policy gets no gradient."""
        given = rows, targets, temperature, entropy, truncation
        if isinstance(self.critic, ValueHead):
            return self.policy(*given, self.critic, frozen)  # type: ignore[no-any-return]
        outputs: Outputs = self.policy(*given, frozen=frozen)
        return outputs._replace(values=self.critic(rows, rows.predict_at))

    @property
    def router(self) -> Router | None:
        """The policy's."""
        return self.policy.router


def _number(layer: nn.Module, hidden: Tensor) -> Tensor:
    layer = inside_adapter(layer)
    if type(layer) is nn.Linear:
        return _product(layer, hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return layer(hidden.to(next(layer.parameters()).dtype)).squeeze(-1).float()  # type: ignore[no-any-return]


def _product(layer: nn.Linear, hidden: Tensor) -> Tensor:
    # float32, outside autocast: bfloat16 scores near 12 are 0.06 apart
    with torch.autocast(hidden.device.type, enabled=False):
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        bias = None if layer.bias is None else layer.bias.to(wide)
        return nn.functional.linear(hidden.to(wide), layer.weight.to(wide), bias).squeeze(-1)


def number_head(model: Any) -> nn.Module:
    """Return the classifier's head. Raises ModelError where it has no head, or more than one label."""
    lm = causal_lm(model)
    layer = getattr(lm, "score", None)
    if not isinstance(layer, nn.Module):
        raise ModelError(f"{type(lm).__name__} has no head `score`, which sequence classifiers have")
    if lm.config.num_labels != 1:
        raise ModelError(f"a reward model has 1 label, got {type(lm).__name__} with {lm.config.num_labels}")
    return layer


def value_head(model: nn.Module) -> ValueHead:
    """Return a critic on the policy's trunk, initialised to 0."""
    lm = causal_lm(model)
    device = next(lm.parameters()).device
    made = ValueHead(lm.config.get_text_config().hidden_size, 1, device="cpu" if device.type == "meta" else device)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made


def plain_score(model: nn.Module, sequence: Tensor) -> Tensor:
    """Return the score of one whole sequence by the model's own forward, a scalar."""
    lm = causal_lm(model)
    forget_lengths(lm)
    config = lm.config.get_text_config()
    pad, config.pad_token_id = config.pad_token_id, None  # else it reads the token before an EOS that also pads
    try:
        return lm(input_ids=sequence[None].long(), use_cache=False).logits[0, 0].float()  # type: ignore[no-any-return]
    finally:
        config.pad_token_id = pad


def probe_scores(valuer: Valuer, batch: Batch) -> str | None:
    """Compare a batch's packed scores with those of each sequence alone; return the difference, or None."""
    sequences = [torch.cat([e.prompt, c.tokens]).to(batch.device) for e in batch.examples for c in e.completions]
    try:
        with torch.no_grad():
            got = valuer(batch.rows, batch.rows.last_at)
            want = torch.stack([plain_score(valuer.model, s) for s in sequences])
    except ModelError:
        raise
    except Exception as error:  # architectures refuse a mask with any type of error
        return first_line(error)
    worst = float((got - want).abs().max() / want.abs().max().clamp(min=1.0))
    return None if worst <= allowed_difference(valuer, batch.device) else f"scores{DIFFERS}{worst:.2g} of the largest"
