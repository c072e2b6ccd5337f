"""Message and remedies of each alarm, and whether it checks evaluations too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from alignkit.alarms import Health
from alignkit.insight.health import detectors as d
from alignkit.insight.health.history import History


@dataclass(frozen=True)
class Detector:
    """One alarm.

    message: with {value}, {limit} and {reward}, the step's mean. remedies: a setting and what to do with it.
    A setting with a leading dot is a method's own; its remedy is listed only where the run has it.
    """

    find: Callable[[History, float, Health], float | None]
    message: str
    remedies: tuple[tuple[str, str], ...]
    evaluations: bool = True

    @property
    def name(self) -> str:
        """The name of the alarm and of its limit."""
        return self.find.__name__

    def advice(self, settings: Mapping[str, Any]) -> str:
        """Return the remedies that the run's settings allow, as a sentence without a full stop."""
        steps = [do.format(f"`{name.removeprefix('.')}`") for name, do in self.remedies if _has(name, settings)]
        text = " or ".join([", ".join(steps[:-1]), steps[-1]] if len(steps) > 1 else steps)
        return text[:1].upper() + text[1:]


def _has(name: str, settings: Mapping[str, Any]) -> bool:
    return not name.startswith(".") or name[1:] in settings


SLOWER = ("learning_rate", "lower {}")
HELD = ((".beta", "raise {}"), (".tau", "raise {}"))
OTHER_REWARD = ("reward", "fix {}: see in completions.jsonl what it favours")
BOTH = ("reward", "add what is missing to {}, or use an ensemble")
SHORTER = ("max_steps", "stop earlier by {}")

DETECTORS = (
    Detector(
        d.kl_high, "the KL to the reference is {value:.3g} nats a sequence, above {limit:g}", (SLOWER, *HELD, SHORTER)
    ),
    Detector(
        d.kl_low, "the KL to the reference is {value:.2g} nats a sequence, below {limit:g}: the policy does not learn",
        (("learning_rate", "raise {}"), (".beta", "lower {}"), (".tau", "lower {}")), evaluations=False,
    ),
    Detector(
        d.reward_kl, "the reward has risen while the KL grew to {value:.3g} nats a sequence, above {limit:g}",
        (OTHER_REWARD, SLOWER, *HELD),
    ),
    Detector(
        d.reward_length,
        "the reward has risen while completions grew to {value:.3g} times their length, above {limit:g}",
        (("reward", "remove length from {}, or reward brevity in it"), ("sampling.max_new_tokens", "lower {}")),
    ),
    Detector(
        d.reward_held_out,
        "the reward has risen while one of weight 0 fell by {value:.3g} standard deviations, more than {limit:g}",
        (BOTH, SHORTER, *HELD),
    ),
    Detector(
        d.distinct, "distinct-2 is {value:.2g} of its start, below {limit:g}: completions become alike",
        (SLOWER, *HELD, (".entropy_coef", "raise {}"), OTHER_REWARD),
    ),
    Detector(
        d.entropy, "the entropy has fallen to {value:.2g} nats a token, below {limit:g}: samples no longer vary",
        (SLOWER, *HELD, (".entropy_coef", "raise {}"), SHORTER),
    ),
    Detector(
        d.repetition, "{value:.0%} of a completion's 4-grams repeat earlier ones, above {limit:.0%}",
        (OTHER_REWARD, SLOWER, *HELD),
    ),
    Detector(
        d.opening, "{value:.0%} of the prompts are answered with the same first words, above {limit:.0%}",
        (OTHER_REWARD, SLOWER, *HELD),
    ),
    Detector(
        d.displacement,
        "chosen answers lost {value:.2g} nats a token, more than {limit:g}, and rejected ones more: the probability "
        "goes elsewhere (likelihood displacement)",
        (SLOWER, (".rpo_alpha", "set {} to 1"), (".sft_weight", "set {} to 1"), (".alpha", "raise {}"), SHORTER),
    ),
    Detector(
        d.same_reward, "all rewards since the first step are {reward:g}: the reward may not read the completions",
        (("reward", "look in completions.jsonl at what {} scored, and call it with these texts"),), evaluations=False,
    ),
    Detector(
        d.zero_variance, "the completions of {value:.0%} of the prompts all have the same score, above {limit:.0%}: "
        "nothing is learned from them",
        (("reward", "use a {} with finer steps"), ("data", "use other prompts in {}"), (".group_size", "raise {}")),
        evaluations=False,
    ),
    Detector(
        d.clip_fraction, "the gradient of {value:.0%} of the tokens is clipped, above {limit:.0%}",
        (SLOWER, ("epochs_per_batch", "lower {}"), ("minibatches", "lower {}")), evaluations=False,
    ),
    Detector(
        d.value_loss, "the value loss is {value:.3g} times its running median, above {limit:g}",
        (("critic_learning_rate", "lower {}"), (".normalise_rewards", "set {} to true")), evaluations=False,
    ),
    Detector(
        d.explained_variance, "the critic's explained variance is {value:.2g}, below {limit:g}: a constant is better",
        (("critic_learning_rate", "lower {}"), (".critic_warmup_steps", "raise {}"), ("critic", "use another {}")),
        evaluations=False,
    ),
    Detector(
        d.grad_spike, "the gradient's norm is {value:.3g} times its running median, above {limit:g}",
        (("data", "check this step's rows of {}"), ("max_grad_norm", "set a lower {} above 0"), SLOWER),
        evaluations=False,
    ),
    Detector(
        d.truncation, "{value:.0%} of the completions were cut, above {limit:.0%}",
        (("sampling.max_new_tokens", "raise {}"), ("sampling.stop", "name the end of an answer in {}"),
         (".missing_eos_penalty", "raise {}")),
    ),
    Detector(
        d.mismatch,
        "the sampler is {value:.2g} nats a token from the trainer, above {limit:g}: it draws from another policy",
        (("rollout", "check precision, weights and logprobs of the sampler in {}, see docs/off-policy.md"),
         ("rollout.correction", "set {} to token_mask"), SLOWER),
    ),
)  # fmt: skip
