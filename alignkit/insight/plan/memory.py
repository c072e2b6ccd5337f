"""Memory of a run by part and phase, reckoned with models that hold no numbers.

An update is rehearsed with two and with three layers, and what a layer adds is counted as often as the model has
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
from torch._subclasses.fake_tensor import FakeTensorMode

from alignkit.config import RunConfig
from alignkit.errors import AlignkitError, ModelError
from alignkit.insight.plan.dry_run import collected, few_blocks, layers_of, learn, trunks
from alignkit.insight.plan.ledger import Ledger
from alignkit.insight.plan.meta_models import in_8_bits, n_bytes, unloaded
from alignkit.insight.plan.sharded_memory import spread
from alignkit.method import Method
from alignkit.models.loading import causal_lm, first_line
from alignkit.models.packing import batch_of
from alignkit.models.scoring import Scorer
from alignkit.models.values import ActorCritic, Valuer
from alignkit.reference.choice import resolve_reference
from alignkit.rewards import judge_folders, reward_folders
from alignkit.rollout.noise import GumbelNoise
from alignkit.types import Batch, Example, Layout

FEW = (2, 3)  # layers that an update is rehearsed with
# What the C library keeps free between tensors on a CPU: some bytes, a part of all tensors, and with adapters, whose
# many small tensors lie between the large ones, a part of what waits for the backward. Fitted to benchmarks/plan.py.
GAPS_BYTES, GAPS, ADAPTER_GAPS = 150 << 20, 0.1, 0.75


@dataclass(frozen=True)
class Memory:
    """Bytes by part in each phase of a run, at its largest moment: {phase: {part: bytes}}.

    tokens: of the heaviest update, prompts counted once. positions, padded: those that its rows have, packed, and those
    that a row for each completion would have. reference: its form, None without one.
    """

    phases: dict[str, dict[str, int]]
    tokens: int
    positions: int
    padded: int
    reference: str | None

    @property
    def peak_phase(self) -> str:
        """The phase that needs the most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """The most that is needed, in bytes."""
        return sum(self.phases[self.peak_phase].values())


@dataclass(frozen=True)
class Work:
    """What memory is reckoned for. examples: of the heaviest step. program: bytes of the process without models.

    bf16: products are made in bfloat16. gpu: bytes that it has, None on a CPU or where that is not known. processes: of
    the run, of which this is one; examples are its own.
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
    """Reckon the memory of a run. Raises ModelError where a model cannot be known by its configuration."""
    try:
        return _memory(work, FakeTensorMode(allow_non_fake_inputs=True))
    except AlignkitError:
        raise
    except Exception as error:  # an architecture may decide by numbers, which there are none of
        raise ModelError(f"the memory of this model cannot be planned: {first_line(error)}") from error


def _memory(work: Work, mode: FakeTensorMode) -> Memory:
    config, method = work.config, work.method
    module = _module(config, method, mode)
    policy = _policy(module)
    gradients = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    resident = {"program": work.program, "weights": n_bytes(policy), "optimiser": 2 * gradients}
    form = _form(work, n_bytes(policy))
    resident |= _others(config, form, policy, mode)
    if isinstance(module, ActorCritic):
        resident["critic"] = n_bytes(module.critic)
    depth = max(len(layers_of(trunk)) for trunk in trunks(module))
    few = [n for n in FEW if n < depth] or [depth]
    rehearsed = [_moment(work, _module(config, method, mode), n) for n in few]
    micros = rehearsed[0][1]
    learning = _extended([m for m, _ in rehearsed], few, depth)
    # the largest part of an update comes first; while the second is computed, the first one's gradients wait
    second = micros[1].n_tokens / micros[0].n_tokens if len(micros) > 1 else 0.0
    later = {**{k: round(v * second) for k, v in learning.items()}, "gradients": gradients if second else 0}
    phases = {
        "learning": resident | (learning if sum(learning.values()) > sum(later.values()) else later),
        "updating": {**resident, "gradients": gradients},
    }
    if method.data == "prompts":
        phases["sampling"] = {**resident, "rollouts": _rollouts(work, policy, mode)}
    phases = spread(phases, module, work.processes, config.fsdp)
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


def _module(config: RunConfig, method: Method[Any], mode: FakeTensorMode) -> Any:
    """Return what is trained, as a run would put it together."""
    if "reward" in method.trains:
        return Valuer(unloaded(config.model, config, mode, "classifier"))
    policy = Scorer(unloaded(config.model, config, mode), int(config.kept_logits_gib * 2**30))
    if "critic" not in method.roles():
        return policy
    if config.critic == "shared":
        with mode:
            return ActorCritic(policy, nn.Linear(causal_lm(policy.model).config.get_text_config().hidden_size, 1))
    folders = reward_folders(config.reward) if config.reward is not None else []
    own = {"policy": config.model, "reward": next(iter(folders), config.model)}
    begun = own["reward"] if config.critic == "auto" else own.get(config.critic, config.critic)
    return ActorCritic(policy, Valuer(unloaded(begun, config, mode, "classifier")))


def _policy(module: Any) -> nn.Module:
    return module.policy.model if isinstance(module, ActorCritic) else module.model  # type: ignore[no-any-return]


def _gaps(parts: Mapping[str, int], adapters: bool) -> int:
    tensors = sum(parts.values()) - parts["program"]
    waiting = parts.get("activations", 0) + parts.get("head", 0)
    return GAPS_BYTES + round(GAPS * tensors + ADAPTER_GAPS * waiting * adapters)


def _form(work: Work, size: int) -> str | None:
    """Return the form of the reference that a run would choose; size: of the policy's weights, in bytes."""
    form = resolve_reference(work.config, work.method, torch.device("cpu"), 0)
    if form == "full" and work.config.reference == "auto" and work.method.reference_need() != "moving":
        return "int8" if work.gpu is not None and work.gpu - size < 3 * size else form
    return form


