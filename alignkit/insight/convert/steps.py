"""Batches, steps, rates, evaluation and checkpoints."""

from __future__ import annotations

import math
from typing import Any

from alignkit.errors import ConfigError
from alignkit.insight.convert.work import Work

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "inverse_sqrt": "inverse-sqrt",
    "warmup_stable_decay": "wsd",
}
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_8bit": "adamw-8bit",
    "adamw_bnb_8bit": "adamw-8bit",
    "paged_adamw_8bit": "paged-adamw-8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}


def batches(work: Work) -> None:
    """Set batch_size, and for methods that sample the group and the updates on a batch."""
    each, accumulated = work.get("per_device_train_batch_size"), work.get("gradient_accumulation_steps")
    sequences = each * work.processes
    if not work.samples:
        work.put("batch_size", sequences * accumulated)
        return
    group, passes = work.get("num_generations"), work.get("num_iterations")
    generated = work.get("steps_per_generation") or accumulated
    if work.has("generation_batch_size"):
        generated = work.get("generation_batch_size") / sequences
    size, parts = sequences * max(generated, accumulated) / group, max(1, generated / accumulated)
    if size % 1 or parts % 1:
        raise ConfigError(
            f"{sequences:g} completions a pass, {accumulated} passes a step and {generated:g} passes a batch do not "
            f"make whole groups of {group}; give --processes, the number of processes of the run"
        )
    work.put("batch_size", int(size))
    work.put("group_size", group)
    if parts > 1:
        work.put("minibatches", int(parts))
    if passes != 1:
        work.put("epochs_per_batch", passes)
    work.updates = int(parts) * passes


def steps(work: Work) -> None:
    """Set how long the run is."""
    epochs, most = work.get("num_train_epochs"), work.get("max_steps")
    if most > 0:
        work.put("max_steps", math.ceil(most / work.updates))
    else:
        work.put("epochs", float(epochs))


def rates(work: Work) -> None:
    """Set the optimiser, its rate, and how it changes."""
    work.same(["learning_rate", "weight_decay", "seed"])
    if (norm := work.get("max_grad_norm")) != 1:
        work.put("max_grad_norm", norm or 0)
    scheduler = str(work.get("lr_scheduler_type"))
    if scheduler in SCHEDULES:
        work.put("schedule", SCHEDULES[scheduler])
    else:
        work.lose("lr_scheduler_type", f"there is no schedule {scheduler}; schedules: {', '.join(SCHEDULES.values())}")
    _warm_up(work, scheduler)
    optim = work.get("optim")
    if optim in OPTIMIZERS and OPTIMIZERS[optim] != "adamw":
        work.put("optimizer", OPTIMIZERS[optim])
    elif optim is not None and optim not in OPTIMIZERS:
        work.lose("optim", f"there is no {optim}; optimizers: {', '.join(dict.fromkeys(OPTIMIZERS.values()))}")
    if work.has("adam_epsilon"):
        work.same(["adam_epsilon"])
    if work.has("adam_beta1", "adam_beta2"):
        first, second = work.get("adam_beta1"), work.get("adam_beta2")
        work.put("adam_betas", [0.9 if first is None else first, 0.999 if second is None else second])


def _warm_up(work: Work, scheduler: str) -> None:
    ratio, count, most = work.get("warmup_ratio"), work.get("warmup_steps"), work.get("max_steps")
    if scheduler == "constant":  # it has none, whatever is set
        work.put("warmup_fraction", 0.0)
    elif count and count >= 1:
        if most > 0:
            work.put("warmup_fraction", min(1.0, count / most))
        else:
            work.lose("warmup_steps", f"set warmup_fraction to {count} / the number of steps; now it is 0.1")
    else:
        work.put("warmup_fraction", float(count or ratio or 0.0))


def logging(work: Work) -> None:
    """Set logging, evaluation and checkpoints; evaluation only where there are held-out rows."""
    if every := _every(work, "logging_steps"):
        work.put("log_every", every)
    strategy = work.get("eval_strategy") or work.get("evaluation_strategy")
    if strategy == "steps" and work.has("eval_steps", "logging_steps") and "eval_data" in work.settings:
        if every := _every(work, "eval_steps" if work.has("eval_steps") else "logging_steps"):
            work.put("eval_every", every)
    elif strategy == "epoch":
        work.lose("eval_strategy", "held-out rows are scored at start and end; set eval_every, in steps, for more")
    elif strategy == "steps" and "eval_data" not in work.settings:
        work.lose("eval_steps", "there are no held-out rows: set eval_data or eval_fraction, then eval_every")
    work.done.add("eval_steps")
    if work.get("save_strategy") in (None, "steps"):
        if every := _every(work, "save_steps"):
            work.put("save_every", every)
    else:
        work.lose("save_strategy", "checkpoints are written every 30 minutes, see save_minutes and save_every")
        work.done.add("save_steps")
    if limit := work.get("save_total_limit"):
        work.put("keep_checkpoints", limit)
    trackers: Any = work.get("report_to")
    if trackers == "all":
        work.lose("report_to")
    elif trackers and trackers != "none":
        work.put("trackers", [trackers] if isinstance(trackers, str) else list(trackers))


def _every(work: Work, name: str) -> int | None:
    """Return a number of our steps, from a number of updates or a fraction of all."""
    value: float | None = work.get(name)
    most = work.get("max_steps")
    if value is None:
        return None
    if value < 1 and most <= 0:
        work.lose(name, "a fraction of all steps; give a number of steps")
        return None
    updates = value * most if value < 1 else value
    return max(1, round(updates / work.updates))
