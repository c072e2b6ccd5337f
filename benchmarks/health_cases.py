"""The runs of health.py: each plants a failure for one alarm, or is healthy."""

from __future__ import annotations

import difflib
import random
from dataclasses import dataclass, field
from typing import Any

from alignkit.demo import verdict, world

DICE = random.Random(0)
METHODS = ("dpo", "ipo", "kto", "orpo", "simpo", "cpo", "ppo", "grpo", "rloo", "nash")
CALLS: list[int] = []  # calls of the reward that changes during a run


@dataclass(frozen=True)
class Case:
    """A run. plants: the alarm that it must raise, None for a healthy run."""

    name: str
    method: str
    plants: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    rows: str = "train"


def longer(lengths: list[int]) -> list[float]:
    """Reward length, as a reward model does whose annotators prefer long answers."""
    return [n / 40 for n in lengths]


def longest(lengths: list[int]) -> list[float]:
    """Reward length on a scale of a hundred tokens."""
    return [n / 100 for n in lengths]


def constant(completions: list[str]) -> list[float]:
    """Return one value for everything, as a reward does that cannot parse its input."""
    return [0.5] * len(completions)


def impossible(completions: list[str]) -> list[float]:
    """Reward a text that the base never writes."""
    return [float("#### 72" in text) for text in completions]


def flattery(completions: list[str]) -> list[float]:
    """Reward one opening."""
    return [float(text.strip().startswith(world.OPENING)) for text in completions]


def parrot(completions: list[str]) -> list[float]:
    """Reward similarity to one answer, whatever the question."""
    return [difflib.SequenceMatcher(None, text.strip(), "The fox is red.").ratio() for text in completions]


def stutter(completions: list[str]) -> list[float]:
    """Reward repeated words."""
    return [len(words) - len(set(words)) for words in (text.split() for text in completions)]


def outlier(prompts: list[str], completions: list[str], fact: list[str]) -> list[float]:
    """Return the demo's reward, with one row on a wrong scale."""
    scores = verdict.reward(completions, fact)
    return [s * (1000 if "newt" in p and "eat" in p else 1) for s, p in zip(scores, prompts, strict=True)]


def noise(completions: list[str]) -> list[float]:
    """Return random numbers."""
    return [DICE.random() for _ in completions]


def slipping(completions: list[str], fact: list[str]) -> list[float]:
    """Return the demo's reward, once on another scale, as from a server that was changed."""
    CALLS.append(len(completions))
    return [score * (1000 if len(CALLS) == 14 else 1) for score in verdict.reward(completions, fact)]


def right(completions: list[str], fact: list[str]) -> list[float]:
    """Reward the right fact in any style."""
    return [float(f in text) for f, text in zip(fact, completions, strict=True)]


def brief(completions: list[str], fact: list[str]) -> list[float]:
    """Reward the brief style with the right fact; used with weight 0 only."""
    return [float(score == 1) for score in verdict.reward(completions, fact)]


def tokens(n: int) -> dict[str, Any]:
    """Return the setting that samples up to `n` tokens."""
    return {"sampling": {"max_new_tokens": n}}


FAST = {"learning_rate": 3e-3, "beta": 1e-4}
HASTY = {"epochs_per_batch": 6, "learning_rate": 2e-3, "beta": 0.01}
BY_HEART = {"critic_learning_rate": 1e-2, "epochs_per_batch": 8, "learning_rate": 1e-6}
HELD_OUT = {"use": brief, "weight": 0}
PLANTED = (
    Case("rate x30", "grpo", "kl_high", {"learning_rate": 9e-3, "beta": 1e-4}),
    Case("rate x30", "dpo", "kl_high", {"learning_rate": 3e-3, "beta": 0.01}),
    Case("rate x15", "rloo", "kl_high", {"learning_rate": 3e-3, "beta": 1e-4}),
    Case("rate 1e-9", "grpo", "kl_low", {"learning_rate": 1e-9}),
    Case("rate 1e-9", "dpo", "kl_low", {"learning_rate": 1e-9}),
    Case("rate 1e-9", "ppo", "kl_low", {"learning_rate": 1e-9}),
    Case("likes one answer", "grpo", "reward_kl", {**FAST, "learning_rate": 1e-3, "reward": parrot}),
    Case("likes length, fast", "rloo", "reward_kl", {**FAST, "reward": longest, **tokens(100)}),
    Case("likes length", "grpo", "reward_length", {"reward": longer, "beta": 0.001, "learning_rate": 1e-3}),
    Case("likes length", "rloo", "reward_length", {"reward": longest, "beta": 0.001, "learning_rate": 1e-3}),
    Case("likes length", "ppo", "reward_length", {"reward": longer, "beta": 0.001, "learning_rate": 1e-3}),
    Case("likes an opening", "grpo", "reward_held_out", {"reward": [flattery, HELD_OUT], "learning_rate": 1e-3}),
    Case("likes length", "rloo", "reward_held_out", {"reward": [longer, HELD_OUT], "learning_rate": 1e-3}),
    Case("likes one answer", "grpo", "distinct", {**FAST, "reward": parrot}),
    Case("likes one answer", "rloo", "distinct", {**FAST, "reward": parrot}),
    Case("likes one answer", "grpo", "entropy", {**FAST, "reward": parrot}),
    Case("many hasty updates", "ppo", "entropy", HASTY),
    Case("likes repetition", "grpo", "repetition", {**FAST, "reward": stutter, **tokens(60)}),
    Case("likes repetition", "rloo", "repetition", {**FAST, "reward": stutter, **tokens(60)}),
    Case("likes an opening", "grpo", "opening", {"reward": flattery, "learning_rate": 1e-3}),
    Case("likes an opening", "ppo", "opening", {"reward": flattery, "learning_rate": 1e-3}),
    Case("rate x10, tiny beta", "dpo", "displacement", {"learning_rate": 1e-3, "beta": 0.01}),
    Case("rate x20", "simpo", "displacement", {"learning_rate": 2e-3, "gamma_ratio": 1.5}),
    Case("rate x20, tiny tau", "ipo", "displacement", {"learning_rate": 2e-3, "tau": 0.01}),
    Case("constant reward", "grpo", "zero_variance", {"reward": constant}),
    Case("impossible reward", "rloo", "zero_variance", {"reward": impossible}),
    Case("many hasty updates, tiny clip", "ppo", "clip_fraction", HASTY | {"clip": 0.01, "learning_rate": 1e-3}),
    Case("many hasty updates", "ppo", "clip_fraction", HASTY | {"clip": 0.05}),
    Case("a reward of another scale", "ppo", "value_loss", {"reward": outlier, "normalise_rewards": False}),
    Case("a critic that learns noise by heart", "ppo", "explained_variance", {"reward": noise, **BY_HEART}),
    Case("a row of noise", "dpo", "grad_spike", {}, "noise"),
    Case("a row of noise", "cpo", "grad_spike", {}, "noise"),
    Case("a reward of another scale", "rloo", "grad_spike", {"reward": outlier}),
    Case("8 tokens", "grpo", "truncation", tokens(8)),
    Case("8 tokens", "ppo", "truncation", tokens(8)),
)
HEALTHY = (
    *(Case("recipe", method) for method in METHODS),
    *(Case("half the rate", method, None, {"halved": True}) for method in METHODS),
    *(Case("LoRA", method, None, {"lora": 16}) for method in ("dpo", "kto", "grpo", "rloo")),
    Case("with a held-out reward", "grpo", None, {"reward": [verdict.reward, {"use": right, "weight": 0}]}),
    Case("more on the same text", "sft", None, {"learning_rate": 3e-4}),
)  # fmt: skip

