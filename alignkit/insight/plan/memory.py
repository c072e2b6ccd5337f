"""Memory of a run by part and phase, estimated with models that have no data.

A dry run of an update is made with two and with three layers, and what a layer adds is multiplied by the number of
layers: a plan takes seconds for a model of any depth.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from alignkit.config import RunConfig
from alignkit.engine.optimizers import state_bytes
from alignkit.errors import AlignkitError, ModelError, PluginError, first_line
from alignkit.insight.plan.dry_run import collect, few_blocks, layers_of, learn, trunks
from alignkit.insight.plan.experts import products_without_values
from alignkit.insight.plan.ledger import Ledger
from alignkit.insight.plan.meta_models import base_layers, in_8_bits, in_16_bits, n_bytes, resident, unloaded
from alignkit.insight.plan.rollout_memory import rollout_bytes
from alignkit.insight.plan.sharded_memory import models_of, per_rank
from alignkit.method import Method
from alignkit.models.loading import causal_lm
from alignkit.models.packing import batch_of
from alignkit.models.scoring import Scorer
from alignkit.models.sharding import blocks_of, casts
from alignkit.models.unread import in_parts, needs_whole
from alignkit.models.values import ActorCritic, Grader, ValueHead, Valuer
from alignkit.reference.choice import resolve_reference
from alignkit.rewards import judge_folders, reward_folders
from alignkit.types import Batch, Example, Layout

FEW = (2, 3)  # layers of a dry run
NO_VALUES = (DataDependentOutputException, DynamicOutputShapeException)  # a tensor's numbers were asked for
# The C library keeps memory free between tensors on a CPU: some bytes, a fraction of all tensors and, with adapters,
# whose small tensors lie between the large ones, a fraction of the tensors kept for the backward. Fitted to
# benchmarks/plan.py.
GAPS_BYTES, GAPS, ADAPTER_GAPS = 150 << 20, 0.1, 0.75


@dataclass(frozen=True)
class Memory:
    """Bytes by part in each phase of a run, at its peak: {phase: {part: bytes}}.

    tokens: of the heaviest update, prompts counted once. positions, padded: positions of its packed rows, and of one
    row per completion. reference: its form, None without one.
    """

    phases: dict[str, dict[str, int]]
    tokens: int
    positions: int
    padded: int
    reference: str | None

    @property
    def peak_phase(self) -> str:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """The memory that is needed, in bytes."""
        return sum(self.phases[self.peak_phase].values())


@dataclass(frozen=True)
class Work:
    """The run whose memory is estimated. examples: of the heaviest step. program: bytes of the process without models.

    bf16: products are computed in bfloat16. gpu: its memory in bytes, None on a CPU or where unknown. processes: of the
    run; this is one of them, and examples are its own.
    """

    config: RunConfig
    method: Method[Any]
    layout: Layout
    examples: Sequence[Example]
    program: int
    bf16: bool
    gpu: int | None = None
    processes: int = 1


def memory(work: Work) -> Memory:
    """Estimate the memory of a run. Raises ModelError where a configuration does not determine its model."""
    try:
        return _memory(work, FakeTensorMode(allow_non_fake_inputs=True))
    except Exception as error:  # an architecture may branch on values, which do not exist here
        cause = error.__cause__ if isinstance(error, PluginError) else error  # it does so inside a method's loss
        if isinstance(error, AlignkitError) and not isinstance(cause, NO_VALUES):
            raise
        raise ModelError(f"the memory of this model cannot be planned: {first_line(cause or error)}") from error


def _memory(work: Work, mode: FakeTensorMode) -> Memory:
    config, method = work.config, work.method
    module = _module(config, method, mode)
    policy = _policy(module)
    gradients = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    kept = {"program": work.program, "weights": resident(policy, config), "optimiser": state_bytes(module, config)}
    form = _form(work, kept["weights"])
    scorers = _scorers(config, mode)
    kept |= {"reference": _reference(form, policy, config), "reward models": sum(map(n_bytes, scorers))}
    if isinstance(module, ActorCritic):
        critic = module.critic
        kept["critic"] = resident(critic.model, config) if isinstance(critic, Valuer) else n_bytes(critic)
    depth = max(len(layers_of(trunk)) for trunk in trunks(module))
    few = [n for n in FEW if n < depth] or [depth]
    dry_runs = [_dry_run(work, _module(config, method, mode), n) for n in few]
    micros = dry_runs[0][1]
    learning = _extrapolate([m for m, _ in dry_runs], few, depth)
    if config.quantize:  # each pass computes a layer's weights from its 4 bits
        largest = max((m.weight.numel() for m in base_layers(policy)), default=0)
        learning["workspace"] = learning.get("workspace", 0) + largest * (2 if work.bf16 else 4)
    # the largest micro-batch comes first; while the second is computed, the gradients of the first are kept
    second = micros[1].n_tokens / micros[0].n_tokens if len(micros) > 1 else 0.0
    later = {**{k: round(v * second) for k, v in learning.items()}, "gradients": gradients if second else 0}
    phases = {
        "learning": kept | (learning if sum(learning.values()) > sum(later.values()) else later),
        "updating": {**kept, "gradients": gradients},
    }
    if method.data == "prompts":
        on_cpu = _device_type(work) == "cpu"
        phases["sampling"] = {**kept, "rollouts": rollout_bytes(config, work.examples, policy, mode, on_cpu, work.bf16)}
    whole = not in_parts(config) or needs_whole(causal_lm(policy)) is not None
    cast = _device_type(work) if work.bf16 else None
    phases = per_rank(phases, module, [Grader(one) for one in scorers], work.processes, config, whole, cast)
    alone = batch_of([e for micro in micros for e in micro.examples], Layout("padded")).micro_batches(config.max_tokens)
    if work.program:
        for parts in phases.values():
            parts["gaps"] = _gaps(parts, adapters=config.lora is not None)
    return Memory(
        {name: {k: v for k, v in parts.items() if v} for name, parts in phases.items()},
        sum(micro.n_tokens for micro in micros),
        sum(micro.rows.input_ids.numel() for micro in micros),
        sum(micro.rows.input_ids.numel() for micro in alone),
        form,
    )


def _device_type(work: Work) -> str:
    return "cpu" if work.program else "cuda"


def _module(config: RunConfig, method: Method[Any], mode: FakeTensorMode) -> Any:
    """Return what is trained, as a run would assemble it."""
    if "reward" in method.trains:
        return Valuer(unloaded(config.model, config, mode, "classifier"))
    policy = Scorer(unloaded(config.model, config, mode), int(config.kept_logits_gib * 2**30))
    if "critic" not in method.roles():
        return policy
    if config.critic == "shared":
        with mode:
            return ActorCritic(policy, ValueHead(causal_lm(policy.model).config.get_text_config().hidden_size, 1))
    folders = reward_folders(config.reward) if config.reward is not None else []
    own = {"policy": config.model, "reward": next(iter(folders), config.model)}
    initial = own["reward"] if config.critic == "auto" else own.get(config.critic, config.critic)
    return ActorCritic(policy, Valuer(unloaded(initial, config, mode, "classifier")))


def _policy(module: Any) -> nn.Module:
    return module.policy.model if isinstance(module, ActorCritic) else module.model  # type: ignore[no-any-return]


def _gaps(parts: Mapping[str, int], adapters: bool) -> int:
    tensors = sum(parts.values()) - parts["program"]
    kept = parts.get("activations", 0) + parts.get("head", 0)
    return GAPS_BYTES + round(GAPS * tensors + ADAPTER_GAPS * kept * adapters)


def _form(work: Work, size: int) -> str | None:
    """Return the form of the reference that a run would choose; size: of the policy's weights, in bytes."""
    form = resolve_reference(work.config, work.method, torch.device("cpu"), 0)
    free = work.config.reference == "auto" and not work.config.fsdp and work.method.reference_need() != "moving"
    if form == "full" and free:
        return "int8" if work.gpu is not None and work.gpu - size < 3 * size else form
    return form


