"""The reference of a run, and the sharding of its models."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from alignkit.config import ReferenceMode, RunConfig
from alignkit.method import Method
from alignkit.models.loading import causal_lm
from alignkit.models.quantised import floating
from alignkit.models.ranks import SINGLE, Ranks
from alignkit.models.scoring import Scorer
from alignkit.models.sharding import mesh_of, ready, shard
from alignkit.models.values import Valuer
from alignkit.reference.choice import resolve_reference
from alignkit.reference.reference import Reference, frozen_copy
from alignkit.reference.run_cache import RunCache
from alignkit.types import Example, Layout

logger = logging.getLogger(__name__)


def shard_models(
    config: RunConfig, method: Method[Any], plain: Scorer | Valuer, trained: Any, ranks: Ranks
) -> Scorer | None:
    """Shard what is trained, and the frozen copy that the reference needs in mode "full", which is returned."""
    mesh = mesh_of(ranks.accelerator.device.type, ranks.n, config.fsdp_replicas)
    frozen = None
    if isinstance(plain, Scorer) and _mode(config, method, plain, ranks.accelerator.device) == "full":
        frozen = frozen_copy(plain)
    for module in (trained, frozen):
        if module is not None:
            shard(module, mesh, _mixed(ranks.accelerator))
            ready(module, ranks.accelerator.device)
    if method.data == "prompts" and config.rollout.local:
        size = sum(p.numel() * p.element_size() for p in plain.parameters()) / 2**30
        logger.info("sampling: each rank gathers the whole policy (%.2f GiB) while it samples", size)
    return frozen


def _mixed(accelerator: Accelerator) -> torch.dtype | None:
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else None


def _mode(config: RunConfig, method: Method[Any], plain: Scorer, device: torch.device) -> ReferenceMode | None:
    return resolve_reference(config, method, device, sum(p.nbytes for p in plain.parameters()))


def reference_of(
    config: RunConfig,
    method: Method[Any],
    plain: Scorer,
    layout: Layout,
    ranks: Ranks,
    examples: Sequence[Example],
    frozen: Scorer | None,
) -> Reference | None:
    """Return the reference with its cache filled by all ranks, None where the method has none. Raises CacheError.

    frozen: the sharded copy of mode "full", from `shard_models`.
    """
    accelerator: Accelerator = ranks.accelerator
    mode = _mode(config, method, plain, accelerator.device)
    if mode is None:
        return None
    if frozen is not None:
        chosen = causal_lm(plain.model).config._attn_implementation  # by the probe of the layout
        if causal_lm(frozen.model).config._attn_implementation != chosen:
            causal_lm(frozen.model).set_attn_implementation(chosen)
    sampled = method.data == "prompts"  # no other run will score the same completions
    cached = config.caches_reference and method.reference_need() != "moving" and not sampled
    mixed = _mixed(accelerator)
    reference = Reference(
        mode,
        plain,
        layout=layout,
        device=accelerator.device,
        max_tokens=config.max_tokens,
        cache=RunCache(config.cache_file) if cached else None,
        compute_dtype=mixed or floating(plain),
        autocast=accelerator.autocast if mixed else nullcontext,
        temperature=config.sampling.temperature if sampled else 1.0,
        frozen=frozen,
        ranks=ranks if config.fsdp else SINGLE,
    )
    logger.info("reference: %s%s", mode, f", cache {reference.cache.path}" if reference.cache else "")
    reference.prepare(examples, accelerator.process_index, accelerator.num_processes)
    ranks.wait()
    if (there := int(os.environ.get("LOCAL_WORLD_SIZE", ranks.n))) < ranks.n:
        # several nodes: a cache on a node's own disk lacks the rows of the others
        reference.prepare(examples, accelerator.local_process_index, there)
        ranks.wait()
    if mode == "cached" and reference.cache and ranks.most(int(not reference.cache.stores)):
        reference.prepare(examples)  # a rank could not store its share, so that the others cannot read it
    reference.release()
    return reference
