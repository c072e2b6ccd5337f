"""The settings of the run itself: those that the rows, the model or the reward ask for, and those one touches first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from alignkit.config import RunConfig
from alignkit.insight.audit.findings import LARGE_PART
from alignkit.insight.audit.lengths import QUANTILES
from alignkit.insight.recommend.advice import Choice
from alignkit.insight.recommend.facts import FEW, Facts
from alignkit.method import Method

_STEPS = 20  # of an epoch, at least: else steps are smaller
_HELD_OUT = 200  # rows from which a twentieth is enough to measure on
_STRENGTHS = ("beta", "tau")


def of_run(
    facts: Facts, method: type[Method[Any]], roles: frozenset[str], lora: int | None, eval_data: object
) -> Iterator[Choice]:
    """Yield the settings of a run with a method, besides the method's own that advice names."""
    yield from _scored(facts, method, roles)
    if eval_data is not None:
        yield Choice("eval_data", eval_data, "held-out rows: read eval/... , not the training metrics")
    elif facts.audit.repeats.prompts >= _STEPS:
        fraction = 0.05 if facts.audit.kept >= _HELD_OUT else 0.1
        yield Choice("eval_fraction", fraction, "held out by prompt: read eval/..., not the training metrics")
    if lora is None and facts.few:
        lora, why = 16, f"fewer than {FEW:,} rows: adapters change less of the model, and forget less (2405.09673)"
    else:
        why = "adapters of this rank instead of all weights"
    if lora is not None:
        yield Choice("lora", lora, why)
    rate = method.learning_rate if lora is None else method.lora_learning_rate
    yield Choice("learning_rate", rate, f"the default {'of' if lora is None else 'with adapters of'} {method.name}; "
                 "the first thing to try is another one")  # fmt: skip
    for name in _STRENGTHS:
        if (field := method.Config.model_fields.get(name)) is not None and not field.is_required():
            yield Choice(name, field.default, field.description or "")
    preferred = method.data in ("pairs", "unpaired")
    yield Choice("epochs", 1.0, f"passes over the data{'; more are rarely better' * preferred}")
    yield from _batch(facts, method)
    yield from _budgets(facts, method)


def _scored(facts: Facts, method: type[Method[Any]], roles: frozenset[str]) -> Iterator[Choice]:
    if method.data != "prompts":
        return
    if "reward" in roles and facts.reward is not None:
        yield Choice("reward", facts.reward, "what scores samples")
    elif "reward" in roles and facts.answers is not None:
        yield Choice("reward", facts.answers, "checks samples against the rows' column `answer`")
    if "judge" in roles and facts.judge is not None:
        yield Choice("judge", facts.judge, "what compares two samples")
    tokens = RunConfig.model_fields["sampling"].default.max_new_tokens
    yield Choice("sampling", {"max_new_tokens": tokens}, "longest sample; a sample that is cut is scored as it is")


def _batch(facts: Facts, method: type[Method[Any]]) -> Iterator[Choice]:
    size = RunConfig.model_fields["batch_size"].default
    rows, least = facts.rows[method.data], 16 if method.min_batch > 1 else 4
    why = "rows of an optimiser step"
    if rows < _STEPS * size:
        size = max(least, 2 ** int(math.log2(max(1, rows // _STEPS))))
        why = f"smaller steps than usual, of {rows:,} rows at least {rows // size} in an epoch"
    yield Choice("batch_size", size, why)


def _budgets(facts: Facts, method: type[Method[Any]]) -> Iterator[Choice]:
    cut = facts.audit.budgets
    if cut is None or method.data == "prompts" or cut.answers_cut <= LARGE_PART * cut.answers:
        return
    longest = max(part.quantiles[QUANTILES.index(0.95)] for part in facts.audit.lengths if part.part != "prompt")
    limit = 64 * math.ceil(longest / 64)
    cuts = f"{cut.answers_cut:,} of {cut.answers:,} answers are longer than {cut.max_completion_tokens}"
    why = f"{cuts}; 95 % are not longer than this"
    yield Choice("max_completion_tokens", limit, why)
