"""A plan as text on the terminal."""

from __future__ import annotations

from rich.table import Table

from alignkit import console
from alignkit.insight.plan.planned import Plan


def print_plan(plan: Plan) -> None:
    """Print what the run will do, its memory by part, and what would need less."""
    held = f", {plan.held_out:,} held out" if plan.held_out else ""
    console.show(f"{plan.method}: {plan.rows:,} rows to train on{held}; {plan.tokens:,} tokens, prompts counted once")
    console.show(f"steps: {plan.steps:,} of {plan.batch_size} examples")
    console.show(packing(plan))
    console.show(reference(plan))
    console.show(f"\nmemory at its peak, while {plan.memory.peak_phase}, on {plan.device}:")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("part")
    table.add_column("size", justify="right")
    for part, size in sorted(plan.memory.phases[plan.memory.peak_phase].items(), key=lambda p: -p[1]):
        table.add_row(part, console.size(size))
    table.add_row("together", console.size(plan.memory.peak))
    console.show(table)
    others = [f"{name} {console.size(sum(p.values()))}" for name, p in plan.memory.phases.items()]
    console.show(f"by phase: {', '.join(others)}")
    if plan.limit is not None:
        console.show(verdict(plan))
    for remedy in plan.remedies:
        fits = "" if plan.limit is None else ", fits" if remedy.peak <= plan.limit else ", does not fit"
        settings = " and ".join(f"{k}: {str(v).lower()}" for k, v in remedy.settings.items())
        console.show(
            f"  {settings}: {console.size(remedy.peak - plan.memory.peak)}, {console.size(remedy.peak)} in all{fits}"
        )


def packing(plan: Plan) -> str:
    """Say what the heaviest update costs packed, and with a row for each completion."""
    m = plan.memory
    said = f"heaviest update: {m.tokens:,} tokens in {m.positions:,} places"
    if m.positions >= m.padded:
        return said
    saved = 1 - m.positions / m.padded
    return f"{said}, {saved:.0%} fewer than the {m.padded:,} of padded rows that repeat their prompts"


def reference(plan: Plan) -> str:
    """Say how the reference is kept, and what its cache knows."""
    if plan.reference is None:
        return "reference: none"
    if plan.cache is None:
        return f"reference: {plan.reference}"
    wanted, known = plan.cache
    if known is None:
        return f"reference: {plan.reference}; {wanted:,} values (--hits loads the weights, and says how many are known)"
    return f"reference: {plan.reference}; {known:,} of {wanted:,} values are in the cache ({known / wanted:.0%})"


def verdict(plan: Plan) -> str:
    """Say whether the run fits into the memory that was given."""
    assert plan.limit is not None
    limit, left = console.size(plan.limit), plan.limit - plan.memory.peak
    if left >= 0:
        return f"it fits into {limit}, {console.size(left)} to spare"
    less = (
        "What needs less:" if plan.remedies else "No setting is known that needs less: shorter rows, or another model"
    )
    return f"it does not fit into {limit}: {console.size(-left)} too much. {less}"
