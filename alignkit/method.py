"""The contract a method plugin fulfils. One class, three calls: collect, loss, after_update.

    class MyMethod(Method):
        name = "mine"
        data = "pairs"
        uses = frozenset({"policy", "reference"})

        class Config(MethodConfig):
            beta: float = Field(0.1, gt=0, description="strength of the KL constraint")

        def loss(self, batch, models):
            logps_C = models.policy(batch).logps
            ...
            return {"loss": Term(losses_E)}

The engine calls `loss` once a micro-batch and owns every denominator; whatever depends on the whole batch (a
baseline, a normalisation) belongs in `collect`, or the gradient would depend on how the step was cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from alignkit.advice import Advice, DataFacts
from alignkit.errors import PluginError
from alignkit.types import Batch, Example, Outputs, Term

DataKind = Literal["text", "pairs", "unpaired", "prompts"]
ReferenceNeed = Literal["rows", "live", "moving"]
Role = Literal["policy", "reference", "critic", "reward", "judge"]


class MethodConfig(BaseModel):
    """Base of every method's settings: frozen; a key that it does not know is refused, and so are inf and nan."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Models(Protocol):
    """The roles a method declared in `uses`; asking for another one is an error."""

    def policy(self, batch: Batch, entropy: bool = False, values: bool = False, frozen: bool = False) -> Outputs:
        """Score the batch's targets with the policy; gradients flow unless in `collect`.

        Sampled completions are scored at the temperature that they were sampled at. entropy: of each target's
        distribution too. values: the critic's too, in the same pass. frozen: only the critic gets a gradient.
        """
        ...

    def reference(self, batch: Batch) -> Outputs:
        """Score the batch's targets with the reference; never a gradient. Only where the need is not "rows"."""
        ...

    def reward(self, batch: Batch) -> Tensor:
        """Return the trained reward model's score of each completion, float32 [S]. Of a method that trains one."""
        ...


class Context(Protocol):
    """What `collect` and `after_update` may use besides the batch."""

    @property
    def models(self) -> Models:
        """The roles that the method declared."""
        ...

    @property
    def step(self) -> int:
        """Optimiser steps done before this one."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """The longest that a sampled completion may be."""
        ...

    @property
    def eos(self) -> int:
        """The tokenizer's end-of-sequence token."""
        ...

    @property
    def step_examples(self) -> tuple[Example, ...]:
        """The examples of this step on ALL ranks, in one order everywhere."""
        ...

    @property
    def generator(self) -> torch.Generator:
        """Seeded by the run's seed and the step, the same on all ranks."""
        ...

    def shard(self, examples: Sequence[Example]) -> Batch:
        """This rank's part of a list that has one entry for each of `step_examples`, as a batch with the reference's
        log-probabilities where the method uses them."""
        ...

    def mean(self, value: Tensor) -> Tensor:
        """Mean over all entries of `value` on all ranks, a scalar."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks, entry by entry."""
        ...

    @property
    def training(self) -> bool:
        """False while held-out rows are evaluated, when nothing may be learned from them."""
        ...

    def rollouts(self, batch: Batch, n: int = 1, mixture: float | None = None) -> Batch:
        """Sample n completions of each prompt with the policy.

        The new batch carries, per completion, "ended" (False where it was cut) and, where the method uses a reward,
        "rewards" (raw, float32); per token "reference_logps" where it uses a reference, and "old_logps", the policy's
        own, unless the batch serves a single update, which starts at ratio 1 by construction.
        mixture: also sample one completion a prompt from policy^(1 - mixture) * reference^mixture, token by token, and
        let the judge decide: "wins" (per completion) is P(the policy's beats the mixture's). n must be 1.
        """
        ...

    def log(self, **values: float) -> None:
        """Add numbers to the step's metrics: the same on all ranks."""
        ...

    def update_reference(self, alpha: float) -> None:
        """Move the reference: alpha * policy + (1 - alpha) * reference. Needs `reference_need() == "moving"`."""
        ...


C = TypeVar("C", bound=MethodConfig)


class Method(Generic[C]):
    """An alignment method: what data and roles it needs, and its loss.

    name: what users type. data: the kind of rows it reads. uses: the roles it may ask for. trains: those it changes.
    learning_rate, lora_learning_rate: defaults of a full and a LoRA run. min_batch: examples a step needs at least.
    epochs_per_batch: default of the passes over a collected batch. demo_settings: those of a run in `alignkit demo`,
    the run's own among them; its model is small and wants high rates.
    """

    name: ClassVar[str]
    data: ClassVar[DataKind]
    uses: ClassVar[frozenset[str]] = frozenset({"policy"})
    trains: ClassVar[tuple[str, ...]] = ("policy",)
    learning_rate: ClassVar[float] = 1e-6
    lora_learning_rate: ClassVar[float] = 5e-6
    min_batch: ClassVar[int] = 1
    epochs_per_batch: ClassVar[int] = 1
    demo_settings: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-4}

    Config: ClassVar[type[MethodConfig]] = MethodConfig

    def __init__(self, config: C) -> None:
        self.config = config

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Return how well the method fits a data set that can serve it, for `alignkit recommend` and `alignkit init`.

        Default: a rank in the middle, the first line of the class's docstring as reason, and no settings.
        """
        unknown = f"reads rows of the kind '{cls.data}'; see its documentation"
        return Advice(50, (cls.__doc__ or unknown).strip().splitlines()[0].rstrip("."))

    def roles(self) -> frozenset[str]:
        """Return the roles that these settings need: `uses`, or fewer, so that none is loaded in vain."""
        return self.uses

    def reference_need(self) -> ReferenceNeed:
        """What the reference is asked: "rows" of the data only (a cache serves them), "live" rows made during the
        run too, or "moving" where `after_update` changes it."""
        return "live" if self.data == "prompts" else "rows"

    def longest(self, example: Example) -> Example:
        """Return the example with the longest sequences that the method makes of it. Default: the example itself."""
        return example

    def dropout(self) -> float:
        """Return the dropout probability of the trained model. Anything but 0 breaks a ratio to another model."""
        return 0.0

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Attach what depends on the whole batch; runs once a step without gradients. Default: the batch itself.

        Where "reference" is in `uses`, the batch already carries `reference_logps`.
        """
        return batch

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return the loss's terms for one micro-batch. Pure: no state, no randomness, no average over the batch."""
        raise PluginContractError(f"method '{self.name}' does not define loss(batch, models)")

    def model_settings(self) -> Mapping[str, Any]:
        """Return what is written into the configuration of the saved model. Default: nothing."""
        return {}

    def enough(self, metrics: Mapping[str, float]) -> bool:
        """Say, after an update, whether the other updates of this batch are left out. metrics: that update's."""
        return False

    def after_update(self, ctx: Context, metrics: Mapping[str, float]) -> None:
        """Adapt coefficients or the reference after a step's updates. Default: nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the weights, as JSON values. Default: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class PluginContractError(PluginError):
    """A method class is incomplete."""
