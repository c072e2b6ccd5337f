"""The contract of a method plugin: one class, three calls: collect, loss, after_update.

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

The engine calls `loss` once per micro-batch and owns every denominator; whatever depends on the whole batch (a
baseline, a normalisation) belongs in `collect`, or the gradient would depend on how the step was split.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from alignkit.advice import Advice, DataFacts
from alignkit.errors import AlignkitError, PluginError, at_place
from alignkit.types import Batch, Example, Outputs, Term

DataKind = Literal["text", "pairs", "unpaired", "prompts"]
ReferenceNeed = Literal["rows", "live", "moving"]
ColumnType = type[float] | type[int] | type[bool] | type[str] | type[list[Any]] | type[dict[str, Any]]
COLUMN_TYPES: tuple[type, ...] = (float, int, bool, str, list, dict)
Role = Literal["policy", "reference", "critic", "reward", "judge"]


class MethodConfig(BaseModel):
    """Base of every method's settings: frozen; unknown keys, inf and nan are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Models(Protocol):
    """The roles that a method declared in `uses`; using any other role is an error."""

    def policy(self, batch: Batch, entropy: bool = False, values: bool = False, frozen: bool = False) -> Outputs:
        """Score the batch's targets with the policy; gradients flow unless in `collect`.

        Sampled completions are scored at the temperature that they were sampled at. entropy: also return the entropy
        of each target's distribution. values: also return the critic's values, from the same pass. frozen: only the
        critic gets a gradient.
        """
        ...

    def reference(self, batch: Batch) -> Outputs:
        """Score the batch's targets with the reference, without a gradient. Only where the need is not "rows"."""
        ...

    def reward(self, batch: Batch) -> Tensor:
        """Return the trained reward model's score of each completion, float32 [S]; for a method that trains one."""
        ...