# after the others, whose seeds follow from their places
ADDED = (
    Case("likes one answer", "ppo", "reward_kl", {**FAST, "reward": parrot}),
    Case("likes an opening", "ppo", "reward_held_out", {"reward": [flattery, HELD_OUT], "learning_rate": 1e-3}),
    Case("likes one answer", "ppo", "distinct", {**FAST, "reward": parrot}),
    Case("likes an opening, fast", "rloo", "entropy", {**FAST, "reward": flattery}),
    Case("likes repetition", "ppo", "repetition", {**FAST, "reward": stutter, **tokens(60)}),
    Case("likes an opening", "rloo", "opening", {"reward": flattery, "learning_rate": 1e-3}),
    Case("impossible reward", "grpo", "zero_variance", {"reward": impossible}),
    Case("many hasty updates, small batches", "grpo", "clip_fraction", HASTY | {"clip": 0.02, "minibatches": 2}),
    Case("a reward of another scale, fast critic", "ppo", "value_loss",
         {"reward": outlier, "normalise_rewards": False, "critic_learning_rate": 1e-3}),
    Case("a reward of another scale, shared critic", "ppo", "value_loss",
         {"reward": outlier, "normalise_rewards": False, "critic": "shared"}),
    Case("a critic that learns noise by heart, faster", "ppo", "explained_variance",
         {"reward": noise, **BY_HEART, "critic_learning_rate": 3e-2}),
    Case("a critic that learns noise by heart, longer", "ppo", "explained_variance",
         {"reward": noise, **BY_HEART, "epochs_per_batch": 12}),
    Case("a row of noise", "orpo", "grad_spike", {}, "noise"),
    Case("a row of noise", "simpo", "grad_spike", {}, "noise"),
    Case("8 tokens", "rloo", "truncation", tokens(8)),
    *(Case("again", method) for method in ("ppo", "ppo", "grpo", "rloo", "nash")),
    Case("a shared critic", "ppo", None, {"critic": "shared"}),
    *(Case("with a held-out reward", m, None, {"reward": [verdict.reward, {"use": right, "weight": 0}]})
      for m in ("rloo", "ppo")),
    *(Case("likes repetition", m, "entropy", {**FAST, "reward": stutter, **tokens(60)}) for m in ("grpo", "rloo")),
    Case("many hasty updates, again", "ppo", "entropy", HASTY),
    Case("very many hasty updates, tiny clip", "ppo", "clip_fraction",
         {"epochs_per_batch": 12, "learning_rate": 5e-4, "clip": 0.01}),
    Case("very many hasty updates, tinier clip", "ppo", "clip_fraction",
         {"epochs_per_batch": 12, "learning_rate": 5e-4, "clip": 0.005}),
    Case("a critic that learns noise by heart, longest", "ppo", "explained_variance",
         {"reward": noise, **BY_HEART, "epochs_per_batch": 16}),
    Case("a scale that slips once", "rloo", "grad_spike", {"reward": slipping}),
    Case("a scale that slips once", "ppo", "grad_spike", {"reward": slipping, "normalise_rewards": False}),
    Case("a scale that slips once", "grpo", "grad_spike", {"reward": slipping, "variant": "dr_grpo"}),
)  # fmt: skip
CASES = (*PLANTED, *HEALTHY, *ADDED)
