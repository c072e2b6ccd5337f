"""Build everything that the loop needs from settings and examples, in an order that finds errors early."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    LoggerType,
    set_seed,
)

from alignkit.config import RunConfig
from alignkit.data.stream import Stream
from alignkit.data.views import Selected
from alignkit.engine.ahead import Ahead
from alignkit.engine.gathering import gathered_weights
from alignkit.engine.optimizers import build_optimizer
from alignkit.engine.references import reference_of, shard_models
from alignkit.engine.roles import Roles
from alignkit.engine.rollouts import Online
from alignkit.engine.scorers import Scorers
from alignkit.engine.state import Parts, Splits
from alignkit.environments.build import episodes
from alignkit.errors import ConfigError, DataError, nearest
from alignkit.method import Method
from alignkit.models.adapters import Kind, set_adapter_dropout
from alignkit.models.critic import with_critic
from alignkit.models.dropout import drop_dropout
from alignkit.models.layouts import check_fit, choose_layout
from alignkit.models.loading import causal_lm, load_model, on_cpu
from alignkit.models.ranks import Ranks
from alignkit.models.scoring import Scorer
from alignkit.models.sharding import gathered
from alignkit.models.values import Valuer
from alignkit.rollout import Setup
from alignkit.rollout.backends import build_sampler
from alignkit.rollout.completions import with_placeholders
from alignkit.rollout.own_servers import OwnServers
from alignkit.rollout.sampling import ends_of
from alignkit.types import Example, Layout

logger = logging.getLogger(__name__)

TRACKERS = sorted(kind.value for kind in LoggerType if kind != LoggerType.ALL)


def accelerator_for(config: RunConfig, method: Method[Any]) -> Accelerator:
    """Return the Accelerator of the run: devices, precision, ranks, trackers."""
    cpu, precision = on_cpu(config), config.precision
    if precision == "auto":
        precision = "fp32" if cpu else "bf16"
    forget_precision()
    if unknown := [t for t in config.trackers if t not in TRACKERS]:
        raise ConfigError(
            f"no tracker is called '{unknown[0]}'.{nearest(unknown[0], TRACKERS)} Trackers: {', '.join(TRACKERS)}"
        )
    installed = {str(kind.value) for kind in get_available_trackers()}
    if missing := [t for t in config.trackers if t not in installed]:  # Accelerate would silently ignore it
        raise ConfigError(f"tracker '{missing[0]}' is not installed; try: pip install {missing[0].replace('_', '-')}")
    return Accelerator(
        cpu=cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=config.trackers or None,
        project_dir=str(config.output),
        kwargs_handlers=[
            # buffers: training changes none, and ranks make different numbers of passes outside the wrapper.
            # unused parameters: during a critic's warm-up the policy has no gradient.
            # bucket view: keeps one copy of the gradients instead of two
            DistributedDataParallelKwargs(
                broadcast_buffers=False, find_unused_parameters="critic" in method.roles(), gradient_as_bucket_view=True
            ),
            InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes)),
            # each weight is read once a pass: kept until its end, the copies in 16 bits are a second model, which
            # gradient checkpointing and FSDP2 are there to avoid
            AutocastKwargs(cache_enabled=False),
        ],
    )


def forget_precision() -> None:
    """Let the next Accelerator set its own precision: Accelerate keeps one for the whole process."""
    AcceleratorState._reset_state()  # Accelerate has no public function for this


def build(
    config: RunConfig, method: Method[Any], splits: Splits, tokenizer: Any, ranks: Ranks, own: OwnServers | None = None
) -> Parts:
    """Load the models, prepare the reference, wrap for training. Raises ModelError, ConfigError, CacheError.

    own: the run's servers, which start meanwhile.
    """
    accelerator: Accelerator = ranks.accelerator
    device = accelerator.device
    least = least_examples(config, method, splits, ranks.n)
    stream = splits.streamed or Stream(splits.train, config.batch_size, config.seed, least, splits.weights)
    for line in stream.lines():
        logger.info(line)
    set_seed(config.seed)  # new adapters are initialised at random
    scorers = Scorers.of_run(config, method, splits.both, device, ranks)
    plain, came_with_adapter = _trained_model(config, method, device)
    trained: Any = plain
    if "critic" in method.roles():
        folder = scorers.rewards.model_folder if scorers and scorers.rewards else None
        trained = with_critic(plain, config, folder, device)
    frozen = shard_models(config, method, plain, trained, ranks) if config.fsdp else None
    known, layout = _layout(config, method, splits, plain, accelerator)
    reference = reference_of(config, method, plain, layout, ranks, known, frozen) if isinstance(plain, Scorer) else None
    drop_dropout(plain.model, method.dropout())
    if config.lora:
        set_adapter_dropout(plain.model, config.lora.dropout)
    rate = config.learning_rate
    if rate is None:
        rate = method.lora_learning_rate if config.lora or came_with_adapter else method.learning_rate
    optimizer = build_optimizer(trained, config, rate)
    # evaluation_mode: a sharded module needs its precision set, but no data-parallel wrapper
    policy = accelerator.prepare_model(trained, evaluation_mode=config.fsdp)
    prepared = accelerator.prepare_optimizer(optimizer)
    temperature = config.sampling.temperature if scorers else 1.0
    roles = Roles(method, policy, trained, reference, config.max_tokens, temperature, ranks, accelerator.autocast)
    online = None
    if scorers:
        updates = (config.epochs_per_batch or method.epochs_per_batch) * config.minibatches
        assert isinstance(plain, Scorer)
        rollout = own.ready(config.rollout) if own else config.rollout
        setup = Setup(
            plain.model, tokenizer, ends_of(causal_lm(plain.model), tokenizer), rollout,
            config.output / (config.name or ""), ranks, accelerator.autocast, plain, own, gathered_weights,
        )  # fmt: skip
        sampler = episodes(build_sampler(setup), config, tokenizer, setup.ends, ranks)
        ahead = Ahead(sampler, plain.model, policy, config.rollout.ahead, ranks)
        online = Online(config, method.roles(), scorers, setup, reference, updates, ahead)
    eos = int(tokenizer.eos_token_id)
    return Parts(accelerator, ranks, plain, policy, prepared, roles, reference, online, layout, stream, rate, eos)


def _trained_model(config: RunConfig, method: Method[Any], device: torch.device) -> tuple[Scorer | Valuer, bool]:
    """Load the trained model; return it and whether it came with an adapter."""
    kind: Kind = "classifier" if "reward" in method.trains else "causal"
    model, came_with_adapter = load_model(config, device, kind)
    for name, value in method.model_settings().items():
        setattr(causal_lm(model).config, name, value)
    if kind == "classifier":
        return Valuer(model), came_with_adapter
    return Scorer(model, int(config.kept_logits_gib * 2**30)), came_with_adapter


def _layout(
    config: RunConfig, method: Method[Any], splits: Splits, plain: Scorer | Valuer, accelerator: Accelerator
) -> tuple[Sequence[Example], Layout]:
    """Check that the examples fit the model; return them at their longest, and the layout that the probe chose."""
    every = splits.both
    known: Sequence[Example] = Selected(every, range(len(every)), method.longest)
    longest = None
    if method.data == "prompts":
        longest = config.longest_completion
        known = with_placeholders(known, longest)
    mixes = method.reference_need() == "live" and longest is None
    limit = "environment.max_tokens" if config.environment else "sampling.max_new_tokens"
    fits = partial(check_fit, plain.model, longest=longest, mixes=mixes, sampled=limit)
    fits(known)
    if splits.streamed is not None:
        splits.streamed.check = lambda examples: fits([method.longest(e) for e in examples])
    with gathered(plain, blocks=False), accelerator.autocast():  # the model's own forward is a part of it
        return known, choose_layout(plain.train(), known[: len(splits.train)], config, accelerator.device)


def least_examples(config: RunConfig, method: Method[Any], splits: Splits, n_ranks: int) -> int:
    """Return the number of examples that a step needs. Raises ConfigError or DataError where the run has fewer."""
    least = max(method.min_batch, n_ranks)
    if config.batch_size < least:
        raise ConfigError(
            f"batch_size {config.batch_size} is too small: '{method.name}' on {_ranks(n_ranks)} needs at least {least}"
        )
    if config.patience is not None and not splits.held_out:
        raise ConfigError("patience needs held-out rows, but there are none; set eval_data or eval_fraction")
    if 0 < len(splits.held_out) < least:
        raise DataError(
            f"{len(splits.held_out)} held-out rows are too few: '{method.name}' on {_ranks(n_ranks)} "
            f"needs at least {least}; raise eval_fraction, add rows to eval_data, or set neither"
        )
    return least


def _ranks(n: int) -> str:
    return f"{n} rank{'s' * (n > 1)}"
