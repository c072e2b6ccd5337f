"""Sampled tokens as a batch of trees, and as text for rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import PluginError
from alignkit.models.packing import batch_of
from alignkit.rewards import Answers
from alignkit.rollout.sampler import Sampled
from alignkit.rollout.tool_calls import tool_calls
from alignkit.types import Batch, Completion, Example


def with_completions(examples: Sequence[Example], sampled: Sequence[Sequence[Sampled]], like: Batch) -> Batch:
    """Return the prompts with their completions as a batch with "ended", and "sampler_logps" where there are some.

    Raises PluginError where a sampler returns another number of log-probabilities than tokens.
    """
    grown = [replace(e, completions=tuple(map(completion_of, some))) for e, some in zip(examples, sampled, strict=True)]
    ended = torch.tensor([s.ended for some in sampled for s in some], device=like.device)
    made = batch_of(grown, like.layout, like.device).attach(per_completion={"ended": ended})
    flat = [s for some in sampled for s in some]
    if all(s.logps is None for s in flat):
        return made
    for s in flat:
        if s.logps is None or len(s.logps) != s.n_sampled:
            raise PluginError(
                f"the sampler returned {len(s.logps or ())} log-probabilities for a completion of {s.n_sampled} "
                "tokens; it must return one for each token, or none for all completions"
            )
    logps = torch.tensor([x for s in flat for x in s.logps or ()], dtype=torch.float32, device=like.device)
    return made.attach(per_token={"sampler_logps": logps})


def completion_of(sampled: Sampled) -> Completion:
    """Return what was sampled as a completion of a tree."""
    trained = None if sampled.trained is None else torch.tensor(sampled.trained, dtype=torch.bool)
    return Completion(torch.tensor(sampled.tokens, dtype=torch.int32), trained)


def answers_of(
    tokenizer: Any, examples: Sequence[Example], sampled: Sequence[Sequence[Sampled]], columns: Sequence[str] = ()
) -> Answers:
    """Return prompts and completions as rewards receive them: text without special tokens, and the rows' columns.

    columns: names to include for every row, None where a row lacks one; the rows' own names are added.
    """
    flat = [(e, s) for e, some in zip(examples, sampled, strict=True) for s in some]
    texts = [tokenizer.decode(s.tokens, skip_special_tokens=True) for _, s in flat]
    raw = [tokenizer.decode(s.tokens, skip_special_tokens=False) for _, s in flat]
    names = dict.fromkeys([*columns, *(name for e in examples for name in e.columns)])
    return Answers(
        prompts=[e.asked for e, _ in flat],
        completions=[
            t if isinstance(e.asked, str) else said(e, s) or [{"role": "assistant", "content": t}]
            for (e, s), t in zip(flat, texts, strict=True)
        ],
        columns={name: [e.columns.get(name) for e, _ in flat] for name in names},
        rows=[e.row for e, _ in flat],
        lengths=[s.n_sampled for _, s in flat],
        ended=[s.ended for _, s in flat],
        completion_ids=[list(s.tokens) for _, s in flat],
        raw_completions=raw,
        tool_calls=[tool_calls(text) for text in raw],
        earned=[s.earned for _, s in flat],
    )


def said(example: Example, sampled: Sampled) -> list[dict[str, Any]]:
    """Return the messages of a trajectory after its prompt; none of a completion without an environment."""
    return (sampled.messages or [])[len(example.asked) :]


def unanswered(examples: Sequence[Example], columns: Sequence[str]) -> Answers:
    """Return prompts and the rows' columns as rewards receive them, with empty completions."""
    n = len(examples)
    values = {name: [e.columns.get(name) for e in examples] for name in columns}
    return Answers([e.asked for e in examples], [""] * n, values, [e.row for e in examples], [0] * n, [True] * n)


def distinct(sampled: Sequence[Sequence[Sampled]], n: int = 2) -> tuple[int, int]:
    """Return the numbers of different n-grams and of all n-grams in all completions; their ratio is distinct-n."""
    grams = [tuple(s.tokens[i : i + n]) for some in sampled for s in some for i in range(len(s.tokens) - n + 1)]
    return len(set(grams)), len(grams)


def with_placeholders(examples: Sequence[Example], sampling_tokens: int) -> list[Example]:
    """Return the prompts with two artificial completions each, to probe the model before anything is sampled.

    The longest prompt has one of `sampling_tokens` tokens, as the longest sequence of the run may have.
    """
    longest = max(examples, key=lambda e: len(e.prompt), default=None)

    def artificial(prompt: Tensor, n: int) -> Completion:
        return Completion(prompt.repeat(-(-n // len(prompt)))[-n:])

    return [
        replace(e, completions=(artificial(e.prompt, n), artificial(e.prompt, 3)))
        for e in examples
        for n in [sampling_tokens if e is longest else min(sampling_tokens, 8)]
    ]
