"""What was sampled ahead, as a part of a checkpoint: the completions of all ranks, and the weights that sampled them.

So a resumed run learns from the same completions as one that was not interrupted, whatever a sampler would draw again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from alignkit.engine.ahead import Ahead, Early, Made
from alignkit.models.ranks import Ranks
from alignkit.rollout import Sampled

Tensors = dict[str, Tensor]
OF_AHEAD = ("ahead", "ahead_model", "model")  # groups of a checkpoint that `restore_ahead` reads
Prompt = tuple[int, list[Sampled]]  # its mark, and its completions


def ahead_state(
    ahead: Ahead, ranks: Ranks, step: int, weights: Callable[[], Mapping[str, Any]]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Any]]:
    """Return tensors and JSON values of what was sampled for `step`, both empty without; waits until it is sampled.

    Where sampling fails on a rank they are empty too: the step that needs it raises the error, or samples again.

    weights: returns the state of the trained weights that are in force. Every rank must call it.
    """
    calls = {call: early for (at, call), early in sorted(ahead.early.items()) if at == step}
    failed = any(early.made.exception() for early in calls.values())
    if ranks.most(int(failed)) or not calls:
        return {}, {}
    version = next(iter(calls.values())).version
    moved = version == ahead.weights_of
    with ahead.weights.in_force() if moved else nullcontext():
        earlier = {name: value.detach().to("cpu", copy=True) for name, value in weights().items()}
    tensors: Tensors = {}
    for call, early in calls.items():
        own = encoded(list(zip(early.marks, early.made.result(), strict=True)))
        every = {name: ranks.parts(value) for name, value in own.items()}
        parts = [decoded({name: values[i] for name, values in every.items()}) for i in range(ranks.n)]
        tensors |= {f"{call}.{name}": value for name, value in encoded(interleaved(parts)).items()}
    about = {"version": version, "how": {str(call): early.how for call, early in calls.items()}}
    return {"ahead": tensors, "ahead_model": earlier}, about


def restore_ahead(
    ahead: Ahead, ranks: Ranks, step: int, tensors: Mapping[str, Tensors], about: Mapping[str, Any],
    set_weights: Callable[[Tensors], None],
) -> None:  # fmt: skip
    """Give a sampler what `ahead_state` returned for `step`; set_weights: puts a state of the trained weights in force.

    The number of ranks may be another one.
    """
    if not about:
        return
    set_weights(tensors["ahead_model"])
    ahead.weights.take()
    ahead.weights_of = about["version"]
    set_weights(tensors["model"])
    for call, how in about["how"].items():
        mine = f"{call}."
        named = {name.removeprefix(mine): t for name, t in tensors["ahead"].items() if name.startswith(mine)}
        own = ranks.share(decoded(named))
        made: Future[Made] = Future()
        made.set_result([completions for _, completions in own])
        ahead.early[step, int(call)] = Early(about["version"], [mark for mark, _ in own], how, made)


def interleaved(parts: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    """Return the prompts of all ranks in the order of the step, of which each rank has every n-th."""
    return [one for one in chain.from_iterable(zip_longest(*parts)) if one is not None]


def encoded(prompts: Sequence[Prompt]) -> Tensors:
    """Return prompts as flat tensors, for safetensors and for other ranks."""
    flat = [s for _, made in prompts for s in made]
    return {
        "marks": torch.tensor([mark for mark, _ in prompts], dtype=torch.int64),
        "counts": torch.tensor([len(made) for _, made in prompts], dtype=torch.int64),
        "lengths": torch.tensor([len(s.tokens) for s in flat], dtype=torch.int64),
        "ended": torch.tensor([s.ended for s in flat], dtype=torch.int64),
        "tokens": torch.tensor([token for s in flat for token in s.tokens], dtype=torch.int64),
        "logps": torch.tensor([logp for s in flat for logp in s.logps or ()], dtype=torch.float64),
    }


def decoded(named: Mapping[str, Tensor]) -> list[Prompt]:
    """Return the prompts that were encoded."""
    lengths, ended = named["lengths"].tolist(), named["ended"].tolist()
    tokens = [part.tolist() for part in named["tokens"].split(lengths)]
    logps = [part.tolist() for part in named["logps"].split(lengths)] if len(named["logps"]) else [None] * len(lengths)
    flat = iter([Sampled(t, bool(e), p) for t, e, p in zip(tokens, ended, logps, strict=True)])
    counts = named["counts"].tolist()
    return [(mark, [next(flat) for _ in range(n)]) for mark, n in zip(named["marks"].tolist(), counts, strict=True)]
