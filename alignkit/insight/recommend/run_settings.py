"""The run's own settings: those that the rows, the model or the reward need, and those that users tune first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from alignkit.advice import Choice
from alignkit.config import RunConfig
from alignkit.insight.audit.findings import LARGE_PART
from alignkit.insight.audit.lengths import QUANTILES
from alignkit.insight.recommend.data_facts import FEW, Facts
from alignkit.method import Method

LEAST = 20  # prompts: with fewer, none is held out
_STEPS = 20  # least number of steps in an epoch: with fewer, the batch size is reduced
_HELD_OUT = 200  # rows from which 5 % are enough to evaluate on
_STRENGTHS = ("beta", "tau")


def of_run(
    facts: Facts, method: type[Method[Any]], roles: frozenset[str], lora: int | None, eval_data: object
) -> Iterator[Choice]:
    """Yield the settings of a run with a method, besides those that the method advises."""
    yield from _scored(facts, method, roles)
    fraction = 0.0
    if eval_data is not None:
        yield Choice("eval_data", eval_data, "held-out rows: read eval/..., not the training metrics")
    elif fraction := _held_out(facts, method):
        yield Choice("eval_fraction", fraction, "held out by prompt: read eval/..., not the training metrics")
    yield from _trained(facts, method, lora)
    for name in _STRENGTHS:
        if (field := method.Config.model_fields.get(name)) is not None and not field.is_required():
            yield Choice(name, field.default, field.description or "")
    preferred = method.data in ("pairs", "unpaired")
    yield Choice("epochs", 1.0, f"passes over the data{'; more are rarely better' * preferred}")
    yield from _batch(facts, method, _rows(facts, method, 1 - fraction))
    yield from _budgets(facts, method)


def _held_out(facts: Facts, method: type[Method[Any]]) -> float:
    """Return the fraction of the rows to hold out, 0 where they are too few."""
    fraction = 0.05 if facts.audit.kept >= _HELD_OUT else 0.1
    enough = facts.audit.repeats.prompts >= LEAST and _rows(facts, method, fraction) >= method.min_batch
    return fraction if enough else 0.0


def _rows(facts: Facts, method: type[Method[Any]], fraction: float) -> int:
    """Estimate how many rows belong to a fraction of the prompts; exact where all prompts have the same number."""
    prompts = facts.audit.repeats.prompts
    return round(facts.data.rows[method.data] * round(fraction * prompts) / prompts)


def _trained(facts: Facts, method: type[Method[Any]], lora: int | None) -> Iterator[Choice]:
    """Yield adapters where they are needed, and the learning rate of the trained weights."""
    if lora is not None:
        yield Choice("lora", lora, "adapters of this rank instead of all weights")
    elif facts.data.few and not facts.data.adapter:
        lora, why = 16, f"fewer than {FEW:,} rows: adapters change less of the model, and forget less (2405.09673)"
        yield Choice("lora", lora, why)
    own = "the model is an adapter, trained as it is, so `lora` is left out; " if facts.data.adapter else ""
    rate = rate_of(method, adapters=lora is not None or facts.data.adapter)
    yield rate._replace(why=own + rate.why)


def rate_of(method: type[Method[Any]], adapters: bool) -> Choice:
    """Return the learning rate to start with."""
    rate = method.lora_learning_rate if adapters else method.learning_rate
    which = f"{'with adapters ' * adapters}of {method.name}"
    return Choice("learning_rate", rate, f"the default {which}; the first setting to tune")


def _scored(facts: Facts, method: type[Method[Any]], roles: frozenset[str]) -> Iterator[Choice]:
    if method.data != "prompts":
        return
    if "reward" in roles and facts.reward is not None:
        yield Choice("reward", facts.reward, "reward that scores samples")
    elif "reward" in roles and facts.data.verifier is not None:
        yield Choice("reward", facts.data.verifier, "checks samples against the rows' column `answer`")
    if "judge" in roles and facts.judge is not None:
        yield Choice("judge", facts.judge, "judge that compares two samples")
    tokens = RunConfig.model_fields["sampling"].default.max_new_tokens
    yield Choice("sampling", {"max_new_tokens": tokens}, "length limit of a sample; cut samples are scored as they are")


def _batch(facts: Facts, method: type[Method[Any]], rows: int) -> Iterator[Choice]:
    """Yield the batch size. rows: those to train on."""
    size = RunConfig.model_fields["batch_size"].default
    least, why = 16 if method.min_batch > 1 else 4, "rows of an optimiser step"
    if rows < _STEPS * size:
        size = max(least, 2 ** int(math.log2(max(1, rows // _STEPS))))
        steps = rows // size + (rows % size >= method.min_batch)  # as `stream.Stream` cuts them
        why = f"smaller steps than usual: about {steps} in an epoch (rows to train on: {rows:,})"
    yield Choice("batch_size", size, why)


def _budgets(facts: Facts, method: type[Method[Any]]) -> Iterator[Choice]:
    cut = facts.audit.budgets
    if cut is None or method.data == "prompts" or cut.answers_cut <= LARGE_PART * cut.answers:
        return
    longest = max(part.quantiles[QUANTILES.index(0.95)] for part in facts.audit.lengths if part.part != "prompt")
    limit = 64 * math.ceil(longest / 64)
    cuts = f"{cut.answers_cut:,} of {cut.answers:,} answers are longer than {cut.max_completion_tokens}"
    why = f"{cuts}; 95 % are no longer than this"
    yield Choice("max_completion_tokens", limit, why)
