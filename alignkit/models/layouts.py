"""The choice of the layout that a model reads: do the rows fit it, and can trees share rows?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from alignkit.config import RunConfig
from alignkit.errors import ModelError
from alignkit.models.attention import BLOCK
from alignkit.models.branches import BRANCHES
from alignkit.models.loading import causal_lm
from alignkit.models.packing import batch_of
from alignkit.models.scoring import DIFFERS, dense_attention
from alignkit.types import Batch, Example, Layout

logger = logging.getLogger(__name__)

DENSE_ROW_TOKENS = 2048  # a dense mask takes row^2 bytes for each row


def check_fit(model: nn.Module, examples: Sequence[Example], longest: int | None = None, mixes: bool = False) -> None:
    """Raise ModelError where the examples hold tokens or positions that the model has no weights for.

    longest: tokens of the longest completion that may be sampled. mixes: any completion may follow any prompt, so the
    longest prompt counts. Rotary positions have no limit: positions that were never trained are a warning.
    """
    lm = causal_lm(model)
    known = lm.get_input_embeddings().weight.shape[0]
    sequences = [(e, c) for e in examples for c in e.completions]
    for example, completion in sequences:
        if (token := max(int(example.prompt.max()), int(completion.tokens.max()))) >= known:
            raise ModelError(
                f"row {example.row} holds the token {token}, but the model has {known} embeddings (0 to {known - 1}): "
                f"the tokenizer belongs to another model, or the embeddings were not resized"
            )
    config = lm.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    longest_prompt = max(len(e.prompt) for e in examples) if mixes else 0
    lengths = [(max(len(e.prompt), longest_prompt) + (longest or len(c.tokens)), e.row) for e, c in sequences]
    beyond = [(n, row) for n, row in lengths if limit and n > limit]
    if not beyond:
        return
    longest, row = max(beyond)
    what = (
        f"{len(beyond)} of {len(lengths)} sequences are longer than the model's {limit} positions, the longest "
        f"{longest} tokens (row {row}); lower max_prompt_tokens and max_completion_tokens to {limit} in total"
    )
    if getattr(config, "rope_parameters", None) is None:
        raise ModelError(what)
    logger.warning("%s", what)


class Probed(Protocol):
    """The part of a scorer that `choose_layout` needs."""

    model: nn.Module

    def probe(self, batch: Batch) -> str | None:
        """Return how packed rows differ from the model's own forward, or None."""
        ...

    def check_causal(self, example: Example, device: torch.device) -> None:
        """Raise ModelError for a model that is not causal."""
        ...


def choose_layout(scorer: Probed, examples: Sequence[Example], config: RunConfig, device: torch.device) -> Layout:
    """Return the layout of the run: the forest where the probe finds it exact, else padded rows, with a warning.

    Raises ModelError where padded rows differ from the model's own forward too, or `layout: forest` cannot be used.
    """
    scorer.check_causal(max(examples, key=lambda e: e.n_tokens), device)
    lm = causal_lm(scorer.model)
    attention = lm.config._attn_implementation
    flex = attention == "flex_attention"
    if attention == BRANCHES:
        forest = Layout("forest", config.row_tokens or config.max_tokens, attention_cost=0.0)
    elif flex:
        forest = Layout("forest", config.row_tokens or config.max_tokens, attention_cost=0.0, multiple_of=BLOCK)
    else:
        forest = Layout("forest", config.row_tokens or min(config.max_tokens, DENSE_ROW_TOKENS))
    rows = sorted(examples, key=lambda e: e.n_tokens)[:: max(1, len(examples) // 4)][:4]
    problem = None
    if config.layout != "padded":
        problem = scorer.probe(batch_of(rows, forest, device))
        if problem is None:
            return forest
        if attention == BRANCHES:  # the model changes its mask, or adds a bias to it
            lm.set_attn_implementation("sdpa")
            return choose_layout(scorer, examples, config, device)
        if flex and config.attention == "auto" and DIFFERS not in problem:
            dense = dense_attention(lm)  # for example, FlexAttention refuses heads of fewer than 16 dimensions
            logger.warning("FlexAttention cannot be used with this model (%s); using %s", problem, dense)
            lm.set_attn_implementation(dense)
            return choose_layout(scorer, examples, config, device)
        if config.layout == "forest":
            raise ModelError(f"this model cannot read the packed forest ({problem}); use layout: auto or padded")
        logger.warning("this model cannot read the packed forest (%s); using padded rows: exact, but slower", problem)
    padded = Layout("padded")
    if problem := scorer.probe(batch_of(rows, padded, device)):
        name = type(lm).__name__
        if DIFFERS not in problem:
            raise ModelError(f"alignkit cannot score tokens with {name}: {problem}")
        raise ModelError(
            f"alignkit's scores disagree with {name}'s own forward pass ({problem}); its head may apply a logit "
            "transform that alignkit does not know"
        )
    return padded
