"""The settings that make a run fit into a GPU's memory, as `alignkit plan` estimates it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from alignkit.advice import Choice
from alignkit.errors import ModelError
from alignkit.insight import terminal
from alignkit.insight.plan import Plan, Remedy, plan

SPARE = 0.9  # fraction of the memory that is planned for: a plan may be 10 % off
# first settings that change results by rounding at most, then adapters, then weights and a reference in fewer bits
_EXACT = {"max_tokens", "kept_logits_gib", "gradient_checkpointing", "sampling.batch_size"}
_ROUNDED = {"dtype", "reference", "quantize"}
_WHY = {
    "lora": "adapters instead of all weights",
    "gradient_checkpointing": "less memory for about a third more time",
    "max_tokens": "smaller micro-batches: affects memory, never the result",
    "kept_logits_gib": "logits are computed twice instead of kept",
    "dtype": "frozen weights in 16 bits; the adapters stay in 32",
    "reference": "the frozen copy in 8 bits",
    "quantize": "the frozen base in 4 bits",
    "critic": "one layer on the policy instead of a second model",
    "sampling.batch_size": "fewer samples at once: affects memory, never the result",
}


class Fit(NamedTuple):
    """A plan's result about memory. settings: those that make the run fit, or need least where nothing makes it fit."""

    sentence: str
    settings: tuple[Choice, ...] = ()


def fitted(settings: Mapping[str, Any], limit: int) -> Fit:
    """Plan a run with these flat settings on a GPU of `limit` bytes. Raises what `plan` raises, except ModelError."""
    try:
        found = plan(settings, limit=int(SPARE * limit), gpu=True)
    except ModelError as error:
        return Fit(f"cannot be estimated: {error}")
    chosen = _chosen(found)
    if found.memory.peak <= SPARE * limit:
        return Fit(f"{terminal.size(found.memory.peak)} at its peak, fits into {terminal.size(limit)}")
    if chosen is None:
        return Fit(
            f"{terminal.size(found.memory.peak)} at its peak, more than is safe in {terminal.size(limit)}, and "
            "no setting that was tried needs less"
        )
    changes = " and ".join(f"{name}: {str(value).lower()}" for name, value in chosen.settings.items())
    verdict = "fits" if chosen.peak <= SPARE * limit else "is still more than is safe"
    sentence = (
        f"{terminal.size(found.memory.peak)} at its peak, more than is safe in {terminal.size(limit)}; "
        f"with {changes} the peak is {terminal.size(chosen.peak)}, which {verdict}"
    )
    return Fit(sentence, tuple(Choice(k, v, f"{_WHY[k]}, to fit into memory") for k, v in chosen.settings.items()))


def _chosen(found: Plan) -> Remedy | None:
    """Return the gentlest remedy that fits, else the one that needs the least."""
    assert found.limit is not None
    fitting = [r for r in found.remedies if r.peak <= found.limit]
    return min(fitting, key=_harshness, default=min(found.remedies, key=lambda r: r.peak, default=None))


def _harshness(remedy: Remedy) -> tuple[int, int]:
    names = remedy.settings.keys()
    worst = 0 if names <= _EXACT else 2 if names & _ROUNDED else 1
    return worst, -remedy.peak  # among equally good remedies the one that changes least
