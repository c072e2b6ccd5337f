"""One step of a run with models that have no data: the run's own code collects, scores and updates; memory is counted.

Samples, scores and cached values are random here, in the shapes that a run has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.config import RunConfig
from alignkit.data.stream import seeded
from alignkit.engine.ahead import Ahead
from alignkit.engine.roles import Roles
from alignkit.engine.rollouts import Online
from alignkit.engine.scorers import Scorers
from alignkit.engine.state import RunState, Splits
from alignkit.engine.step import StepContext
from alignkit.errors import ModelError
from alignkit.insight.plan.ledger import Ledger
from alignkit.method import Method
from alignkit.models.loading import causal_lm
from alignkit.models.ranks import SINGLE
from alignkit.models.scoring import Scorer
from alignkit.models.towers import trunk_of
from alignkit.models.values import ActorCritic, Valuer
from alignkit.rewards import Answers, Scores
from alignkit.rollout import Draw, Sampled, Setup
from alignkit.types import Batch, Example, Layout, Outputs
from alignkit_kernels import row_stats


class _Roles(Roles):
    """Roles whose passes without a gradient are run for their memory, and return random values."""

    def _without_gradient(self, score: Any, batch: Batch) -> Outputs:
        outputs = score(batch.micro_batches(self.max_tokens)[0])
        return Outputs(*(None if o is None else _random(batch) for o in outputs))  # type: ignore[arg-type]

    def reference(self, batch: Batch) -> Outputs:
        self._check_declared("reference")
        return Outputs(_random(batch))


class _Reference:
    """Replaces a run's reference, whose passes take less memory than an update."""

    def attach(self, batch: Batch, keep: bool = True) -> Batch:
        return batch.attach(per_token={"reference_logps": _random(batch)})

    def update(self, policy: nn.Module, alpha: float) -> None:
        pass


class _Online(Online):
    """Completions of maximum length, and scores, without a model."""

    def sample(self, ctx: Any, examples: Sequence[Example], draw: Draw, mixture: float | None) -> Any:
        tokens = [0] * self.longest(draw)
        return [[Sampled(tokens, True) for _ in range(draw.n)] for _ in examples]

    def longest(self, draw: Draw) -> int:
        """Return the tokens of a completion of maximum length."""
        return self.config.longest_completion if self.config.environment else draw.sampling.max_new_tokens

    def answers(self, examples: Sequence[Example], sampled: Sequence[Sequence[Sampled]]) -> Answers:
        n = sum(map(len, sampled))
        return Answers([""] * n, [""] * n, {}, [0] * n, [self.config.longest_completion] * n, [True] * n)

    def score(self, answers: Answers) -> Scores:
        return Scores([float(i % 3) for i in range(len(answers))], {})

    def compare(self, first: Answers, second: Answers) -> list[float]:
        return [0.5] * len(first)

    def write(self, *_: Any) -> None:
        pass


def _random(batch: Batch) -> Tensor:
    return torch.rand(len(batch.targets)) - 1


def _state(config: RunConfig, method: Method[Any], module: nn.Module, layout: Layout) -> RunState:
    """Return the state of a run that a step needs, without a folder, data or an optimiser."""
    reference: Any = _Reference() if "reference" in method.roles() else None
    online = None
    if method.data == "prompts":
        updates = (config.epochs_per_batch or method.epochs_per_batch) * config.minibatches
        sampler: Any = None  # `_Online` samples itself
        setup, ahead = Setup(module, None, ()), Ahead(sampler, module, module, 0)
        online = _Online(config, method.roles(), Scorers(None, None), setup, reference, updates, ahead)
    parts: Any = SimpleNamespace(
        roles=_Roles(method, module, module, None, config.max_tokens, config.sampling.temperature),  # type: ignore[arg-type]
        reference=reference, online=online, plain=module, layout=layout, ranks=SINGLE, eos=0,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip
    return RunState(config, method, Splits([], [], ""), parts, Path(), {})


def collect(
    config: RunConfig, method: Method[Any], module: nn.Module, layout: Layout, examples: Sequence[Example]
) -> tuple[list[Batch], Roles]:
    """Collect a step of these examples; return the micro-batches of its first update, the largest first, and roles."""
    state = _state(config, method, module, layout)
    ctx = StepContext(state, 0, tuple(examples), seeded(config.seed, 2, 0))
    batch = ctx.collect()
    minibatch, _ = next(iter(batch.minibatches(config.minibatches, ctx.generator, 0, 1, len(examples))))
    micros = minibatch.micro_batches(config.max_tokens)
    return sorted(micros, key=lambda m: -m.n_tokens), state.parts.roles


def learn(method: Method[Any], module: nn.Module, micro: Batch, roles: Roles, ledger: Ledger) -> dict[str, int]:
    """Compute loss and gradients; return the bytes by label at the peak before the first gradient of a layer exists.

    From then on activations are freed and gradients allocated.
    """
    layers = [p for trunk in trunks(module) for p in layers_of(trunk).parameters() if p.requires_grad]
    found: dict[str, int] = {}

    def at_first_gradient(_: Tensor) -> None:
        found.update(found or ledger.peak)

    handles = [p.register_post_accumulate_grad_hook(at_first_gradient) for p in layers]
    handles += [hook for trunk in trunks(module) for hook in _label_hooks(trunk, ledger)]
    ledger.forget_peak()
    with ledger.labelled("head"):
        terms = method.loss(micro, roles)
        loss = torch.stack([t.coef * t.value.mean() for t in terms.values() if t.coef]).sum()
    loss.backward()
    for handle in handles:
        handle.remove()
    module.zero_grad()
    return found or dict(ledger.peak)


@contextmanager
def few_blocks(elements: int) -> Iterator[None]:
    """Limit the head's passes over this many logits to 64 blocks: without data, cache-sized blocks gain nothing."""
    before = row_stats.BLOCK_ELEMENTS
    row_stats.BLOCK_ELEMENTS = max(before, elements // 64)
    try:
        yield
    finally:
        row_stats.BLOCK_ELEMENTS = before


def trunks(module: nn.Module) -> list[nn.Module]:
    """Return the trunks of a policy and of its critic."""
    models = [module.policy, module.critic] if isinstance(module, ActorCritic) else [module]
    return [trunk_of(causal_lm(m.model)) for m in models if isinstance(m, Scorer | Valuer)]


def layers_of(trunk: nn.Module) -> nn.ModuleList:
    """Return the trunk's layers. Raises ModelError where it has no list of layers."""
    lists = [m for m in trunk.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(trunk).__name__} has no list of layers, so its memory cannot be planned")
    return max(lists, key=len)


def _label_hooks(trunk: nn.Module, ledger: Ledger) -> list[Any]:
    inside: list[Any] = []

    def enter(*_: Any) -> None:
        inside.append(ledger.labelled("activations"))
        inside[-1].__enter__()

    def leave(*_: Any) -> None:
        inside.pop().__exit__(None, None, None)

    return [trunk.register_forward_pre_hook(enter), trunk.register_forward_hook(leave)]
