"""Detectors of faults in a run: for each alarm a pure function over the history.

A function has its alarm's name. It takes the history, the alarm's limit and all limits, and returns the value if it is
beyond the limit, else None. Its message is in `alarm_messages.py`.
"""

from __future__ import annotations

import math
import statistics

from alignkit.alarms import Health
from alignkit.insight.health.history import History

AFTER_WARMUP = 20  # steps at the full learning rate, after which a policy has moved
# times the second largest of the earlier norms: where these vary widely, or one spiked, the median means little
SPIKE = 6
ROUNDING = 1e-6  # of a deviation that is computed from sums of squares, times the mean
NOISE = 3  # standard errors that a change must exceed
GROWN = {"repetition": 0.1, "opening": 0.25}  # a habit that the base has too is its style, not a collapse


def kl_high(h: History, limit: float, _: Health) -> float | None:
    """The policy is far from its reference."""
    return _above(h.now("kl"), limit)


def kl_low(h: History, limit: float, _: Health) -> float | None:
    """The policy has not moved although the learning rate has long been at its peak."""
    kl = h.now("kl")
    return kl if kl is not None and kl < limit and h.step - h.warm_at >= AFTER_WARMUP else None


def reward_kl(h: History, limit: float, health: Health) -> float | None:
    """The reward has risen, and the KL is large and still growing."""
    return _above(h.now("kl"), limit) if _rose(h, health) and h.grows("kl") else None


def reward_length(h: History, limit: float, health: Health) -> float | None:
    """The reward has risen together with the length."""
    return _above(h.ratio("completion/length"), limit) if _rose(h, health) else None


def reward_held_out(h: History, limit: float, health: Health) -> float | None:
    """The reward has risen, and another that is not trained on has fallen."""
    falls = [fall for name in h.held_out if (fall := _fall(h, f"reward/{name}")) is not None]
    return _above(max(falls, default=None), limit) if _rose(h, health) else None


def distinct(h: History, limit: float, _: Health) -> float | None:
    """Completions become alike."""
    ratio, growth = h.ratio("completion/distinct_2"), h.ratio("completion/length")
    if ratio is None:
        return None
    # longer texts repeat more of their pairs anyway, about by the square root of their length (Heaps' law)
    return _below(ratio * math.sqrt(max(growth or 1.0, 1.0)), limit)


def entropy(h: History, limit: float, _: Health) -> float | None:
    """Samples no longer vary."""
    now, ratio = h.now("entropy"), h.ratio("entropy")
    return _below(now, limit) if ratio is not None and ratio < 0.5 else None  # a base may have as low an entropy


def repetition(h: History, limit: float, _: Health) -> float | None:
    """Completions repeat themselves."""
    return _grown(h, "text/repetition", limit, GROWN["repetition"])


def opening(h: History, limit: float, _: Health) -> float | None:
    """Most prompts are answered with the same first words."""
    return _grown(h, "text/opening", limit, GROWN["opening"])


def displacement(h: History, limit: float, _: Health) -> float | None:
    """The margin grows although chosen answers become less likely, because rejected ones do so faster."""
    chosen, rejected, margin = h.change("fall/chosen"), h.change("fall/rejected"), h.change("rewards/margin")
    if chosen is None or rejected is None or margin is None or rejected >= chosen or margin <= 0:
        return None
    # without a reference, a few unlikely rows look like a fall
    return _above(-chosen, limit) if -chosen > NOISE * h.noise("fall/chosen") else None


def same_reward(h: History, limit: float, _: Health) -> float | None:
    """All completions have had the same reward since the first step, as where a reward cannot read them."""
    means, spreads = h.first("reward/mean"), h.first("reward/std")
    if not means or not spreads or any(s > ROUNDING * max(1.0, abs(m)) for m, s in zip(means, spreads, strict=False)):
        return None
    same = max(means) - min(means) <= ROUNDING * max(1.0, abs(means[0]))
    return float(len(spreads)) if same and len(spreads) >= min(limit, 2 * h.window) else None


def zero_variance(h: History, limit: float, _: Health) -> float | None:
    """Most groups have equal rewards, and so no advantage."""
    return _above(h.now("text/dead_groups"), limit)


def clip_fraction(h: History, limit: float, _: Health) -> float | None:
    """Updates move the policy too far from the one that sampled."""
    return _above(h.now("clip_fraction"), limit)


def value_loss(h: History, limit: float, _: Health) -> float | None:
    """The critic's loss explodes."""
    now, early = h.now("value"), h.start_median("value")
    if now is None or early is None or len(h.before("value")) < h.window:
        return None
    usual = max(early, statistics.median(h.before("value")))
    return _above(now / usual, limit) if usual else None


def explained_variance(h: History, limit: float, _: Health) -> float | None:
    """The critic is worse than a constant."""
    return _below(h.median("value/explained_variance"), limit)


def grad_spike(h: History, limit: float, _: Health) -> float | None:
    """One gradient is far larger than the earlier ones."""
    last, before = h.last("grad_norm"), sorted(norm for norm in h.before("grad_norm") if norm > 0)
    if last is None or len(before) < max(h.window, 2) or last <= SPIKE * before[-2]:
        return None
    return _above(last / statistics.median(before), limit)


def truncation(h: History, limit: float, _: Health) -> float | None:
    """Completions are cut."""
    ended = h.now("completion/eos_rate")
    return None if ended is None else _above(1 - ended, limit)


def mismatch(h: History, limit: float, _: Health) -> float | None:
    """The sampler draws from another distribution than the one that is trained."""
    return _above(h.now("rollout/kl"), limit)


def _above(value: float | None, limit: float) -> float | None:
    return value if value is not None and value > limit else None


def _below(value: float | None, limit: float) -> float | None:
    return value if value is not None and value < limit else None


def _grown(h: History, name: str, limit: float, by: float) -> float | None:
    change = h.change(name)
    return _above(h.now(name), limit) if change is not None and change >= by else None


def _rose(h: History, health: Health) -> bool:
    change, spread = h.change("reward/mean"), h.start("reward/std")
    return change is not None and spread is not None and change > health.reward_rise * spread


def _fall(h: History, name: str) -> float | None:
    change, spreads = h.change(f"{name}/mean"), (h.start(f"spread/{name}"), h.now(f"spread/{name}"))
    # where nearly all were equal at the start, one that differs now is not a large fall
    spread = max((s for s in spreads if s is not None), default=None)
    if change is None or spread is None or change >= 0:
        return None
    return -change / (spread or -change)
