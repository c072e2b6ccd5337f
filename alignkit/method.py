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

from alignkit.errors import PluginError
from alignkit.types import Batch, Example, Outputs, Term, metric
from alignkit_kernels import sequence_sum

DataKind = Literal["text", "pairs", "unpaired", "prompts"]
ReferenceNeed = Literal["rows", "live", "moving"]
Role = Literal["policy", "reference", "critic", "reward", "judge"]


class MethodConfig(BaseModel):
    """Base of every method's settings: frozen; a key that it does not know is refused, and so are inf and nan."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Models(Protocol):
    """The roles a method declared in `uses`; asking for another one is an error."""

    def policy(self, batch: Batch) -> Outputs:
        """Score the batch's targets with the policy; gradients flow unless in `collect`."""
        ...

    def reference(self, batch: Batch) -> Outputs:
        """Score the batch's targets with the reference; never a gradient. Only where the need is not "rows"."""
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

    def update_reference(self, alpha: float) -> None:
        """Move the reference: alpha * policy + (1 - alpha) * reference. Needs `reference_need() == "moving"`."""
        ...


C = TypeVar("C", bound=MethodConfig)


class Method(Generic[C]):
    """An alignment method: what data and roles it needs, and its loss.

    name: what users type. data: the kind of rows it reads. uses: the roles it may ask for. trains: those it changes.
    learning_rate, lora_learning_rate: defaults of a full and a LoRA run. min_batch: examples a step needs at least.
    """

    name: ClassVar[str]
    data: ClassVar[DataKind]
    uses: ClassVar[frozenset[str]] = frozenset({"policy"})
    trains: ClassVar[tuple[str, ...]] = ("policy",)
    learning_rate: ClassVar[float] = 1e-6
    lora_learning_rate: ClassVar[float] = 5e-6
    min_batch: ClassVar[int] = 1

    Config: ClassVar[type[MethodConfig]] = MethodConfig

    def __init__(self, config: C) -> None:
        self.config = config

    def reference_need(self) -> ReferenceNeed:
        """What the reference is asked: "rows" of the data only (a cache serves them), "live" rows made during the
        run too, or "moving" where `after_update` changes it."""
        return "rows"

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Attach what depends on the whole batch; runs once a step without gradients. Default: the batch itself.

        Where "reference" is in `uses`, the batch already carries `reference_logps`.
        """
        return batch

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return the loss's terms for one micro-batch. Pure: no state, no randomness, no average over the batch."""
        raise PluginContractError(f"method '{self.name}' does not define loss(batch, models)")

    def after_update(self, ctx: Context, metrics: Mapping[str, float]) -> None:
        """Adapt coefficients or the reference after an optimiser step. Default: nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the weights, as JSON values. Default: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class PluginContractError(PluginError):
    """A method class is incomplete."""


def pair_metrics(batch: Batch, logps_C: Tensor, rewards_S: Tensor) -> dict[str, Term]:
    """Return the metrics that every method on pairs logs; ties count half in the accuracy.

    logps_C: the policy's log-probabilities in nats. rewards_S: implicit rewards, chosen and rejected in turn.
    """
    chosen, rejected = batch.pairs(rewards_S)
    logps_chosen, logps_rejected = batch.pairs(sequence_sum(logps_C.detach(), batch.cu_seqlens))
    length_chosen, length_rejected = batch.pairs(batch.lengths.float())
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": chosen - rejected,
        "rewards/accuracy": wins(chosen, rejected),
        "logps/chosen": logps_chosen,
        "logps/rejected": logps_rejected,
        "length/chosen": length_chosen,
        "length/rejected": length_rejected,
    }
    return {name: metric(value) for name, value in values.items()} | kl_metric(batch, logps_C)


def kl_metric(batch: Batch, logps_C: Tensor) -> dict[str, Term]:
    """Return "kl" where the batch carries reference log-probabilities: nats a sequence, on the data's completions.

    The k3 estimator r - 1 - log r of KL(reference || policy), r = policy / reference, summed over a completion's
    tokens: never negative, and unbiased where the reference could have written them (Schulman, 2020).
    """
    if "reference_logps" not in batch:
        return {}
    log_r = (logps_C.detach() - batch.reference_logps).clamp(max=20.0)  # e^20 is a warning in itself
    return {"kl": metric(sequence_sum(log_r.exp() - 1 - log_r, batch.cu_seqlens), over="completions")}


def wins(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 where a > b, 0.5 where they are equal, 0 elsewhere; float32, the shape of a."""
    return (a > b).float() + 0.5 * (a == b).float()