def _reference(form: str | None, policy: nn.Module, config: RunConfig) -> int:
    """Return the bytes of a reference that stands beside the policy."""
    return resident(policy, config) if form == "full" else in_8_bits(policy) if form == "int8" else 0


def _scorers(config: RunConfig, mode: FakeTensorMode) -> list[nn.Module]:
    """Return the reward models and judges of a run."""
    folders = reward_folders(config.reward) if config.reward is not None else []
    folders += judge_folders(config.judge) if config.judge is not None else []
    plain = config.model_copy(update={"lora": None, "quantize": None, "dtype": "float32"})
    return [unloaded(folder, plain, mode, "classifier") for folder in folders]


def _dry_run(work: Work, module: Any, n_layers: int) -> tuple[Counter[str], list[Batch]]:
    """Run an update with the first layers only; return bytes by part, and the micro-batches of the update."""
    for trunk in trunks(module):
        del layers_of(trunk)[n_layers:]
    for model in models_of(module) if work.config.fsdp and work.bf16 else ():
        if not isinstance(model, ValueHead) and casts(model, _device_type(work)):  # as they are gathered
            for block in blocks_of(model):
                in_16_bits(block)
    ledger = Ledger()
    for tensor in (*module.parameters(), *module.buffers()):
        ledger.count(tensor, "weights")
    logits = work.config.max_tokens * causal_lm(_policy(module)).config.get_text_config().vocab_size
    cast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if work.bf16 else contextlib.nullcontext()
    with few_blocks(logits), products_without_values(), ledger, cast:
        micros, roles = collect(work.config, work.method, module, work.layout, work.examples)
        found = learn(work.method, module, micros[0], roles, ledger)
    return Counter({k: v for k, v in found.items() if k != "weights"}), micros


def _extrapolate(moments: Sequence[Counter[str]], few: Sequence[int], depth: int) -> dict[str, int]:
    last = moments[-1]
    if len(moments) == 1:
        return dict(last)
    return {k: last[k] + (last[k] - moments[0][k]) * (depth - few[-1]) for k in {*last, *moments[0]}}
