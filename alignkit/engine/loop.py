"""THE loop: steps, their updates, and evaluations, logs and checkpoints between them."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor

from alignkit.data.stream import seed_of, seeded
from alignkit.engine.averages import Averages, counts, term_sums
from alignkit.engine.balance import Balance
from alignkit.engine.ending import alarmed, halted
from alignkit.engine.evaluation import evaluate, patience_ended, take_best, watch
from alignkit.engine.optimizers import rate_factor
from alignkit.engine.saving import restore, save, save_last
from alignkit.engine.state import RunState
from alignkit.engine.step import StepContext
from alignkit.errors import CacheError, DataError, PluginError, RewardError, RolloutError, TrainingError
from alignkit.models.passes import halved, in_step, least_tokens
from alignkit.rewards.limits import STOP
from alignkit.runs.folder import resume_command
from alignkit.runs.log import RunLog
from alignkit.runs.progress import Progress, StopSignals
from alignkit.runs.sessions import Session, environment, facts
from alignkit.runs.space import logging_to
from alignkit.types import Batch

logger = logging.getLogger(__name__)


class Loop:
    """The training loop of a run whose state is built; `train` runs all steps, `step` one."""

    def __init__(self, state: RunState, session: Session) -> None:
        self.state, self.session, self._moved = state, session, False  # _moved: by an update of a step not done

    def train(self) -> dict[str, float]:
        """Run all steps that are not done yet; return the last metrics, evaluation included."""
        state, total = self.state, self.state.total_steps
        done = restore(state) if state.config.resume else 0
        STOP.forget()
        last: dict[str, float] = {}
        with logging_to(state.folder), self._opened(done, total) as log, StopSignals(STOP.now) as stop:
            try:
                last |= self._evaluate_if_due(done, total, log)
                while done < total and not patience_ended(state):
                    values, done = self.step(done, total), done + 1
                    if done % state.config.log_every == 0 or done == total:
                        last |= log.write(done, values)
                    last |= self._evaluate_if_due(done, total, log)
                    self._checkpoint(done, stop, log)
                changed = take_best(state, done)
                if changed or state.evaluated != done:
                    last |= log.write(done, evaluate(state, done))
                    state.evaluated = done
                if changed or state.saved != done:
                    save_last(state, done)
                return last
            except (RewardError, RolloutError, DataError, CacheError, PluginError, RuntimeError) as error:
                # before the signals that torchrun then sends are in force again
                if (told := state.parts.ranks.explained(error)) is not error:
                    raise told from error
                if isinstance(error, RuntimeError) or (isinstance(error, CacheError) and state.parts.ranks.n > 1):
                    raise
                raise halted(state, done, error, self._moved, stop) from error.__cause__

    @contextlib.contextmanager
    def _opened(self, done: int, total: int) -> Iterator[RunLog]:
        """Open the files that are written while the loop runs: the log, the completions, this session's entry."""
        state, parts = self.state, self.state.parts
        with contextlib.ExitStack() as stack:
            shown = stack.enter_context(Progress.of_run(total, done, parts.ranks.is_main and not state.config.quiet))
            place, at = (state.folder, state.written, parts.accelerator), (done, total, state.evaluated)
            log = RunLog(*place, *at, shown, state.callbacks)
            if parts.online:
                parts.online.open(state.folder, done, state.evaluated)
                stack.callback(parts.online.close)
            stack.enter_context(self.session)
            stack.enter_context(log)
            if parts.ranks.is_main:
                cache = parts.reference.cache if parts.reference else None
                self.session.open(state.folder, done, environment(parts.accelerator), self._facts(), cache)
            yield log

    def _evaluate_if_due(self, done: int, total: int, log: RunLog) -> dict[str, float]:
        """Evaluate at the start, every `eval_every` steps and at the end, unless that was done before a resumption."""
        state = self.state
        if state.evaluated == done or (done % (state.config.eval_every or total) and done != total):
            return {}
        values = log.write(done, evaluate(state, done))
        watch(state, done, values)
        state.evaluated = done
        return values

    def step(self, step: int, total: int) -> dict[str, float]:
        """Do one step of the data stream: collect once, then its updates. Returns the metrics of the last update."""
        started, state, parts = time.perf_counter(), self.state, self.state.parts
        config, ranks = state.config, parts.ranks
        ranks.step = step + 1
        if state.dropout:  # seeded by step and rank, so that no rank's generator has to be restored
            torch.manual_seed(seed_of(config.seed, 8, step * ranks.n + ranks.own))
        ctx = StepContext(state, step, parts.stream[step], seeded(config.seed, 2, step), number=step)
        batch = ctx.collect()
        rate = parts.peak_rate * rate_factor(config, state.method, step, total)
        for group in parts.optimizer.param_groups:
            group["lr"] = rate * group["rate_scale"]
        for minibatch, weight in self._minibatches(batch, ctx):
            values, stop = self._update(minibatch, weight, step)
            if stop:
                break
        state.method.after_update(ctx, values | ctx.logged)
        self._moved = False
        values |= {"lr": rate, "skipped": state.skipped, **parts.stream.metrics(step, ctx.step_examples)}
        return values | ctx.logged | self._speed(batch.n_tokens, started)

    def _minibatches(self, batch: Batch, ctx: StepContext) -> Iterator[tuple[Batch, float]]:
        config, ranks, total = self.state.config, self.state.parts.ranks, len(ctx.step_examples)
        for _ in range(config.epochs_per_batch or self.state.method.epochs_per_batch):
            yield from batch.minibatches(config.minibatches, ctx.generator, ranks.own, ranks.n, total)

    def _update(self, minibatch: Batch, weight: float, step: int) -> tuple[dict[str, float], bool]:
        """Do one optimiser step; return its metrics and whether the batch's other updates are skipped.

        Where numbers are not finite, or the method ends the batch, the weights do not change.
        """
        parts, roles = self.state.parts, self.state.parts.roles

        def attempt(max_tokens: int) -> tuple[dict[str, float], float, list[Batch]]:
            parts.optimizer.zero_grad()
            return self._backward(minibatch, weight, minibatch.micro_batches(max_tokens))

        least = least_tokens(minibatch, roles.max_tokens, parts.ranks)
        (values, norm, micros), roles.max_tokens = halved(attempt, roles.max_tokens, least, "max_tokens %d")
        finite = math.isfinite(norm) and math.isfinite(values["loss"])
        stop = not finite or self.state.method.enough(values)
        if not finite:
            self._skip(step, micros, values["loss"], norm)
        elif not stop:
            if not self._moved and parts.online:
                parts.online.ahead.keep_weights(step)
            self._moved = True
            parts.optimizer.step()
        parts.optimizer.zero_grad()
        return {**values, "grad_norm": norm}, stop

    def _backward(
        self, minibatch: Batch, weight: float, micros: list[Batch]
    ) -> tuple[dict[str, float], float, list[Batch]]:
        """Compute the gradients of one update on all ranks; return (metrics, gradient norm, micro-batches)."""
        state, parts = self.state, self.state.parts
        accelerator, ranks = parts.accelerator, parts.ranks
        denominators = counts(minibatch, ranks.sum, weight)
        averages = Averages()
        averages.expect(denominators)
        passes = list(in_step(micros, ranks))
        balance = Balance(parts.plain.router, lambda micro: term_sums(state.method, micro, parts.roles), ranks)
        balance.look_ahead(passes, weight)
        for i, (micro, counted) in enumerate(passes):
            last = i == len(passes) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(parts.policy):
                summed, routing = balance.measured(micro, counted * weight)
                loss = summed.loss_share(denominators) + balance.share(routing, only=len(passes) == 1)
                # times the number of ranks: data parallelism averages gradients over ranks, here they must be summed
                accelerator.backward(loss * (counted * weight * ranks.n))
            averages.add(summed, counted * weight)
        limit = state.config.max_grad_norm or math.inf  # at infinity the gradients stay, and the norm is measured
        norm = accelerator.clip_grad_norm_(parts.policy.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return balance.added(averages.means(ranks.sum, ranks.largest)), float(norm), micros

    def _speed(self, n_tokens: int, started: float) -> dict[str, float]:
        """Count the step into the session and return its metrics of speed; every rank calls it."""
        parts, seconds = self.state.parts, time.perf_counter() - started
        tokens = parts.ranks.sum(torch.tensor([float(n_tokens)])).item()
        self.session.count_step(tokens)
        return {"tokens_per_second": tokens / seconds, **(parts.online.took(seconds) if parts.online else {})}

    def _skip(self, step: int, micros: list[Batch], loss: float, norm: float) -> None:
        """Count an update that is not finite, and name its rows. Raises TrainingError after too many."""
        state = self.state
        state.skipped += 1
        what = f"step {step + 1}: loss {loss}, gradient norm {norm}; rows {self._culprits(micros)}"
        logger.warning("%s: the update is skipped", what)
        if state.skipped > state.config.max_skipped_steps:
            raise TrainingError(
                f"{state.skipped} updates were not finite (max_skipped_steps {state.config.max_skipped_steps}), the "
                f"last at {what}. Look at those rows, or lower learning_rate; checkpoints are in {state.folder}"
            )

    def _culprits(self, micros: list[Batch]) -> str:
        """Return the rows whose own loss is not finite, or all rows of the step where only the gradient is not."""
        parts, bad = self.state.parts, list[int]()
        ones = [micro.select([i]) for micro in micros for i in range(len(micro))]
        for one, counted in in_step(ones, parts.ranks):
            with torch.no_grad():
                summed = term_sums(self.state.method, one, parts.roles)
            if counted and not all(bool(summed.sums[n].isfinite()) for n, t in summed.terms.items() if t.coef):
                bad.append(one.examples[0].row)
        rows = parts.ranks.all_of(bad) or parts.ranks.all_of([one.examples[0].row for one in ones])
        return ", ".join(str(r) for r in rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")

    def _checkpoint(self, step: int, stop: StopSignals, log: RunLog) -> None:
        """Save where a checkpoint is due, or where a signal or an alarm ends the run; then end it."""
        state, config = self.state, self.state.config
        due = time.monotonic() - state.saved_at > 60 * config.save_minutes
        asked = [float(due), float(stop.received or 0), float(log.alarm is not None)]
        flags = state.parts.ranks.sum(torch.tensor(asked))  # ranks decide together
        if flags.sum() or (config.save_every and step % config.save_every == 0):
            save(state, step)
        if flags[1]:
            if state.parts.ranks.is_main:
                logger.warning("stopped after step %d; continue with: %s", step, resume_command(state.folder))
            raise SystemExit(128 + (stop.received or 15))
        if flags[2]:
            raise alarmed(self.state, step, log)

    def _facts(self) -> dict[str, object]:
        state, parts = self.state, self.state.parts
        return facts(
            state.config,
            parts.plain,
            parts.reference,
            parts.peak_rate,
            None if state.splits.streamed else len(state.splits.train),
            len(state.splits.held_out),
        )
