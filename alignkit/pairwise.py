"""What a pairwise preference model reads: the method that trains one and the judge that uses it share this."""

from __future__ import annotations

from collections.abc import Sequence

PAIRWISE = "alignkit_pairwise"  # set in config.json of a model that compares two completions


def pairwise_ids(prompt: Sequence[int], first: Sequence[int], second: Sequence[int], eos: int) -> list[int]:
    """Return the input of a pairwise preference model: prompt, first, EOS, second, EOS.

    A completion that ends in EOS gets no second one.
    """

    def ended(ids: Sequence[int]) -> list[int]:
        return [*ids] if ids and ids[-1] == eos else [*ids, eos]

    return [*prompt, *ended(first), *ended(second)]
