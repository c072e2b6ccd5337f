"""What a run leaves behind: metrics, tracker entries, the model, and words about rows that broke a step."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from alignkit import card, meter
from alignkit.alarms import RunView
from alignkit.chat import turn_end
from alignkit.config import RunConfig
from alignkit.errors import AlarmError, AlignkitError, RewardError
from alignkit.listeners import Listeners
from alignkit.loading import causal_lm
from alignkit.progress import Progress
from alignkit.resume import save
from alignkit.roles import in_step
from alignkit.runfolder import StepLines, of_training
from alignkit.stream import seed_of

if TYPE_CHECKING:
    from alignkit.assemble import Parts
    from alignkit.engine import Loop
    from alignkit.types import Batch

logger = logging.getLogger(__name__)


class Trackers:
    """metrics.jsonl, Accelerate's trackers and the listeners, open while a loop runs; the main process alone writes."""

    def __init__(self, loop: Loop, done: int, total: int) -> None:
        self._loop, self._done, self._total = loop, done, total
        self._file: StepLines | None = None
        self._listeners: Listeners | None = None

    def __enter__(self) -> Trackers:
        loop = self._loop
        if loop.parts.accelerator.is_main_process:
            self._file = StepLines(loop.folder / "metrics.jsonl", self._done, loop.evaluated)
        if loop.config.trackers:
            flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in loop.written.items()}
            loop.parts.accelerator.init_trackers(loop.folder.name, flat)
        if loop.parts.online:
            loop.parts.online.open(loop.folder, self._done, loop.evaluated, loop.parts.ranks.own)
        if loop.parts.accelerator.is_main_process:
            run = RunView(loop.folder, MappingProxyType(dict(loop.written)), self._total)
            self._listeners = Listeners(run, self._done, loop.evaluated)
            loop.session.open(loop, self._done)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for one in (self._file, self._listeners):
            if one:
                one.close()
        self._loop.session.close(kind)
        if self._loop.parts.online:
            self._loop.parts.online.close()
        if self._loop.config.trackers:
            self._loop.parts.accelerator.end_training()

    def __call__(self, step: int, values: Mapping[str, float], shown: Progress | None) -> dict[str, float]:
        """Write one step's values, and what listeners say of them, and return both; of no values nothing is written."""
        if values and self._listeners:
            alarms = self._listeners.hear(step, values)
            values = {**values, **{f"alarm/{alarm.name}": alarm.value for alarm in alarms}}
            # the first that ends the run; the loop asks at the end of the step, together with all ranks
            ends = (alarm for alarm in alarms if alarm.name in self._loop.config.stop_on)
            self._loop.alarm = self._loop.alarm or next(ends, None)
        if values and self._file:
            # JSON has no nan: a step that was skipped is written with null
            self._file.write(step, {k: v if math.isfinite(v) else None for k, v in values.items()})
        if values and self._loop.config.trackers:
            self._loop.parts.accelerator.log(dict(values), step=step)
        if values and shown:
            shown.step(step, values, always=not of_training(values))
        return dict(values)


@contextmanager
def evaluating(module: nn.Module, dropout: float) -> Iterator[None]:
    """Evaluate without dropout, where a method trains with it."""
    if dropout:
        module.eval()
    yield
    if dropout:
        module.train()


def seed_dropout(loop: Loop, step: int) -> None:
    """Have dropout drawn by step and rank, so that no rank's state has to be resumed."""
    if loop.method.dropout():
        torch.manual_seed(seed_of(loop.config.seed, 8, step * loop.parts.ranks.n + loop.parts.ranks.own))


def culprits(loop: Loop, micros: list[Batch]) -> str:
    """Name the rows whose own loss is not finite, or all rows of the step where only the gradient was not."""
    bad: list[int] = []
    ones = [micro.select([i]) for micro in micros for i in range(len(micro))]
    for one, weight in in_step(ones, loop.parts.roles.most):
        with torch.no_grad():
            terms = loop.method.loss(one, loop.parts.roles)
        term_sums = meter.sums(terms, one, loop.method.name)
        if weight and not all(bool(term_sums[n].isfinite()) for n, t in terms.items() if t.coef):
            bad.append(one.examples[0].row)
    ranks = loop.parts.ranks
    rows = ranks.all_of(bad) or ranks.all_of([one.examples[0].row for one in ones])
    return ", ".join(str(r) for r in rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


def save_model(parts: Parts, config: RunConfig, tokenizer: Any, folder: Path) -> Any:
    """Write the model (an adapter alone, unless it is merged) and its tokenizer in the Hugging Face format.

    Written under a temporary name and renamed, so that `folder` is whole or absent. Returns the model.
    """
    model = parts.plain.model
    causal_lm(model).config.use_cache = True
    _name_turn_end(model, tokenizer)
    state = None
    if config.fsdp:
        state = get_model_state_dict(parts.policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        state = {k.removeprefix("model."): v for k, v in state.items()}
    if config.merge_adapter:
        model = model.merge_and_unload()  # type: ignore[operator]
    if parts.accelerator.is_main_process:
        temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
        model.save_pretrained(temporary, state_dict=state)  # type: ignore[operator]
        tokenizer.save_pretrained(temporary)
        try:
            card.write(temporary, folder.parent)
        except (AlignkitError, OSError) as error:  # a model is worth more than its card
            logger.warning("no model card is written: %s", error)
        before = folder.with_name(f".{folder.name}-before-{os.getpid()}")
        if folder.exists():
            folder.rename(before)
        temporary.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    parts.accelerator.wait_for_everyone()
    return model


def _name_turn_end(model: Any, tokenizer: Any) -> None:
    # who generates with the saved model has to stop where the template's answers end
    settings, end = getattr(causal_lm(model), "generation_config", None), turn_end(tokenizer)
    if settings is not None and end is not None and end != tokenizer.eos_token_id:
        settings.eos_token_id = [tokenizer.eos_token_id, end]


def halted(loop: Loop, done: int, error: RewardError) -> RewardError:
    """Save what a step that could not be scored was begun with, so that nothing is lost; return the error to raise."""
    if done:
        save(loop, done)
    return RewardError(f"{error}\nStopped after step {done}; go on with: {resume_command(loop.folder)}")


def alarmed(loop: Loop, done: int) -> AlarmError:
    """Return the error of a run that an alarm of `stop_on` ends; its checkpoint is written."""
    said = "an alarm of stop_on ended the run; rank 0 says which"
    if loop.alarm:
        said = f"alarm {loop.alarm.name} ended the run (stop_on): {loop.alarm.message}. {loop.alarm.remedy}"
    return AlarmError(f"{said}\nStopped after step {done}; go on all the same with: {resume_command(loop.folder)}")


def resume_command(folder: Path) -> str:
    """Return what to type to go on with the run in `folder`."""
    return f"alignkit run {folder / 'config.yaml'} --resume"
