"""The choice of the layout that a model reads: do the rows fit it, and can trees share rows?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from alignkit.config import RunConfig
from alignkit.errors import ModelError
from alignkit.models.attention import BLOCK, dense_attention
from alignkit.models.branches import BRANCHES
from alignkit.models.loading import causal_lm
from alignkit.models.packing import batch_of
from alignkit.models.rope import switch_of
from alignkit.models.scoring import DIFFERS
from alignkit.types import Batch, Example, Layout, Switch

logger = logging.getLogger(__name__)

DENSE_ROW_TOKENS = 2048  # a dense mask takes row^2 bytes for each row


def longest_sequence(example: Example) -> int:
    """Return the tokens of the example's prompt and its longest completion."""
    return len(example.prompt) + max((len(c.tokens) for c in example.completions), default=0)


def check_fit(
    model: nn.Module,
    examples: Sequence[Example],
    longest: int | None = None,
    mixes: bool = False,
    sampled: str = "sampling.max_new_tokens",
) -> None:
    """Raise ModelError where the examples hold tokens or positions that the model has no weights for.

    longest: tokens of the longest completion that may be sampled; sampled: the setting that limits it. mixes: any
    completion may follow any prompt, so the longest prompt counts. Rotary positions end where the model was
    trained, or where its rope_parameters extend them.
    """
    lm = causal_lm(model)
    known = lm.get_input_embeddings().weight.shape[0]
    config = lm.config.get_text_config()
    limit = _positions(config)
    longest_prompt = max(len(e.prompt) for e in examples) if mixes else 0
    n_sequences, beyond, most = 0, 0, (0, 0)
    for example in examples:
        for completion in example.completions:
            if (token := max(int(example.prompt.max()), int(completion.tokens.max()))) >= known:
                raise ModelError(
                    f"row {example.row} holds the token {token}, but the model has {known} embeddings (0 to "
                    f"{known - 1}): the tokenizer belongs to another model, or the embeddings were not resized"
                )
            n_tokens = max(len(example.prompt), longest_prompt) + (longest or len(completion.tokens))
            n_sequences, beyond = n_sequences + 1, beyond + bool(limit and n_tokens > limit)
            most = max(most, (n_tokens, example.row))
    if beyond:
        completions = sampled if longest else "max_completion_tokens"
        rotary = getattr(config, "rope_parameters", None) is not None
        extend = ", or extend the positions by rope_parameters in its config.json, if it was made for that"
        raise ModelError(
            f"{beyond} of {n_sequences} sequences are longer than the model's {limit} positions, the longest {most[0]} "
            f"tokens (row {most[1]}); lower max_prompt_tokens and {completions} to {limit} in "
            f"total{extend if rotary else ''}"
        )


def _positions(config: Any) -> int | None:
    """Return the number of positions of a model, with those by which its rope_parameters extend them."""
    limit = getattr(config, "max_position_embeddings", None)
    given = getattr(config, "rope_parameters", None) or {}
    for one in given.values() if all(isinstance(v, dict) for v in given.values()) else [given]:
        if limit and one.get("rope_type", "default") != "default":
            original = one.get("original_max_position_embeddings") or limit
            limit = max(limit, int(original * float(one.get("factor") or 1.0)))
    return limit


class Probed(Protocol):
    """The part of a scorer that `choose_layout` needs."""

    model: nn.Module

    def probe(self, batch: Batch) -> str | None:
        """Return how packed rows differ from the model's own forward, or None."""
        ...

    def check_causal(self, example: Example, device: torch.device) -> None:
        """Raise ModelError for a model that is not causal."""
        ...

    def check_router(self, example: Example, device: torch.device) -> None:
        """Raise ModelError for a mixture of experts whose auxiliary loss is unknown."""
        ...


def choose_layout(scorer: Probed, examples: Sequence[Example], config: RunConfig, device: torch.device) -> Layout:
    """Return the layout of the run: the forest where the probe finds it exact, else padded rows, with a warning.

    Raises ModelError where padded rows differ from the model's own forward too, or `layout: forest` cannot be used.
    """
    scorer.check_causal(max(examples, key=lambda e: e.n_tokens), device)
    scorer.check_router(min(examples, key=lambda e: e.n_tokens), device)
    lm = causal_lm(scorer.model)
    attention = lm.config._attn_implementation
    flex = attention == "flex_attention"
    forest, rows, problem = _forest(attention, config, switch_of(lm)), probed(examples), None
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
    padded = Layout("padded", switch=forest.switch)
    if problem := scorer.probe(batch_of(rows, padded, device)):
        raise _refusal(scorer, rows, padded, device, problem)
    return padded


def _forest(attention: str, config: RunConfig, switch: Switch | None) -> Layout:
    if attention in (BRANCHES, "flex_attention"):
        multiple_of = BLOCK if attention == "flex_attention" else 1
        return Layout("forest", config.row_tokens or config.max_tokens, 0.0, multiple_of, switch)
    return Layout("forest", config.row_tokens or min(config.max_tokens, DENSE_ROW_TOKENS), switch=switch)


def probed(examples: Sequence[Example]) -> list[Example]:
    """Return four examples of all lengths to probe with: the one with the longest sequence is among them, and the
    shortest one."""
    lengths = [longest_sequence(e) for e in examples]
    ordered = sorted(range(len(lengths)), key=lengths.__getitem__)
    last = len(ordered) - 1
    return [examples[ordered[i]] for i in sorted({0, last // 3, last - last // 3, last})]


def _refusal(scorer: Probed, rows: Sequence[Example], padded: Layout, device: torch.device, problem: str) -> ModelError:
    """Return the error for a model whose padded rows differ from its own forward pass, with the cause."""
    name = type(causal_lm(scorer.model)).__name__
    if DIFFERS not in problem:
        return ModelError(f"alignkit cannot score tokens with {name}: {problem}")
    alone = [replace(e, completions=(c,)) for e in rows for c in e.completions]
    if not any(scorer.probe(batch_of([e], padded, device)) for e in alone):
        lengths = sorted({longest_sequence(e) for e in alone})
        return ModelError(
            f"{name} computes a sequence differently when others are in the same pass ({problem}, with sequences of "
            f"{lengths[0]} to {lengths[-1]} tokens), and as in its own forward pass when it is alone. Its rotary "
            "frequencies may depend on the longest sequence of a pass in a way that alignkit does not know: use rows "
            "of similar lengths, or lower max_prompt_tokens and max_completion_tokens"
        )
    return ModelError(
        f"alignkit's scores disagree with {name}'s own forward pass ({problem}); its head may apply a logit "
        "transform that alignkit does not know"
    )
