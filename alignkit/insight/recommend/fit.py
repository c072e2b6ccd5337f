"""What makes a run fit into a GPU's memory, as `alignkit plan` reckons it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from alignkit.errors import ModelError
from alignkit.insight import terminal
from alignkit.insight.plan import Plan, Remedy, plan
from alignkit.insight.recommend.advice import Choice

SPARE = 0.9  # of the memory is planned for: a plan may be a tenth off
# what changes no result but for roundings comes first, then adapters, then weights and a reference in fewer bits
_EXACT = {"max_tokens", "kept_logits_gib", "gradient_checkpointing", "sampling.batch_size"}
_ROUNDED = {"dtype", "reference"}
_WHY = {
    "lora": "adapters instead of all weights",
    "gradient_checkpointing": "less memory for about a third more time",
    "max_tokens": "smaller micro-batches: memory, never the result",
    "kept_logits_gib": "logits are made twice instead of kept",
    "dtype": "frozen weights in 16 bits; the adapters stay in 32",
    "reference": "the frozen copy in 8 bits",
    "critic": "one layer on the policy instead of a second model",
    "sampling.batch_size": "fewer samples at once: memory, never the result",
}


class Fit(NamedTuple):
    """What memory asks for. said: in a sentence. settings: that make it fit, where some do."""

    said: str
    settings: tuple[Choice, ...] = ()


def fitted(settings: Mapping[str, Any], limit: int) -> Fit:
    """Plan a run with these flat settings on a GPU of `limit` bytes. Raises as `plan`, ModelError excepted."""
    try:
        found = plan(settings, limit=int(SPARE * limit), gpu=True)
    except ModelError as error:
        return Fit(f"what it needs cannot be reckoned: {error}")
    chosen = _chosen(found)
    if found.memory.peak <= SPARE * limit:
        return Fit(f"{terminal.size(found.memory.peak)} at its peak, fits into {terminal.size(limit)}")
    if chosen is None:
        return Fit(
            f"{terminal.size(found.memory.peak)} at its peak, more than is safe in {terminal.size(limit)}, and "
            "no setting that was tried needs less"
        )
    made = " and ".join(f"{name}: {str(value).lower()}" for name, value in chosen.settings.items())
    fits = "fits into" if chosen.peak <= SPARE * limit else "still more than is safe in"
    said = (
        f"{terminal.size(found.memory.peak)} at its peak, more than is safe in {terminal.size(limit)}; "
        f"with {made} {terminal.size(chosen.peak)}, {fits} it"
    )
    return Fit(said, tuple(Choice(k, v, f"{_WHY[k]}, to fit into memory") for k, v in chosen.settings.items()))


def _chosen(found: Plan) -> Remedy | None:
    """Return the gentlest remedy that fits, else the one that needs the least."""
    assert found.limit is not None
    fitting = [r for r in found.remedies if r.peak <= found.limit]
    return min(fitting, key=_harshness, default=min(found.remedies, key=lambda r: r.peak, default=None))


def _harshness(remedy: Remedy) -> tuple[int, int]:
    names = remedy.settings.keys()
    worst = 0 if names <= _EXACT else 2 if names & _ROUNDED else 1
    return worst, -remedy.peak  # of equals the one that changes least
