"""A method's loss and metrics over the held-out rows, and early stopping by them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from alignkit.data.stream import chunks, seeded
from alignkit.engine.averages import Averages, counts, term_sums
from alignkit.engine.balance import Balance
from alignkit.engine.state import RunState
from alignkit.engine.step import StepContext
from alignkit.models.passes import in_step
from alignkit.runs import checkpoint

logger = logging.getLogger(__name__)


def evaluate(state: RunState, step: int) -> dict[str, float]:
    """Return the loss and the metrics as "eval/NAME" numbers; empty without held-out rows.

    The samples of a held-out prompt depend on its position among them, so that evaluations can be compared.
    """
    rows, ranks, method = state.splits.held_out, state.parts.ranks, state.method
    if not rows:
        return {}
    averages, logged, offset = Averages(), dict[str, float](), 0
    roles = state.parts.roles
    balance = Balance(state.parts.plain.router, lambda micro: term_sums(method, micro, roles), ranks)
    with evaluating(state.parts.policy, state.dropout):
        for part in chunks(rows, state.config.batch_size, max(method.min_batch, ranks.n)):
            generator = seeded(state.config.seed, 3, offset)
            ctx = StepContext(state, step, part, generator, training=False, offset=offset)
            batch = ctx.collect()
            averages.expect(counts(batch, ranks.sum))
            for micro, weight in in_step(batch.micro_batches(roles.max_tokens), ranks):
                with torch.no_grad():
                    averages.add(balance.measured(micro, weight)[0], weight)
            share = len(part) / len(rows)
            logged |= {k: logged.get(k, 0.0) + share * v for k, v in ctx.logged.items()}
            offset += len(part)
    values = balance.added(averages.means(ranks.sum, ranks.largest)) | logged
    return {f"eval/{name}": value for name, value in values.items()}


@contextmanager
def evaluating(module: nn.Module, dropout: bool) -> Iterator[None]:
    """Switch dropout off where a method trains with it; switch it on again afterwards, even after an error."""
    if not dropout:
        yield
        return
    module.eval()
    try:
        yield
    finally:
        module.train()


def patience_ended(state: RunState) -> bool:
    """Return whether `patience` evaluations in a row were no better than the best one."""
    return state.config.patience is not None and state.early.waited >= state.config.patience


def watch(state: RunState, step: int, values: Mapping[str, float]) -> None:
    """Compare an evaluation with the best so far, and keep the weights where it is better.

    The reward is compared where there is one, else the loss.
    """
    if state.config.patience is None or not values:
        return
    # the loss of a method that samples does not measure progress: it is lowest before the first update
    value = -values["eval/reward/mean"] if "eval/reward/mean" in values else values["eval/loss"]
    if not value < state.early.best:  # also true where it is nan
        state.early.waited += 1
        return
    state.early.best, state.early.best_step, state.early.waited = value, step, 0
    weights = checkpoint.model_state(state.parts.policy)
    checkpoint.save(state.folder / "best", step, {"model": weights}, {}, 1, state.parts.ranks)


def take_best(state: RunState, step: int) -> bool:
    """Load the best weights where they are not those of `step`; return whether they were loaded.

    Raises CheckpointError where they are damaged.
    """
    state.parts.ranks.wait()
    if state.config.patience is None or state.early.best_step in (-1, step):
        return False

    def take(found: checkpoint.Loaded) -> None:
        policy = state.parts.policy
        checkpoint.set_model_state(policy, found.group("model", checkpoint.weight_like(policy)))

    found = checkpoint.load(state.folder / "best", logger.warning, take, state.parts.ranks)
    if found is None:
        return False
    logger.info("restored the weights of step %d, which had the best evaluation", found.step)
    if state.parts.online is not None:
        state.parts.online.ahead.outdated()
    state.early.best_step = step  # the weights after this step are now the best ones
    return True
