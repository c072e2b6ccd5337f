"""A plan on the terminal."""

from __future__ import annotations

from rich.table import Table

from alignkit.insight import terminal
from alignkit.insight.plan.experts import Experts
from alignkit.insight.plan.run_plan import Plan
from alignkit.insight.plan.server_memory import Servers


def print_plan(plan: Plan) -> None:
    """Print what the run will do, its memory by part, and settings that need less."""
    held = f", {plan.held_out:,} held out" if plan.held_out else ""
    terminal.show(f"{plan.method}: {plan.rows:,} rows to train on{held}; {plan.tokens:,} tokens, prompts counted once")
    terminal.show(f"steps: {plan.steps:,} of {plan.batch_size} examples")
    terminal.show(packing(plan))
    if plan.experts is not None:
        terminal.show(experts(plan.experts))
    terminal.show(reference(plan))
    terminal.show(f"\nmemory at its peak, while {plan.memory.peak_phase}, on {plan.device}:")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("part")
    table.add_column("size", justify="right")
    for part, size in sorted(plan.memory.phases[plan.memory.peak_phase].items(), key=lambda p: -p[1]):
        table.add_row(part, terminal.size(size))
    table.add_row("together", terminal.size(plan.memory.peak))
    terminal.show(table)
    others = [f"{name} {terminal.size(sum(p.values()))}" for name, p in plan.memory.phases.items()]
    terminal.show(f"by phase: {', '.join(others)}")
    if plan.servers is not None:
        terminal.show(servers(plan.servers))
    if plan.limit is not None:
        terminal.show(verdict(plan))
    for remedy in plan.remedies:
        fits = "" if plan.limit is None else ", fits" if remedy.peak <= plan.limit else ", does not fit"
        settings = " and ".join(f"{k}: {str(v).lower()}" for k, v in remedy.settings.items())
        terminal.show(
            f"  {settings}: {terminal.size(remedy.peak - plan.memory.peak)}, {terminal.size(remedy.peak)} in all{fits}"
        )


def packing(plan: Plan) -> str:
    """Return the size of the heaviest update, packed and with one row per completion."""
    m = plan.memory
    text = f"heaviest update: {m.tokens:,} tokens in {m.positions:,} positions"
    if m.positions >= m.padded:
        return text
    saved = 1 - m.positions / m.padded
    return f"{text}, {saved:.0%} fewer than the {m.padded:,} of padded rows that repeat their prompts"


def experts(e: Experts) -> str:
    """Return the weights of a mixture of experts, and how many of its adapters are on experts."""
    text = (
        f"experts: {e.per_layer} in a layer, {e.per_token} for a token; a token passes {e.active:,} of {e.weights:,} "
        f"weights; experts {e.experts:,}, router {e.router:,}"
    )
    return f"{text}; adapters {e.adapters:,}, on experts {e.on_experts:,}" if e.adapters else text


def reference(plan: Plan) -> str:
    """Return how the reference is kept, and how many of its values are in the cache."""
    if plan.reference is None:
        return "reference: none"
    if plan.cache is None:
        return f"reference: {plan.reference}"
    needed, known = plan.cache
    if known is None:
        return (
            f"reference: {plan.reference}; {needed:,} values (--hits loads the weights, and counts those in the cache)"
        )
    return f"reference: {plan.reference}; {known:,} of {needed:,} values are in the cache ({known / needed:.0%})"


def servers(s: Servers) -> str:
    """Return the memory of the servers."""
    several = f"{s.n} vLLM servers" if s.n > 1 else "one vLLM server"
    text = (
        f"{several} of {s.gpus} GPU{'s' * (s.gpus > 1)}: on each GPU {terminal.size(s.weights)} of weights, and "
        f"{s.per_token / 2**10:,.0f} KiB a token"
    )
    if s.fit is None:
        return f"{text} (--memory: how many sequences fit)"
    if not s.fit:
        return f"{text}; not one sequence of {s.length:,} tokens fits: raise --server-gpus"
    return f"{text}; a server has space for {s.fit:,} sequences of {s.length:,} tokens at once"


def verdict(plan: Plan) -> str:
    """Return whether the run fits into the given memory."""
    assert plan.limit is not None
    limit, left = terminal.size(plan.limit), plan.limit - plan.memory.peak
    if left >= 0:
        return f"it fits into {limit}, {terminal.size(left)} to spare"
    less = "Settings that need less:" if plan.remedies else "No setting needs less: use shorter rows, or another model"
    return f"it does not fit into {limit}: {terminal.size(-left)} too much. {less}"
