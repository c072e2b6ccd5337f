"""A plan of a run, from its settings, its rows and the configurations of its models alone."""

from __future__ import annotations

import importlib
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from alignkit import registry
from alignkit.config import RunConfig, split
from alignkit.data.stream import Stream
from alignkit.engine import assemble, reading
from alignkit.errors import ConfigError
from alignkit.insight.plan.experts import Experts, experts_of
from alignkit.insight.plan.memory import Memory, Work, memory
from alignkit.insight.plan.remedies import Remedy, find_remedies
from alignkit.insight.plan.server_memory import Servers, servers_of
from alignkit.method import Method
from alignkit.models.adapters import has_start
from alignkit.models.branches import BRANCHES
from alignkit.models.layouts import DENSE_ROW_TOKENS
from alignkit.models.loading import DTYPES, causal_lm, from_pretrained, load_model, load_tokenizer, set_up
from alignkit.models.packing import batch_of
from alignkit.models.ranks import part_of
from alignkit.models.sharding import check_replicas
from alignkit.reference.cache import LogpCache, default_path
from alignkit.reference.choice import check_reference
from alignkit.reference.keys import fingerprint, key
from alignkit.rollout.checks import check_online
from alignkit.types import Example, Layout
from alignkit.unused import check_used

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """A run before its start. tokens: of the training rows, prompts counted once. Memory is in bytes, of one process.

    reference: its form, None without one. cache: the number of values that the run needs, and of those in the cache
    (None: not looked up). limit: the memory that the run must fit into. experts: of a mixture of experts, else None.
    servers: those that sample, None without.
    """

    method: str
    device: str
    rows: int
    held_out: int
    steps: int
    batch_size: int
    tokens: int
    reference: str | None
    cache: tuple[int, int | None] | None
    memory: Memory
    remedies: tuple[Remedy, ...]
    limit: int | None = None
    processes: int = 1
    experts: Experts | None = None
    servers: Servers | None = None

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self) | {"peak": self.memory.peak, "peak_phase": self.memory.peak_phase}


def plan(
    settings: Mapping[str, Any],
    *,
    limit: int | None = None,
    gpu: bool | None = None,
    processes: int = 1,
    hits: bool = False,
    remedies: bool = True,
    servers: int = 0,
    server_gpus: int = 1,
) -> Plan:
    """Plan a run with these flat settings.

    limit: bytes that it must fit into. gpu: plan for a GPU, by default if there is one. processes: of torchrun, each on
    its own GPU. hits: load the weights, and count the reference values in the cache. remedies: also plan settings that
    need less memory. servers, server_gpus: vLLM servers, and the GPUs of each. Raises what a run raises before its
    first step.
    """
    method_class = registry.get(str(settings.get("method")))
    config, own = split(settings, method_class.Config)
    method = method_class(own)
    _check(config, method, processes)
    gpu = torch.cuda.is_available() and config.device == "auto" if gpu is None else gpu
    rows = reading.read(config, method, load_tokenizer(config))
    examples = [method.longest(e) for e in rows.train]
    bf16 = config.precision == "bf16" or (config.precision == "auto" and gpu)
    sampling = servers_of(config, servers, server_gpus, examples, limit, bf16)
    least = assemble.least_examples(config, method, rows, processes)
    stream = Stream(rows.train, config.batch_size, config.seed, least, rows.weights)
    steps = stream.total_steps(config.epochs, config.max_steps)
    layout = _layout(config)
    step = heaviest(stream, steps, layout, config.max_tokens, processes)
    work = Work(config, method, layout, step, 0 if gpu else _program(config), bf16, limit if gpu else None, processes)
    found = memory(work)
    return Plan(
        config.method, _device(gpu, processes), len(rows.train), len(rows.held_out), steps,
        config.batch_size, sum(e.n_tokens for e in examples), found.reference,
        _cache(work, found.reference, [*examples, *map(method.longest, rows.held_out)], hits), found,
        tuple(find_remedies(work, found, limit)) if remedies else (), limit, processes, experts_of(config), sampling,
    )  # fmt: skip


def _check(config: RunConfig, method: Method[Any], processes: int) -> None:
    """Raise ConfigError for settings that a run refuses, or that a plan cannot count; loads nothing."""
    if not isinstance(config.model, str):
        raise ConfigError("a plan needs the model's folder or hub name, not a loaded model")
    if config.streaming:
        raise ConfigError(
            "a plan counts all rows, but streaming does not hold them; plan without it, on a part of them"
        )
    check_used(config, method)
    check_reference(config, method)
    check_online(config, method)
    if config.fsdp and processes == 1:
        raise ConfigError("fsdp shards over several processes, and this plans one; give their number: --processes 8")
    if config.fsdp:
        check_replicas(processes, config.fsdp_replicas)


def _device(gpu: bool, processes: int) -> str:
    if processes == 1:
        return "one GPU" if gpu else "the CPU"
    return f"each of {processes} GPUs" if gpu else f"the CPU, each of {processes} processes"


def _program(config: RunConfig) -> int:
    """Return the bytes of this process, which has imported what a run imports and has its rows."""
    if config.lora:
        importlib.import_module("peft")  # with all its imports
    pages = Path("/proc/self/statm")
    if pages.is_file():  # getrusage includes the process that started this one
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _layout(config: RunConfig) -> Layout:
    """Return the layout that the probe chooses for most models; see `alignkit.models.layouts`."""
    if config.layout == "padded":
        return Layout("padded")
    model = from_pretrained(config.model, config, weights=False)
    set_up(model, config, CPU)
    if causal_lm(model).config._attn_implementation == BRANCHES:
        return Layout("forest", config.row_tokens or config.max_tokens, attention_cost=0.0)
    return Layout("forest", config.row_tokens or min(config.max_tokens, DENSE_ROW_TOKENS))


def heaviest(stream: Stream, steps: int, layout: Layout, max_tokens: int, processes: int = 1) -> Sequence[Example]:
    """Return a rank's examples of the step whose largest micro-batch has the most tokens, among the first thousand."""

    def largest(examples: Sequence[Example]) -> int:
        return max(part.n_tokens for part in batch_of(examples, layout).micro_batches(max_tokens))

    steps_read = (stream[step] for step in range(min(steps, 1000)))
    return max((part_of(step, rank, processes) for step in steps_read for rank in range(processes)), key=largest)


def _cache(work: Work, form: str | None, examples: Sequence[Example], hits: bool) -> tuple[int, int | None] | None:
    """Return the number of different reference values that the run needs, and how many its cache has."""
    config, method = work.config, work.method
    if form is None or not config.reference_cache or method.reference_need() == "moving" or method.data == "prompts":
        return None

    def keys(known_as: str) -> list[bytes]:
        return list({key(known_as, e.prompt, c.tokens, c.trained_at): None for e in examples for c in e.completions})

    if not hits:
        return len(keys("")), None
    if not (config.cache_file or default_path()).is_file():
        return len(keys("")), 0
    model, _ = load_model(config.model_copy(update={"fsdp": False}), CPU)
    known_as = fingerprint(
        model,
        quantisation="llm.int8" if form == "int8" else "none",
        dtype=torch.bfloat16 if work.bf16 else DTYPES[config.dtype],
        adapters=form != "adapter-off" or has_start(model),
    )
    with LogpCache(config.cache_file) as cache:
        return len(keys(known_as)), len(cache.get(keys(known_as)))
