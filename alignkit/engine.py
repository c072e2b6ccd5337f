"""THE loop. `Engine(model=...).run(method=..., data=...)`, or `alignkit.run(...)` for both at once."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from alignkit import assemble, finish, meter, registry, runfolder
from alignkit.alarms import Alarm
from alignkit.config import RunConfig, split
from alignkit.context import StepContext
from alignkit.early import EarlyStop
from alignkit.errors import RewardError, TrainingError
from alignkit.evaluation import evaluate
from alignkit.loading import load_tokenizer
from alignkit.method import Method
from alignkit.online import check_online
from alignkit.packing import batch_of
from alignkit.pipeline import PipelineResult, run_pipeline
from alignkit.progress import Progress
from alignkit.resume import restore, save
from alignkit.roles import check_reference, in_step
from alignkit.sessions import Session
from alignkit.signals import StopSignals
from alignkit.stream import learning_rate, seeded
from alignkit.types import Batch, Example

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run leaves: its last metrics, the model in memory, its tokenizer, and its folder."""

    metrics: dict[str, float]
    model: Any
    tokenizer: Any
    folder: Path


class Engine:
    """Runs methods with shared settings: Engine(model="path", lora=8).run(method="dpo", data="prefs.jsonl", beta=0.2).

    Settings are those of `RunConfig` and of the method; those given to `run` win. Raises AlignkitError on bad input.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def run(self, method: str, **settings: Any) -> Result:
        """Train and return the Result; the folder holds metrics.jsonl, config.yaml and model/."""
        session = Session()
        given = {**self.settings, **settings, "method": method}
        cls = registry.get(method)
        config, method_config = split(given, cls.Config)
        chosen = cls(method_config)
        check_reference(config, chosen)
        check_online(config, chosen)
        tokenizer = load_tokenizer(config)
        rows = assemble.read(config, chosen, tokenizer)
        accelerator = assemble.accelerator_for(config, chosen)
        folder = runfolder.create(config, accelerator)
        config = config.model_copy(update={"name": folder.name})
        written = {**config.describe(), **method_config.model_dump(mode="json")}
        with runfolder.undone(folder, made=not config.resume):
            if accelerator.is_main_process:
                runfolder.write_config(folder, written, config.resume)
            logger.info("run: %s", folder)
            parts = assemble.build(config, chosen, rows, tokenizer, accelerator)
        metrics = Loop(config, chosen, parts, rows, folder, written, session).train()
        model = finish.save_model(parts, config, tokenizer, folder / "model")
        return Result(metrics, model, tokenizer, folder)

    def pipeline(self, stages: Sequence[Mapping[str, Any]], **settings: Any) -> PipelineResult:
        """Run a chain of methods (docs/pipeline.md); `stages` are flat settings, the engine's and these are shared."""
        return run_pipeline(Engine().run, stages, {**self.settings, **settings})


def run(method: str, **settings: Any) -> Result:
    """Short for `Engine(**settings).run(method)`."""
    return Engine(**settings).run(method)


