"""Prompts and sampled completions -> the tokens that a reward model reads: those that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.data import Dataset
from alignkit.data.rows import Content, Report, Row
from alignkit.data.tokenise import tokenise
from alignkit.rewards.answers import text_of


@dataclass(frozen=True)
class Tree:
    """Token ids of a prompt and of the completions that continue it."""

    prompt: list[int]
    completions: list[list[int]]


def trees(tokenizer: Any, prompts: Sequence[Content], answers: Sequence[Sequence[Content]]) -> list[Tree]:
    """Tokenise each prompt with its completions as training data is, an end-of-sequence token behind each.

    Messages go through the tokenizer's chat template. An empty completion is its end-of-sequence token alone.
    Raises as `alignkit.data.tokenise.tokenise` does.
    """
    # training data has neither empty nor equal answers, so what is tokenised here must not have them either
    distinct = [[a for k, a in enumerate(some) if not _empty(a) and a not in some[:k]] for some in answers]
    rows = [Row(p, tuple(some), row=i) for i, (p, some) in enumerate(zip(prompts, distinct, strict=True))]
    made = _tokenised(tokenizer, rows)
    dropped = [Row(row.prompt, row=row.row) for row in rows if row.row not in made]
    made |= _tokenised(tokenizer, dropped)
    found = []
    for i, some in enumerate(answers):
        example = made[i]
        ids = [completion.tokens.tolist() for completion in example.completions]
        by_answer = list(zip(distinct[i], ids, strict=False))
        end = [tokenizer.eos_token_id]
        found.append(
            Tree(example.prompt.tolist(), [next((t for a, t in by_answer if a == answer), end) for answer in some])
        )
    return found


def cut(tokenizer: Any, ids: Sequence[int], ended: bool) -> list[int]:
    """Return a completion's tokens, without the token that ends it where the completion was cut before its end."""
    ends = {tokenizer.eos_token_id, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    return list(ids[:-1]) if not ended and ids and ids[-1] in ends else list(ids)


def pairwise_ids(prompt: Sequence[int], first: Sequence[int], second: Sequence[int], eos: int) -> list[int]:
    """Return what a pairwise preference model reads about two completions: prompt, first, EOS, second, EOS.

    A completion that ends in EOS gets no second one.
    """

    def ended(ids: Sequence[int]) -> list[int]:
        return [*ids] if ids and ids[-1] == eos else [*ids, eos]

    return [*prompt, *ended(first), *ended(second)]


def _tokenised(tokenizer: Any, rows: list[Row]) -> dict[int, Any]:
    dataset = Dataset(rows, "text", "completion", "the sampled completions", Report(len(rows)))
    return {example.row: example for example in tokenise(dataset, tokenizer)[0]}


def _empty(answer: Content) -> bool:
    return not text_of(answer).strip()