class Context(Protocol):
    """The tools of `collect` and `after_update` besides the batch."""

    @property
    def models(self) -> Models:
        """The roles that the method declared."""
        ...

    @property
    def step(self) -> int:
        """Optimiser steps before this one."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """The length limit of a sampled completion."""
        ...

    @property
    def eos(self) -> int:
        """The tokenizer's end-of-sequence token."""
        ...

    @property
    def step_examples(self) -> tuple[Example, ...]:
        """The examples of this step on ALL ranks, in the same order everywhere."""
        ...

    @property
    def generator(self) -> torch.Generator:
        """Seeded by the run's seed and the step; the same on all ranks."""
        ...

    def shard(self, examples: Sequence[Example]) -> Batch:
        """Return this rank's part of a list with one entry for each of `step_examples`, as a batch with the reference's
        log-probabilities where the method uses them."""
        ...

    def mean(self, value: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the mean over all entries of `value` on all ranks, a scalar; counted: bool, over these entries."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks, elementwise."""
        ...

    @property
    def training(self) -> bool:
        """False while held-out rows are evaluated: then no state may change."""
        ...

    def rollouts(
        self,
        batch: Batch,
        n: int = 1,
        mixture: float | None = None,
        *,
        greedy: bool = False,
        sampling: Mapping[str, Any] | None = None,
        name: str = "",
        logps: bool = True,
    ) -> Batch:
        """Sample n completions per prompt with the policy.

        The new batch holds, per completion, "ended" (False where it was cut) and, where the method uses a reward,
        "rewards" (raw, float32) and "scored" (False where no reward applies; its reward is then 0); per token
        "reference_logps" where it uses a reference, and "old_logps", of the policy that sampled, unless the batch is
        used for a single update and sampled by the policy itself: then it starts at ratio 1 by construction.
        mixture: also sample one completion per prompt from policy^(1 - mixture) * reference^mixture, token by token,
        and query the judge: "wins" (per completion) is P(the policy's beats the mixture's). n must be 1.
        greedy: the most likely token each time; n must be 1. sampling: changes of the run's settings for this call, of
        max_new_tokens (at most the run's), min_new_tokens, temperature, top_p, top_k and stop; the new batch is scored
        at its own temperature, a greedy one at the run's. logps: False leaves out the scores of tokens, for completions
        whose reward is all that is needed. name: of the call, which its metrics begin with ("NAME/reward/mean"); calls
        of one step need different names, and draw different noise. Raises PluginError where these contradict.
        """
        ...

    def log(self, **values: float) -> None:
        """Add numbers to the step's metrics; they must be the same on all ranks."""
        ...

    def update_reference(self, alpha: float) -> None:
        """Move the reference: alpha * policy + (1 - alpha) * reference. Needs `reference_need() == "moving"`."""
        ...


C = TypeVar("C", bound=MethodConfig)


class Method(Generic[C]):
    """An alignment method: what data and roles it needs, and its loss.

    name: what users type. data: the kind of rows it reads. uses: the roles it may use. trains: those it trains.
    columns: further columns that every row must have, such as {"weight": float}, found in `batch.columns`.
    learning_rate, lora_learning_rate: defaults of a full and a LoRA run. min_batch: the fewest examples of a step.
    epochs_per_batch: default number of passes over a collected batch. demo_settings: settings of its run in
    `alignkit demo`, the run's own or the method's; the demo's small model needs high learning rates. demo_base:
    settings to fine-tune the demo's untrained model with, before another method aligns it; None: it does not do that.
    """

    name: ClassVar[str]
    data: ClassVar[DataKind]
    uses: ClassVar[frozenset[str]] = frozenset({"policy"})
    columns: ClassVar[Mapping[str, ColumnType]] = {}
    trains: ClassVar[tuple[str, ...]] = ("policy",)
    learning_rate: ClassVar[float] = 1e-6
    lora_learning_rate: ClassVar[float] = 5e-6
    min_batch: ClassVar[int] = 1
    epochs_per_batch: ClassVar[int] = 1
    demo_settings: ClassVar[Mapping[str, Any]] = {"learning_rate": 1.2e-4}
    demo_base: ClassVar[Mapping[str, Any] | None] = None

    Config: ClassVar[type[MethodConfig]] = MethodConfig

    def __init__(self, config: C) -> None:
        self.config = config

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for call in _CALLS:  # an author's error names the author's line, whoever calls
            if call in vars(cls):
                setattr(cls, call, _guarded(vars(cls)[call], call))

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Return how well the method fits a data set that can serve it, for `alignkit recommend` and `alignkit init`.

        Default: a rank in the middle, the first line of the class's docstring as reason, and no settings.
        """
        lines = (cls.__doc__ or "").strip().splitlines() or [""]
        return Advice(50, lines[0].rstrip(". ") or f"reads rows of the kind '{cls.data}'; see its documentation")

    def roles(self) -> frozenset[str]:
        """Return the roles that these settings need: `uses`, or fewer, so that no model is loaded needlessly."""
        return self.uses

    def reference_need(self) -> ReferenceNeed:
        """Return what the reference must score: "rows" of the data only (which can be cached), "live" rows created
        during the run too, or "moving" where `after_update` changes the reference."""
        return "live" if self.data == "prompts" else "rows"

    def longest(self, example: Example) -> Example:
        """Return the example with the longest sequences that the method builds from it. Default: the example itself."""
        return example

    def dropout(self) -> float:
        """Return the dropout probability of the trained model. Any value but 0 breaks a ratio to another model."""
        return 0.0

    def allows_dropout(self) -> bool:
        """Return whether adapters may have dropout. Default: where no ratio to another model is computed, neither to a
        reference nor to the policy that sampled."""
        return "reference" not in self.roles() and self.data != "prompts"

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        """Attach what depends on the whole batch; runs once per step without gradients. Default: the batch itself.

        Where "reference" is in `uses`, the batch already holds `reference_logps`.
        """
        return batch

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return the loss's terms for one micro-batch. Pure: no state, no randomness, no average over the batch."""
        raise PluginContractError(f"method '{self.name}' does not define loss(batch, models)")

    def model_settings(self) -> Mapping[str, Any]:
        """Return values for the configuration of the saved model. Default: none."""
        return {}

    def enough(self, metrics: Mapping[str, float]) -> bool:
        """Return whether to skip the remaining updates of this batch. metrics: those of the last update."""
        return False

    def schedule(self, step: int, total: int) -> float | None:
        """Return the factor of the peak learning rate at a step, from 0 to total - 1.

        None, with the method's settings, leaves it to the run's `schedule`, at all steps; this is the default.
        """
        return None

    def after_update(self, ctx: Context, metrics: Mapping[str, float]) -> None:
        """Adapt coefficients or the reference after a step's updates. Default: nothing.

        metrics: those of the last update: its loss and terms, grad_norm, and what `ctx.log` was given in this step.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the weights, as JSON values. Default: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


_CALLS = (
    "__init__", "roles", "reference_need", "longest", "dropout", "allows_dropout", "collect", "loss", "model_settings",
    "enough", "schedule", "after_update", "state_dict", "load_state_dict",
)  # fmt: skip


def _guarded(function: Callable[..., Any], call: str) -> Callable[..., Any]:
    """Return the author's function; what it raises becomes a PluginError that names the method, the call and the line.

    Our own errors stay what they are, and memory that runs out is the engine's to handle.
    """

    @functools.wraps(function)
    def guarded(self: Method[Any], *args: Any, **options: Any) -> Any:
        try:
            return function(self, *args, **options)
        except PluginError as error:
            if " (at " not in str(error):
                error.args = (f"{error}{at_place(error)}",)
            raise
        except (AlignkitError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise PluginError(f"method '{self.name}' failed in {call}: {what}{at_place(error)}") from error

    return guarded


class PluginContractError(PluginError):
    """A method class is incomplete."""