def _others(config: RunConfig, form: str | None, policy: nn.Module, mode: FakeTensorMode) -> dict[str, int]:
    """Return the bytes of the models that are not trained."""
    sizes = {"full": n_bytes, "int8": in_8_bits}
    folders = reward_folders(config.reward) if config.reward is not None else []
    folders += judge_folders(config.judge) if config.judge is not None else []
    plain = config.model_copy(update={"lora": None, "dtype": "float32"})
    return {
        "reference": sizes[form](policy) if form is not None and form in sizes else 0,
        "reward models": sum(n_bytes(unloaded(folder, plain, mode, "classifier")) for folder in folders),
    }


def _moment(work: Work, module: Any, n_layers: int) -> tuple[Counter[str], list[Batch]]:
    """Rehearse an update with the first layers alone: bytes by part, and the parts that the update is made in."""
    for trunk in trunks(module):
        del layers_of(trunk)[n_layers:]
    ledger = Ledger()
    for tensor in (*module.parameters(), *module.buffers()):
        ledger.count(tensor, "weights")
    logits = work.config.max_tokens * causal_lm(_policy(module)).config.get_text_config().vocab_size
    cast = torch.autocast("cpu", torch.bfloat16) if work.bf16 else contextlib.nullcontext()
    with few_blocks(logits), ledger, cast:
        micros, roles = collected(work.config, work.method, module, work.layout, work.examples)
        found = learn(work.method, module, micros[0], roles, ledger)
    return Counter({k: v for k, v in found.items() if k != "weights"}), micros


def _extended(moments: Sequence[Counter[str]], few: Sequence[int], depth: int) -> dict[str, int]:
    last = moments[-1]
    if len(moments) == 1:
        return dict(last)
    return {k: last[k] + (last[k] - moments[0][k]) * (depth - few[-1]) for k in {*last, *moments[0]}}


def _rollouts(work: Work, policy: nn.Module, mode: FakeTensorMode) -> int:
    """Return the bytes of keys and values at their longest, one layer's of them twice, and of choosing a token."""
    config, about = work.config, causal_lm(policy).config.get_text_config()
    n_layers, heads = about.num_hidden_layers, getattr(about, "num_key_value_heads", about.num_attention_heads)
    width = getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads
    n_rows = config.sampling.batch_size
    length = max(len(e.prompt) for e in work.examples) + config.sampling.max_new_tokens
    a_layer = 2 * n_rows * heads * length * width * next(policy.parameters()).element_size()
    ledger = Ledger()
    with ledger, torch.no_grad():
        noise = GumbelNoise(0, [0] * n_rows, [0] * n_rows, 0, torch.device("cpu"))
        with mode:
            scores = torch.empty(n_rows, about.vocab_size)
        noise(torch.zeros(n_rows, 1, dtype=torch.int64), scores)
    return int(a_layer * (n_layers + 1) + sum(ledger.peak.values()))
