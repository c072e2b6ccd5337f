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
from alignkit.critic import with_critic
from alignkit.errors import ConfigError, DataError, nearest
from alignkit.layouts import check_fit, choose_layout
from alignkit.loading import Kind, causal_lm, drop_dropout, load_model
from alignkit.logpcache import LogpCache
from alignkit.method import Method
from alignkit.models import Scorer
from alignkit.online import Online, stand_ins
from alignkit.ranks import Ranks
from alignkit.roles import Reference, Roles, resolve_reference
from alignkit.scalars import ActorCritic, Valuer
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
    """What the loop works with.

    plain: what is trained and saved, without wrappers. policy: the same (with the critic, where there is one), wrapped
    for training. online: of a method that samples.
    """

    accelerator: Accelerator
    ranks: Ranks
    plain: Scorer | Valuer
    policy: nn.Module
    optimizer: Any
    roles: Roles
    reference: Reference | None
    online: Online | None
    layout: Layout
    stream: Stream
    peak_rate: float
    eos: int

    @property
    def model(self) -> Any:
        """The trained model itself: transformers', or peft's around it."""
        return self.plain.model


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
        digest.update(json.dumps(e.columns, sort_keys=True, default=str).encode())
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


def accelerator_for(config: RunConfig, method: Method[Any]) -> Accelerator:
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
            # while a critic warms up, the policy gets no gradient; gradients live in the buckets that they travel in
            DistributedDataParallelKwargs(
                broadcast_buffers=False, find_unused_parameters="critic" in method.roles(), gradient_as_bucket_view=True
            ),
            InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes)),
        ],
    )


def build(config: RunConfig, method: Method[Any], rows: Rows, tokenizer: Any, accelerator: Accelerator) -> Parts:
    """Load the models, ready the reference, wrap for training. Raises ModelError, ConfigError, CacheError."""
    least = least_examples(config, method, rows, accelerator.num_processes)
    stream = Stream(rows.train, config.batch_size, config.seed, least)
    set_seed(config.seed)  # fresh adapters are drawn
    online = Online.of_run(config, method, tokenizer, [*rows.train, *rows.held_out], accelerator.device)
    kind: Kind = "classifier" if "reward" in method.trains else "causal"
    model, came_with_adapter = load_model(config, accelerator.device, kind)
    for name, value in method.model_settings().items():
        setattr(causal_lm(model).config, name, value)
    if kind == "classifier":  # who pads with EOS would look for an answer's last token before it
        causal_lm(model).config.pad_token_id = _pad(tokenizer)
    plain = Valuer(model) if kind == "classifier" else Scorer(model, int(config.kept_logits_gib * 2**30))
    known = [method.longest(e) for e in (*rows.train, *rows.held_out)]
    if online:
        known = stand_ins(known, config.sampling.max_new_tokens)
    longest = config.sampling.max_new_tokens if online else None
    check_fit(model, known, longest, mixes=method.reference_need() == "live" and not online)
    with accelerator.autocast():
        layout = choose_layout(plain.train(), known[: len(rows.train)], config, accelerator.device)
    reference = _reference(config, method, plain, layout, accelerator, known) if isinstance(plain, Scorer) else None
    drop_dropout(model, method.dropout())
    if config.fsdp:
        shard(plain, accelerator.device.type, accelerator.num_processes)
    rate = config.learning_rate
    if rate is None:
        rate = method.lora_learning_rate if config.lora or came_with_adapter else method.learning_rate
    trained = with_critic(plain, config, online, accelerator.device) if "critic" in method.roles() else plain
    optimizer = torch.optim.AdamW(_groups(trained, config, rate), lr=rate, betas=config.adam_betas, fused=True)
    # sharded already: only its precision is left to set, and no wrapper of data parallelism to put around it
    policy = accelerator.prepare_model(trained, evaluation_mode=config.fsdp)
    prepared = accelerator.prepare_optimizer(optimizer)
    temperature = config.sampling.temperature if online else 1.0
    roles = Roles(method, policy, trained, reference, config.max_tokens, temperature)
    ranks, eos = Ranks(accelerator), int(tokenizer.eos_token_id)
    roles.autocast = accelerator.autocast
    if ranks.n > 1:
        roles.most = ranks.most
    return Parts(accelerator, ranks, plain, policy, prepared, roles, reference, online, layout, stream, rate, eos)


def least_examples(config: RunConfig, method: Method[Any], rows: Rows, n_ranks: int) -> int:
    """Return how many examples a step needs. Raises ConfigError or DataError where the run cannot have them."""
    least = max(method.min_batch, n_ranks)
    if config.batch_size < least:
        raise ConfigError(
            f"batch_size {config.batch_size} is too small: '{method.name}' on {_ranks(n_ranks)} needs at least {least}"
        )
    if config.patience is not None and not rows.held_out:
        raise ConfigError("patience watches held-out rows, and there are none; give eval_data or eval_fraction")
    if 0 < len(rows.held_out) < least:
        raise DataError(
            f"{len(rows.held_out)} held-out rows are too few: '{method.name}' on {_ranks(n_ranks)} "
            f"needs at least {least}; raise eval_fraction, give more eval_data, or neither"
        )
    return least


def _ranks(n: int) -> str:
    return f"{n} rank{'s' * (n > 1)}"


def _pad(tokenizer: Any) -> int | None:
    pad = tokenizer.pad_token_id
    return None if pad == tokenizer.eos_token_id else pad


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
    sampled = method.data == "prompts"  # nobody will meet those completions again
    cached = config.reference_cache and method.reference_need() != "moving" and not sampled
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
        temperature=config.sampling.temperature if sampled else 1.0,
    )
    logger.info("reference: %s%s", mode, f", cache {reference.cache.path}" if reference.cache else "")
    reference.prepare(examples, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    reference.release()
    return reference


def _groups(module: nn.Module, config: RunConfig, rate: float) -> list[dict[str, Any]]:
    """Norms and biases are not decayed; the critic may have a rate of its own, kept as a multiple of the policy's."""
    critic = {id(p) for p in module.critic.parameters()} if isinstance(module, ActorCritic) else set()
    groups = []
    for of_critic in (False, True):
        trained = [p for p in module.parameters() if p.requires_grad and (id(p) in critic) == of_critic]
        scale = (config.critic_learning_rate or rate) / rate if of_critic else 1.0
        for decay, params in (
            (config.weight_decay, [p for p in trained if p.dim() >= 2]),
            (0.0, [p for p in trained if p.dim() < 2]),
        ):
            groups.append({"params": params, "weight_decay": decay, "rate_scale": scale})
    return [g for g in groups if g["params"]]