@dataclass
class Loop:
    """One run's training loop over assembled parts."""

    config: RunConfig
    method: Method[Any]
    parts: assemble.Parts
    rows: assemble.Rows
    folder: Path
    written: Mapping[str, Any]
    session: Session
    skipped: int = 0
    evaluated: int = -1
    extra: dict[str, float] = field(default_factory=dict)
    early: EarlyStop = field(default_factory=EarlyStop)
    alarm: Alarm | None = None
    _saved_at: float = field(default_factory=time.monotonic)

    def train(self) -> dict[str, float]:
        """Run all steps that are not done yet; return the last metrics, evaluation included."""
        total = self.parts.stream.total_steps(self.config.epochs, self.config.max_steps)
        done = restore(self) if self.config.resume else 0
        last: dict[str, float] = {}
        with finish.Trackers(self, done, total) as log, StopSignals() as stop:
            with Progress.of_run(total, done, self.parts.accelerator.is_main_process) as shown:
                try:
                    self._evaluate_if_due(done, total, log, shown, last)
                    while done < total and not self.early.ended(self):
                        values, done = self.step(done, total), done + 1
                        if done % self.config.log_every == 0 or done == total:
                            last |= log(done, values, shown)
                        self._evaluate_if_due(done, total, log, shown, last)
                        self._checkpoint(done, stop)
                    if self.early.take_best(self, done) or self.evaluated != done:
                        last |= log(done, evaluate(self, done), shown)
                    return last
                except RewardError as error:
                    raise finish.halted(self, done, error) from error

    def _evaluate_if_due(
        self, done: int, total: int, log: finish.Trackers, shown: Progress | None, last: dict[str, float]
    ) -> None:
        """Evaluate at the start, every `eval_every` steps and at the end, unless that was done before a resumption."""
        every = self.config.eval_every or total
        if self.evaluated == done or (done % every and done != total):
            return
        values = log(done, evaluate(self, done), shown)
        last |= values
        self.early.watch(self, done, values)
        self.evaluated = done

    def step(self, step: int, total: int) -> dict[str, float]:
        """Do one step of the data stream: collect once, then its updates. Returns the metrics of the last update."""
        started = time.perf_counter()
        examples = self.parts.stream[step]
        self.extra = {}
        finish.seed_dropout(self, step)
        ctx = StepContext(self, step, examples, seeded(self.config.seed, 2, step), number=step)
        batch = self.collect(self.shard(examples), ctx)
        rate = self.parts.peak_rate * learning_rate(self.config.schedule, self.config.warmup_fraction, step, total)
        for group in self.parts.optimizer.param_groups:
            group["lr"] = rate * group["rate_scale"]
        for minibatch, share in self._minibatches(batch, ctx):
            values, over = self._update(minibatch, share, step)
            if over:
                break
        self.method.after_update(ctx, values)
        values |= {"lr": rate, "epoch": (step + 1) / self.parts.stream.steps_per_epoch, "skipped": self.skipped}
        return values | self.extra | self.session.took(self.parts, batch.n_tokens, started)

    def _minibatches(self, batch: Batch, ctx: StepContext) -> Iterator[tuple[Batch, float]]:
        ranks, total = self.parts.ranks, len(ctx.step_examples)
        for _ in range(self.config.epochs_per_batch or self.method.epochs_per_batch):
            yield from batch.minibatches(self.config.minibatches, ctx.generator, ranks.own, ranks.n, total)

    def _update(self, minibatch: Batch, share: float, step: int) -> tuple[dict[str, float], bool]:
        """One optimiser step, and whether the batch's other updates are left out; less memory where it runs out.

        Where numbers are not finite, or the method has had enough of this batch, the weights stay as they are.
        """
        while True:
            try:
                values, norm, micros = self._backward(minibatch, share)
                break
            except torch.OutOfMemoryError:
                largest = max(minibatch.cost(i) for i in range(len(minibatch)))
                budget = self.parts.roles.max_tokens // 2
                if budget < largest or self.parts.accelerator.num_processes > 1:
                    raise  # a single tree does not fit, or the other ranks wait in a collective
                self.parts.roles.max_tokens = budget
                self.parts.optimizer.zero_grad()
                logger.warning("out of memory: going on with max_tokens %d, which changes no result", budget)
        over = not (math.isfinite(norm) and math.isfinite(values["loss"]))
        if over:
            self._skip(step, micros, values["loss"], norm)
        elif not (over := self.method.enough(values)):
            self.parts.optimizer.step()
        self.parts.optimizer.zero_grad()
        return {**values, "grad_norm": norm}, over

    def _backward(self, minibatch: Batch, share: float) -> tuple[dict[str, float], float, list[Batch]]:
        """Gradients of one update over all micro-batches and ranks: (metrics, gradient norm, micro-batches)."""
        accelerator, world = self.parts.accelerator, self.parts.ranks.n
        denominators = meter.counts(minibatch, self.parts.ranks.sum, share)
        metrics = meter.Meter()
        metrics.expect(denominators)
        micros = minibatch.micro_batches(self.parts.roles.max_tokens)
        passes = [(micro, weight * share) for micro, weight in in_step(micros, self.parts.ranks.most)]
        for i, (micro, weight) in enumerate(passes):
            last = i == len(passes) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.parts.policy):
                terms = self.method.loss(micro, self.parts.roles)
                term_sums = meter.sums(terms, micro, self.method.name)
                # data parallelism averages over ranks what is a sum here
                accelerator.backward(meter.share(terms, term_sums, denominators) * (weight * world))
            metrics.add(terms, term_sums, weight)
        norm = accelerator.clip_grad_norm_(self.parts.policy.parameters(), self.config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return metrics.means(self.parts.ranks.sum, self.parts.ranks.largest), float(norm), micros

    def shard(self, examples: Sequence[Example], keep: bool = True) -> Batch:
        """This rank's part of the examples, with the reference's log-probabilities where the method uses them."""
        batch = batch_of(self.parts.ranks.share(examples), self.parts.layout, self.parts.accelerator.device)
        if self.parts.reference is None or self.parts.online:
            return batch
        return self.parts.reference.attach(batch, keep)

    def collect(self, batch: Batch, ctx: StepContext) -> Batch:
        """What the method makes of a batch before any update, without gradients."""
        with torch.no_grad():
            return self.method.collect(batch, ctx)

    def _skip(self, step: int, micros: list[Batch], loss: float, norm: float) -> None:
        """Leave the weights as they are, say which rows it was, stop after too many."""
        self.skipped += 1
        what = f"step {step + 1}: loss {loss}, gradient norm {norm}; rows {finish.culprits(self, micros)}"
        logger.warning("%s: the update is skipped", what)
        if self.skipped > self.config.max_skipped_steps:
            raise TrainingError(
                f"{self.skipped} updates were not finite (max_skipped_steps {self.config.max_skipped_steps}), the "
                f"last at {what}. Look at those rows, or lower learning_rate; checkpoints are in {self.folder}"
            )

    def _checkpoint(self, step: int, stop: StopSignals) -> None:
        """Save where it is time, or where a signal or an alarm asks to leave; then leave."""
        accelerator = self.parts.accelerator
        due = time.monotonic() - self._saved_at > 60 * self.config.save_minutes
        asked = [float(due), float(stop.received or 0), float(self.alarm is not None)]
        flags = self.parts.ranks.sum(torch.tensor(asked))  # ranks decide together
        if flags.sum() or (self.config.save_every and step % self.config.save_every == 0):
            save(self, step)
            self._saved_at = time.monotonic()
        if flags[1]:
            if accelerator.is_main_process:
                logger.warning("stopped after step %d; go on with: %s", step, finish.resume_command(self.folder))
            raise SystemExit(128 + (stop.received or 15))
        if flags[2]:
            raise finish.alarmed(self, step)
