"""From settings to everything a loop needs, in the order that finds faults early: settings, rows, tokens, models."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    LoggerType,
    set_seed,
)
from torch import nn

from alignkit import data, tokenise
from alignkit.config import RunConfig
from alignkit.errors import ConfigError, DataError, nearest
from alignkit.logpcache import LogpCache
from alignkit.method import Method
from alignkit.models import Scorer, check_fit, choose_layout, load_model
from alignkit.roles import Reference, Roles, resolve_reference
from alignkit.sharding import shard
from alignkit.stream import Stream, hold_out
from alignkit.types import Example, Layout

logger = logging.getLogger(__name__)

TRACKERS = sorted(kind.value for kind in LoggerType if kind != LoggerType.ALL)


@dataclass(frozen=True)
class Rows:
    """The examples of a run: to train on, held out, and a digest of both."""

    train: list[Example]
    held_out: list[Example]
    digest: str


@dataclass
class Parts:
    """What the loop works with. policy is wrapped for training, plain is the same module without wrappers."""

    accelerator: Accelerator
    plain: Scorer
    policy: nn.Module
    optimizer: Any
    roles: Roles
    reference: Reference | None
    layout: Layout
    stream: Stream
    peak_rate: float


def read(config: RunConfig, method: Method[Any], tokenizer: Any) -> Rows:
    """Read, check and tokenise the rows. Raises DataError with every fault; says what was dropped."""
    train = _examples(config.data, config, method, tokenizer)
    if config.eval_data is not None:
        held_out = _examples(config.eval_data, config, method, tokenizer)
    else:
        train, held_out = hold_out(train, config.eval_fraction, config.seed)
    digest = hashlib.sha256()
    for e in (*train, *held_out):
        for part in (e.prompt, *(t for c in e.completions for t in (c.tokens, c.trained_at))):
            digest.update(len(part).to_bytes(4, "little") + part.numpy().tobytes())
        digest.update(json.dumps(sorted(e.numbers.items())).encode())
    logger.info("%d rows to train on, %d held out", len(train), len(held_out))
    return Rows(train, held_out, digest.hexdigest())


def _examples(source: Any, config: RunConfig, method: Method[Any], tokenizer: Any) -> list[Example]:
    dataset = data.load(source, method.data, config.columns)
    examples, report = tokenise.tokenise(dataset, tokenizer, config.max_prompt_tokens, config.max_completion_tokens)
    report = dataset.report + report
    for line in [dataset.lines()[0], *report.lines()]:
        logger.info(line)
    if not examples:
        raise DataError(f"{dataset.source}: no usable row is left; {'; '.join(report.lines())}")
    return examples


def accelerator_for(config: RunConfig) -> Accelerator:
    """Return the Accelerator of the run: devices, precision, ranks, trackers."""
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    precision = config.precision
    if precision == "auto":
        precision = "fp32" if cpu else "bf16"
    AcceleratorState._reset_state()  # its precision is process-wide, and a process may run more than one method
    if unknown := [t for t in config.trackers if t not in TRACKERS]:
        raise ConfigError(f"no tracker '{unknown[0]}'.{nearest(unknown[0], TRACKERS)} There are {', '.join(TRACKERS)}")
    installed = {str(kind.value) for kind in get_available_trackers()}
    if missing := [t for t in config.trackers if t not in installed]:  # Accelerate would leave it out in silence
        raise ConfigError(f"tracker '{missing[0]}' is not installed; try: pip install {missing[0].replace('_', '-')}")
    return Accelerator(
        cpu=cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=config.trackers or None,
        project_dir=str(config.output),
        kwargs_handlers=[
            # the trunk has no buffers that training changes, and every rank makes its own number of plain passes
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes)),
        ],
    )


def build(config: RunConfig, method: Method[Any], rows: Rows, accelerator: Accelerator) -> Parts:
    """Load the models, ready the reference, wrap for training. Raises ModelError, ConfigError, CacheError."""
    least = max(method.min_batch, accelerator.num_processes)
    min_batch = least * config.minibatches  # a rank with fewer minibatches than the others would be waited for
    if config.batch_size < min_batch:
        raise ConfigError(
            f"batch_size {config.batch_size} is too small: '{method.name}' on {accelerator.num_processes} ranks with "
            f"{config.minibatches} minibatches needs at least {min_batch}"
        )
    if 0 < len(rows.held_out) < least:
        raise DataError(
            f"{len(rows.held_out)} held-out rows are too few: '{method.name}' on {accelerator.num_processes} ranks "
            f"needs at least {least}; raise eval_fraction, give more eval_data, or neither"
        )
    stream = Stream(rows.train, config.batch_size, config.seed, min_batch)
    set_seed(config.seed)  # fresh adapters are drawn
    model, came_with_adapter = load_model(config, accelerator.device)
    plain = Scorer(model, int(config.kept_logits_gib * 2**30)).train()
    check_fit(model, [*rows.train, *rows.held_out], mixes=method.reference_need() == "live")
    with accelerator.autocast():
        layout = choose_layout(plain, rows.train, config, accelerator.device)
    reference = _reference(config, method, plain, layout, accelerator, [*rows.train, *rows.held_out])
    if config.fsdp:
        shard(plain, accelerator.device.type, accelerator.num_processes)
    rate = config.learning_rate
    if rate is None:
        rate = method.lora_learning_rate if config.lora or came_with_adapter else method.learning_rate
    optimizer = torch.optim.AdamW(_groups(plain, config), lr=rate, betas=config.adam_betas, fused=True)
    # sharded already: only its precision is left to set, and no wrapper of data parallelism to put around it
    policy = accelerator.prepare_model(plain, evaluation_mode=config.fsdp)
    prepared = accelerator.prepare_optimizer(optimizer)
    roles = Roles(method, policy, plain, reference, config.max_tokens)
    roles.autocast = accelerator.autocast
    return Parts(accelerator, plain, policy, prepared, roles, reference, layout, stream, rate)


def _reference(
    config: RunConfig,
    method: Method[Any],
    plain: Scorer,
    layout: Layout,
    accelerator: Accelerator,
    examples: Sequence[Example],
) -> Reference | None:
    n_bytes = sum(p.nbytes for p in plain.parameters())
    mode = resolve_reference(config, method, accelerator.device, n_bytes)
    if mode is None:
        return None
    cached = config.reference_cache and method.reference_need() != "moving"
    mixed = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    reference = Reference(
        mode,
        plain,
        layout=layout,
        device=accelerator.device,
        max_tokens=config.max_tokens,
        cache=LogpCache(config.cache_file) if cached else None,
        compute_dtype=mixed or next(plain.parameters()).dtype,
        autocast=accelerator.autocast if mixed else nullcontext,
    )
    logger.info("reference: %s%s", mode, f", cache {reference.cache.path}" if reference.cache else "")
    reference.prepare(examples, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    reference.release()
    return reference


def _groups(module: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Norms and biases are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    rest = [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
