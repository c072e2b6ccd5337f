"""The basis of expected values: log-probabilities of one sequence at a time, in float64, as plain floats.

Nothing here uses batches, rows, masks or kernels, so an error there cannot hide in both sides of a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignkit.types import Completion, Example


@dataclass(frozen=True)
class Answer:
    """One completion: the log-probabilities of its trained tokens under the policy and the reference, in nats.

    reward: of a sampled completion. values: the critic's value before each token, where the method has a critic.
    """

    policy: tuple[float, ...]
    reference: tuple[float, ...]
    reward: float = 0.0
    values: tuple[float, ...] = ()

    @property
    def n(self) -> int:
        """Number of trained tokens."""
        return len(self.policy)

    @property
    def logp(self) -> float:
        """Summed log-probability under the policy."""
        return math.fsum(self.policy)

    @property
    def mean_logp(self) -> float:
        """Mean log-probability per token under the policy."""
        return self.logp / self.n

    @property
    def h(self) -> float:
        """Summed log-ratio policy / reference."""
        return self.logp - math.fsum(self.reference)


@dataclass(frozen=True)
class ScoredRow:
    """An example with its scored answers. greedy: the reward of the completion that `rollouts(greedy=True)` gives."""

    example: Example
    answers: tuple[Answer, ...]
    greedy: float = 0.0

    @property
    def only(self) -> Answer:
        """The answer of a row with one answer."""
        (answer,) = self.answers
        return answer

    @property
    def chosen(self) -> Answer:
        """The better answer of a pair."""
        return self.answers[0]

    @property
    def rejected(self) -> Answer:
        """The worse answer of a pair."""
        return self.answers[1]


def score_rows(
    policy: Any,
    reference: Any,
    examples: Sequence[Example],
    critic: Any = None,
    reward: Callable[[Completion], float] = lambda _: 0.0,
    temperature: float = 1.0,
) -> list[ScoredRow]:
    """Score each answer separately by the models' own forward pass in float64, without masks or packing."""

    def answer(e: Example, c: Completion) -> Answer:
        values = _values(critic, e, c) if critic is not None else ()
        ours, theirs = (_logps(model, e, c, temperature) for model in (policy, reference))
        return Answer(ours, theirs, reward(c), values)

    return [ScoredRow(e, tuple(answer(e, c) for c in e.completions)) for e in examples]


def score_of(completion: Completion) -> float:
    """Return the kit's reward of a sampled completion: a number in [-2, 2] that depends on its tokens."""
    return 2 * math.sin(float(completion.tokens.double().square().sum()))


def _logps(model: Any, example: Example, completion: Completion, temperature: float) -> tuple[float, ...]:
    sequence = torch.cat([example.prompt, completion.tokens]).tolist()
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0].double()
    logps_TV = (logits_TV / temperature).log_softmax(-1)
    start = len(example.prompt)
    trained = completion.trained.tolist() if completion.trained is not None else [True] * (len(sequence) - start)
    return tuple(float(logps_TV[i - 1, sequence[i]]) for i in range(start, len(sequence)) if trained[i - start])


def _values(critic: Any, example: Example, completion: Completion) -> tuple[float, ...]:
    sequence = torch.cat([example.prompt, completion.tokens]).tolist()
    with torch.no_grad():
        hidden = critic.base_model(input_ids=torch.tensor([sequence]), use_cache=False).last_hidden_state[0]
        values = critic.score(hidden).squeeze(-1).double()
    return tuple(float(v) for v in values[len(example.prompt) - 1 : -1])


def sigmoid(x: float) -> float:
    """Return 1 / (1 + e^-x), accurate on both sides of 0."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    """Return log(1 / (1 + e^-x)), accurate on both sides of 0."""
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))
