"""Settings that need less memory, alone and combined: each is planned, because the peak may move to another phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from alignkit.insight.model_paths import is_adapter
from alignkit.insight.plan.memory import Memory, Work, memory
from alignkit.lora_settings import LoraSettings

WORTH = 0.98  # of the peak: a change that leaves more is not reported


@dataclass(frozen=True)
class Remedy:
    """Settings that need less memory, and the peak with them, in bytes."""

    settings: dict[str, Any]
    peak: int


def find_remedies(work: Work, found: Memory, limit: int | None) -> Iterator[Remedy]:
    """Yield settings that need less memory, the largest saving first; then combined, where none alone fits the limit.

    Yields nothing where the run fits already. found: the memory without changes.
    """
    if limit is not None and found.peak <= limit:
        return
    single = [
        (Remedy(change, less.peak), less) for change in _changes(work, found) if (less := _less(work, change, found))
    ]
    single.sort(key=lambda pair: pair[0].peak)
    yield from (remedy for remedy, _ in single)
    if limit is not None and single and single[0][0].peak > limit:
        combination = _combined(work, *single[0], limit)
        if combination.settings != single[0][0].settings:
            yield combination


def _combined(work: Work, best: Remedy, found: Memory, limit: int) -> Remedy:
    """Add the change that saves the most at the current peak, until the run fits or nothing saves more.

    In each round the first change that makes the run fit is taken: it is the mildest.
    """
    original = work
    while best.peak > limit:
        work, step = _changed(original, best.settings), None
        for change in _changes(work, found):
            less = _less(work, change, found)
            if less is not None and (step is None or less.peak < step[1].peak):
                step = change, less
            if step is not None and step[1].peak <= limit:
                break
        if step is None:
            break
        best, found = Remedy({**best.settings, **step[0]}, step[1].peak), step[1]
    return best


def _less(work: Work, change: Mapping[str, Any], found: Memory) -> Memory | None:
    """Return the memory with a change, None where the change saves too little."""
    changed = memory(_changed(work, change))
    return changed if changed.peak < WORTH * found.peak else None


def _changes(work: Work, found: Memory) -> Iterator[dict[str, Any]]:
    """Yield changes that may lower the current peak, the mildest first; a plan takes seconds, so others are skipped."""
    config, parts = work.config, found.phases[found.peak_phase]

    def large(*names: str) -> bool:
        return sum(parts.get(name, 0) for name in names) > (1 - WORTH) * found.peak

    longest = max(e.n_tokens for e in work.examples)
    halves = longest <= config.max_tokens // 2 < found.tokens
    if work.method.data != "prompts" and halves and large("activations", "head", "workspace"):
        yield {"max_tokens": config.max_tokens // 2}
    if config.kept_logits_gib and "reward" not in work.method.trains and "head" in parts and large("head", "workspace"):
        yield {"kept_logits_gib": 0.0}
    if large("rollouts") and config.sampling.batch_size > 1:
        yield {"sampling.batch_size": config.sampling.batch_size // 2}
    if not config.gradient_checkpointing and large("activations", "workspace"):
        yield {"gradient_checkpointing": True}
    moves = work.method.reference_need() == "moving"  # which needs all weights, not those of adapters
    able = not (config.quantize or config.merge_adapter or config.rollout.ahead or config.streaming)
    if work.processes > 1 and not config.fsdp and able and config.reference != "int8":
        yield {"fsdp": True}
    if config.lora is None and not moves and not is_adapter(config.model):
        yield {"lora": 16}
    if "critic" in parts and config.critic != "shared":
        yield {"critic": "shared"}
    if config.dtype != "bfloat16" and _frozen(work):
        yield {"dtype": "bfloat16"}
    if large("reference") and config.reference != "int8" and not (moves or config.quantize or config.fsdp):
        yield {"reference": "int8"}
    lora = config.lora
    if lora and not (config.quantize or config.fsdp or lora.changes_base) and large("weights", "critic"):
        yield {"quantize": "nf4"}


def _frozen(work: Work) -> bool:
    """Return whether the weights may be kept in bfloat16: they are frozen, and products are in bfloat16 anyway.

    peft keeps adapters in float32, but nothing else that is trained: not the head of a critic or reward model, and not
    `modules_to_save`.
    """
    config, method = work.config, work.method
    heads = "critic" in method.roles() or "reward" in method.trains
    only_adapters = config.lora is not None and not config.lora.modules_to_save and not heads
    return only_adapters and work.bf16


def _changed(work: Work, settings: Mapping[str, Any]) -> Work:
    given = dict(settings)
    if "lora" in given:
        given["lora"] = LoraSettings(r=given["lora"])
    if size := given.pop("sampling.batch_size", None):
        given["sampling"] = work.config.sampling.model_copy(update={"batch_size": size})
    config = work.config.model_copy(update=given)
    return replace(work, config=config)
