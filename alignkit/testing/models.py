"""The bench's models: tiny ones in float64, and scripted ones that return fixed log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import PluginError
from alignkit.method import Method
from alignkit.models.passes import weighted
from alignkit.models.scoring import Scorer
from alignkit.models.values import ActorCritic, Valuer
from alignkit.testing.world import blend, tiny_classifier, tiny_model
from alignkit.types import Batch, Completion, Outputs


class TinyModels:
    """The bench's models; a role that the method does not declare is refused, as in a run.

    trained: the module that a step trains: the policy, with its critic if there is one, or a reward model.
    """

    def __init__(self, method: Method[Any], dtype: torch.dtype = torch.float64) -> None:
        self.method = method
        self.policy_scorer = Scorer(tiny_model(0, dtype))
        self.reference_scorer = Scorer(tiny_model(0, dtype)).requires_grad_(False)
        blend(self.policy_scorer, tiny_model(1, dtype), 0.05)
        self.trained: Any = self.policy_scorer
        if "critic" in method.roles():
            self.trained = ActorCritic(self.policy_scorer, Valuer(tiny_classifier(2, dtype)))
        if "reward" in method.trains:
            self.trained = Valuer(tiny_classifier(0, dtype))

    def policy(self, batch: Batch, entropy: bool = False, values: bool = False, frozen: bool = False) -> Outputs:
        """Score with the policy and, for values, with the critic."""
        self._check_role("policy")
        temperature = batch.temperature or 1.0
        if not values:
            return weighted(self.policy_scorer(batch.rows, batch.targets, temperature, entropy), batch)
        self._check_role("critic")
        return weighted(self.trained(batch.rows, batch.targets, temperature, entropy, frozen=frozen), batch)

    def reference(self, batch: Batch) -> Outputs:
        """Score with the reference."""
        self._check_role("reference")
        with torch.no_grad():
            return self.reference_scorer(batch.rows, batch.targets, batch.temperature or 1.0)  # type: ignore[no-any-return]

    def reward(self, batch: Batch) -> Tensor:
        """Score whole answers with the reward model."""
        self._check_role("reward")
        return self.trained(batch.rows, batch.rows.last_at)  # type: ignore[no-any-return]

    def _check_role(self, role: str) -> None:
        if role not in self.method.roles():
            raise PluginError(f"'{self.method.name}' uses the role '{role}', which it does not declare")


class ScriptedModels:
    """Models that return fixed values: one log-probability in nats for every token of a completion.

    policy_says, reference_says: the value of each completion. leaves: the policy's outputs, to inspect their gradients.
    """

    def __init__(self, policy_says: Mapping[Completion, float], reference_says: Mapping[Completion, float]) -> None:
        self.policy_says, self.reference_says = policy_says, reference_says
        self.leaves: list[Tensor] = []

    def policy(self, batch: Batch, entropy: bool = False, values: bool = False, frozen: bool = False) -> Outputs:
        """Return the scripted values as a leaf, entropies of 0, and a critic's values of 0 as another leaf."""
        wanted = torch.is_grad_enabled()
        logps_C = _per_token(batch, self.policy_says).requires_grad_(wanted and not frozen)
        values_C = torch.zeros_like(logps_C).requires_grad_(wanted)
        self.leaves += [leaf for leaf, used in ((logps_C, not frozen), (values_C, values)) if used]
        return Outputs(logps_C, torch.zeros(len(logps_C)) if entropy else None, values_C if values else None)

    def reference(self, batch: Batch) -> Outputs:
        """Return the scripted values."""
        return Outputs(_per_token(batch, self.reference_says))

    def reward(self, batch: Batch) -> Tensor:
        """Return each completion's scripted value as its score, a leaf; -30 for a completion that a method created."""
        scores = torch.tensor([self.policy_says.get(c, -30.0) for e in batch.examples for c in e.completions])
        self.leaves.append(scores.requires_grad_(torch.is_grad_enabled()))
        return scores


def _per_token(batch: Batch, values: Mapping[Completion, float]) -> Tensor:
    per_completion = torch.tensor([values[c] for e in batch.examples for c in e.completions])
    return per_completion.repeat_interleave(batch.lengths)
