"""Plans: what they count is what a run takes, and no weight is read for them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import write_classifier
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForSequenceClassification, MixtralConfig
from typer.testing import CliRunner
from zoo import CPU

import alignkit
from alignkit import registry
from alignkit.cli import console
from alignkit.cli.app import app
from alignkit.cli.commands.plan import bytes_of
from alignkit.config import RunConfig, split
from alignkit.data.stream import Stream
from alignkit.errors import ConfigError, ModelError
from alignkit.insight.plan import memory as room
from alignkit.insight.plan import plan, remedies
from alignkit.insight.plan.dry_run import collect, learn
from alignkit.insight.plan.ledger import Ledger
from alignkit.insight.plan.memory import Work, memory
from alignkit.insight.plan.meta_models import in_8_bits, n_bytes, unloaded
from alignkit.insight.plan.plan_output import experts as experts_line
from alignkit.insight.plan.plan_output import verdict
from alignkit.insight.plan.run_plan import heaviest
from alignkit.models.loading import load_model
from alignkit.models.packing import batch_of
from alignkit.models.scoring import Scorer
from alignkit.types import Completion, Example, Layout
from helpers import make_rows, write_tiny

FOREST = Layout("forest", 4096, attention_cost=0.0)
DATA = {"sft": "text", "reward": "pairs", "kto": "unpaired", "bco": "unpaired"}
ASKED: dict[str, dict[str, Any]] = {
    "ppo": {"reward": {"use": "length", "max": 5}}, "grpo": {"reward": {"use": "length", "max": 5}, "group_size": 4},
    "rloo": {"reward": {"use": "length", "max": 5}}, "reinforce": {"reward": {"use": "length", "max": 5}},
    "online_dpo": {"reward": {"use": "length", "max": 5}},
    "nash": {"judge": {"bradley_terry": {"use": "length", "max": 5}}},
}  # fmt: skip
SAMPLING = {"max_new_tokens": 12, "batch_size": 8}


def of(method: str, model: str, **changes: Any) -> dict[str, Any]:
    rows = make_rows(DATA.get(method, "pairs"), 12)
    if method in ASKED:
        rows = [{"prompt": r["prompt"]} for r in make_rows("text", 12)]
    own = {"sampling": SAMPLING, **ASKED[method]} if method in ASKED else {}
    return {"method": method, "model": model, "data": rows, "batch_size": 4, **own, **changes}


def tokens(n: int) -> torch.Tensor:
    return torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(n), dtype=torch.int32)


def pairs(n: int) -> list[Example]:
    return [Example(tokens(9 + i), (Completion(tokens(7)), Completion(tokens(5 + i)))) for i in range(n)]


def work_of(method: str, model: str, **changes: Any) -> Work:
    cls = registry.get(method)
    config, own = split({"method": method, "model": model, "data": "-", **changes}, cls.Config)
    return Work(config, cls(own), FOREST, pairs(6), 0, False)


def test_the_ledger_counts_what_is_alive_and_the_largest_moment() -> None:
    ledger = Ledger()
    with ledger:
        kept = torch.zeros(1000)
        with ledger.labelled("inside"):
            gone = torch.ones(500) + kept[:500]  # two of them for a moment; a view is no memory
        del gone
        small = torch.zeros(10)
    assert dict(ledger.now) == {"workspace": 4040, "inside": 0}
    assert ledger.peak == {"workspace": 4000, "inside": 4000}
    del small, kept
    assert ledger.now["workspace"] == 0


def test_what_has_no_memory_is_not_counted() -> None:
    ledger = Ledger()
    with ledger:
        shape = torch.empty(1000, 1000, device="meta")  # as attention branch by branch has for its mask
        there = torch.zeros(7)
    assert (shape.device.type, there.nbytes, dict(ledger.now)) == ("meta", 28, {"workspace": 28})


@pytest.mark.parametrize("lora", [None, 4])
def test_a_dry_run_takes_the_memory_of_the_update_itself(lora: int | None, tiny: str) -> None:
    work = work_of("dpo", tiny, lora=lora)
    real, _ = load_model(work.config, CPU)
    found = []
    for model in (real.train(), unloaded(tiny, work.config, FakeTensorMode(allow_non_fake_inputs=True))):
        scorer, ledger = Scorer(model, 2**30), Ledger()
        for tensor in (*scorer.parameters(), *scorer.buffers()):
            ledger.count(tensor, "weights")
        with ledger:
            micros, roles = collect(work.config, work.method, scorer, FOREST, work.examples)
            found.append(learn(work.method, scorer, micros[0], roles, ledger))
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["activations"] == found[1]["activations"] > 0
    assert sum(found[1].values()) == pytest.approx(sum(found[0].values()), rel=0.02)


def test_a_few_layers_tell_what_all_of_them_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path, num_hidden_layers=7)
    work = work_of("dpo", str(tmp_path))
    estimated = memory(work).phases["learning"]
    monkeypatch.setattr(room, "FEW", (7,))
    whole = memory(work).phases["learning"]
    assert estimated["activations"] == whole["activations"]
    assert sum(estimated.values()) == pytest.approx(sum(whole.values()), rel=0.01)


def sizes_of(tiny: str) -> tuple[int, int]:
    """Bytes of a layer, and of what is no layer: embeddings, head and a norm."""
    v = json.loads((Path(tiny) / "config.json").read_text())["vocab_size"]
    h, i, kv = 32, 48, 16
    return 4 * (h * h * 2 + 2 * h * kv + 3 * h * i + 2 * h), 4 * (2 * v * h + h)


def test_weights_gradients_and_optimiser_are_counted_by_hand(tiny: str) -> None:
    h, i, kv = 32, 48, 16
    layer, outside = sizes_of(tiny)
    weights = 2 * layer + outside
    full = memory(work_of("sft", tiny)).phases["updating"]
    buffers = full["weights"] - weights  # rotary frequencies
    assert 0 <= buffers <= 64
    assert full["gradients"] == weights
    assert full["optimiser"] == 2 * weights
    adapters = 4 * 4 * 2 * (2 * (h + h) + 2 * (h + kv) + 3 * (h + i))
    lora = memory(work_of("sft", tiny, lora=4)).phases["updating"]
    assert lora["gradients"] == adapters
    assert lora["optimiser"] == 2 * adapters
    assert lora["weights"] == weights + adapters + buffers


def test_a_rank_keeps_room_for_the_gradients_that_travel(tiny: str) -> None:
    layer, outside = sizes_of(tiny)
    alone, rank = (memory(replace(work_of("dpo", tiny), processes=n)).phases for n in (1, 4))
    assert rank["learning"] == {**alone["learning"], "buckets": 2 * layer + outside}
    assert rank["updating"] == alone["updating"]  # by then the gradients lie in it


def test_fsdp_spreads_what_is_trained_and_gathers_a_few_layers(tiny: str) -> None:
    layer, outside = sizes_of(tiny)
    alone = memory(work_of("dpo", tiny, reference="full")).phases
    ranks = memory(replace(work_of("dpo", tiny, reference="full", fsdp=True), processes=4)).phases
    assert "loading" not in ranks  # each rank reads its own parts
    for phase in ("learning", "updating"):
        for part in ("weights", "optimiser", "gradients"):
            assert ranks[phase].get(part, 0) == -(-alone[phase].get(part, 0) // 4)
        assert ranks[phase]["reference"] == -(-alone[phase]["reference"] // 4)
    assert ranks["learning"]["activations"] == alone["learning"]["activations"]
    assert ranks["learning"]["gathered"] == outside + 3 * layer
    assert "gathered" not in ranks["updating"]


def test_a_model_that_cannot_be_read_in_parts_is_whole_until_it_is_sharded(tmp_path: Path) -> None:
    write_tiny(tmp_path, MixtralConfig, num_local_experts=4)
    alone = memory(work_of("dpo", str(tmp_path), reference="full")).phases
    ranks = memory(replace(work_of("dpo", str(tmp_path), reference="full", fsdp=True), processes=4)).phases
    assert ranks["loading"] == {"weights": alone["learning"]["weights"], "reference": alone["learning"]["reference"]}


def test_a_plan_of_several_processes_is_of_the_busiest_of_them(tiny: str) -> None:
    one, two = (plan(of("dpo", tiny, max_tokens=64), gpu=True, processes=n) for n in (1, 2))
    assert (one.processes, two.processes) == (1, 2)
    assert (one.steps, one.tokens) == (two.steps, two.tokens)
    assert one.memory.tokens / 2 <= two.memory.tokens < one.memory.tokens
    assert "buckets" in two.memory.phases["learning"]
    assert {"fsdp": True} in [r.settings for r in two.remedies]
    assert {"fsdp": True} not in [r.settings for r in one.remedies]
    online = plan(of("grpo", tiny), gpu=True, processes=2)
    assert {"fsdp": True} in [r.settings for r in online.remedies]


def test_a_sharded_policy_is_whole_while_it_samples(tiny: str) -> None:
    layer, outside = sizes_of(tiny)
    for method, more in (("grpo", {}), ("ppo", {"critic": "policy"}), ("ppo", {"critic": "shared"})):
        alone, rank = (memory(replace(work_of(method, tiny, fsdp=True, **more), processes=n)).phases for n in (1, 2))
        assert rank["sampling"]["gathered"] == 2 * layer + outside
        assert rank["updating"].get("critic", 0) == -(-alone["updating"].get("critic", 0) // 2)
    assert rank["learning"]["gathered"] >= outside + 2 * layer


def test_with_products_of_16_bits_fsdp_gathers_blocks_in_16_bits_and_keeps_no_copies(tiny: str) -> None:
    layer, outside = sizes_of(tiny)
    work = replace(work_of("dpo", tiny), bf16=True, processes=4)
    plain, sharded = (memory(replace(work, config=work.config.model_copy(update={"fsdp": on}))) for on in (False, True))
    assert sharded.phases["learning"]["gathered"] == outside + 3 * layer // 2
    saved = plain.phases["learning"]["activations"] - sharded.phases["learning"]["activations"]
    assert 0.9 * layer < saved <= layer  # two layers, in half of their 32 bits; norms have no copy
    grpo = replace(work_of("grpo", tiny, fsdp=True), bf16=True, processes=2)
    assert memory(grpo).phases["sampling"]["gathered"] == outside + 2 * layer // 2


def test_fsdp_spreads_reward_models_too(tiny: str, tmp_path: Path) -> None:
    scorer = write_classifier(tmp_path / "scorer", hidden_size=64, intermediate_size=256)  # larger than the policy
    work = work_of("grpo", tiny, fsdp=True, reward=[scorer, "numeric"])
    alone, rank = (memory(replace(work, processes=n)).phases for n in (1, 4))
    model = AutoModelForSequenceClassification.from_pretrained(scorer)
    size = sum(p.nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    kept = size + sum(b.nbytes for b in model.buffers())
    assert alone["learning"]["reward models"] == kept
    assert {phase["reward models"] for phase in rank.values()} == {-(-kept // 4)}
    assert rank["sampling"]["gathered"] == size - 2 * layer + 3 * layer  # a block, the next one, and its receive buffer


def test_processes_that_a_run_would_refuse_are_refused(tiny: str) -> None:
    with pytest.raises(ConfigError, match="this plans one; give their number: --processes 8"):
        plan(of("dpo", tiny, fsdp=True))
    with pytest.raises(ConfigError, match="batch_size 4 is too small: 'dpo' on 8 ranks needs at least 8"):
        plan(of("dpo", tiny), processes=8)


def test_gaps_are_counted_on_a_cpu_and_more_of_them_between_adapters(tiny: str) -> None:
    for lora, share in ((None, 0.0), (4, 0.75)):
        work = replace(work_of("dpo", tiny, lora=lora), program=2**20)
        found = dict(memory(work).phases["learning"])
        gaps, tensors = found.pop("gaps"), sum(found.values()) - 2**20
        waiting = found["activations"] + found["head"]
        assert gaps == 150 * 2**20 + round(0.1 * tensors + share * waiting)
        assert "gaps" not in memory(replace(work, program=0)).phases["learning"]


def test_the_reference_is_counted_in_its_form(tiny: str) -> None:
    full = memory(work_of("dpo", tiny, reference="full")).phases["learning"]
    assert full["reference"] == full["weights"]
    assert "reference" not in memory(work_of("dpo", tiny)).phases["learning"]
    assert "reference" not in memory(work_of("dpo", tiny, lora=4)).phases["learning"]


def test_an_8_bit_reference_takes_what_the_quantised_model_takes(tiny: str) -> None:
    pytest.importorskip("bitsandbytes")
    from alignkit.reference.int8 import to_int8

    config = RunConfig(method="dpo", model=tiny, data="-")
    model, _ = load_model(config, CPU)
    planned = in_8_bits(unloaded(tiny, config, FakeTensorMode()))
    quantised = to_int8(model)
    states = [
        m.state.SCB if m.state.SCB is not None else m.weight.SCB for m in quantised.modules() if hasattr(m, "state")
    ]
    assert planned == pytest.approx(n_bytes(quantised) + sum(s.nbytes for s in states if s is not None), rel=0.01)


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_a_base_in_4_bits_takes_what_the_quantised_model_takes(method: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    write_tiny(tmp_path, hidden_size=128, intermediate_size=256, attention_bias=True)
    work = work_of(method, str(tmp_path), lora=4, quantize="nf4")
    model, _ = load_model(work.config, CPU, "classifier" if method == "reward" else "causal")
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    tensors |= {id(t): t for n, t in model.state_dict().items() if n.endswith(("absmax", "quant_map"))}
    planned = memory(work).phases["learning"]
    assert planned["weights"] == pytest.approx(sum(t.nbytes for t in tensors.values()), rel=0.01)
    whole = memory(replace(work, config=work.config.model_copy(update={"quantize": None}))).phases["learning"]
    assert planned["weights"] < 0.4 * whole["weights"]
    assert planned["workspace"] - whole.get("workspace", 0) == pytest.approx(128 * 256 * 4, rel=0.01)
    assert planned["optimiser"] == whole["optimiser"]


def test_4_bits_are_offered_to_adapters_alone(tiny: str) -> None:
    def offered(**changes: Any) -> list[dict[str, Any]]:
        work = work_of("dpo", tiny, **changes)
        return [change for change in remedies._changes(work, memory(work)) if "quantize" in change]

    assert offered(lora=4) == [{"quantize": "nf4"}]
    assert offered() == offered(lora=4, quantize="nf4") == offered(lora={"init": "pissa"}) == []


def test_the_optimisers_state_is_counted(tiny: str) -> None:
    adamw, sgd = (
        memory(work_of("dpo", tiny, optimizer=name, learning_rate=1e-3)).phases["updating"] for name in ("adamw", "sgd")
    )
    assert adamw["optimiser"] == 2 * adamw["gradients"]
    assert "optimiser" not in sgd


def test_keys_and_values_are_counted_by_hand(tiny: str) -> None:
    asked = ASKED["grpo"]
    found = memory(work_of("grpo", tiny, sampling=SAMPLING, **asked)).phases["sampling"]["rollouts"]
    longest, n_rows, kv_heads, width, n_layers = 9 + 5 + 12, 8, 2, 8, 2
    keys_and_values = 2 * 4 * n_rows * longest * kv_heads * width * (n_layers + 1)
    assert keys_and_values < found < keys_and_values + 8 * 300 * 8 * 10


def test_the_critic_is_counted(tiny: str) -> None:
    own = memory(work_of("ppo", tiny, **ASKED["ppo"], sampling=SAMPLING)).phases["learning"]
    assert own["weights"] - 4 * 32 * 300 - 64 < own["critic"] < own["weights"]  # a trunk without a head, and a row
    shared = memory(work_of("ppo", tiny, **ASKED["ppo"], sampling=SAMPLING, critic="shared")).phases["learning"]
    assert shared["critic"] == 4 * 33


@given(st.lists(st.integers(2, 60), min_size=4, max_size=30), st.integers(10, 150), st.integers(1, 4))
def test_the_heaviest_step_has_the_largest_part(lengths: list[int], max_tokens: int, ranks: int) -> None:
    examples = [Example(tokens(n // 2 + 1), (Completion(tokens(n - n // 2)),)) for n in lengths]
    stream = Stream(examples, 4, 0)
    steps = stream.total_steps(1.0, None)

    def largest(examples: Sequence[Example]) -> int:
        return max(part.n_tokens for part in batch_of(examples, FOREST).micro_batches(max_tokens))

    every = [stream[i][rank::ranks] for i in range(steps) for rank in range(ranks)]
    assert largest(heaviest(stream, steps, FOREST, max_tokens, ranks)) == max(map(largest, every))


@pytest.mark.parametrize("method", registry.names())
def test_every_method_is_planned_and_no_weight_is_read(method: str, tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    found = plan(of(method, str(tmp_path)), remedies=False)
    assert found.steps == 3
    assert found.memory.phases["learning"]["activations"] > 0
    assert json.loads(json.dumps(found.describe()))["peak"] == found.memory.peak


def test_packing_is_set_against_rows_that_repeat_their_prompts(tiny: str) -> None:
    rows = [{"prompt": "red " * 40, "chosen": " yes", "rejected": " no"}] * 4
    found = plan(of("dpo", tiny, data=rows), remedies=False).memory
    assert found.tokens == found.positions
    assert found.padded > 1.8 * found.positions


def test_what_needs_less_is_reported_and_fits_or_not(tiny: str) -> None:
    free = plan(of("dpo", tiny, reference="full", max_tokens=64))
    assert [r.peak for r in free.remedies] == sorted(r.peak for r in free.remedies)
    assert all(r.peak < free.memory.peak for r in free.remedies)


class CountedMemory:
    """Stands for `memory`: a run whose peak moves from the update to the learning once adapters are trained."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.planned: list[RunConfig] = []
        monkeypatch.setattr(remedies, "memory", self)

    def __call__(self, work: Work) -> room.Memory:
        config = work.config
        self.planned.append(config)
        weights = 16 if config.dtype == "bfloat16" else 32
        trained = 1 if config.lora else weights
        resident = {"weights": weights, "optimiser": 2 * trained}
        waiting = 4 if config.gradient_checkpointing else 20
        learning = resident | {"activations": waiting, "head": 2 if config.kept_logits_gib else 1}
        phases = {"learning": learning, "updating": resident | {"gradients": trained}}
        return room.Memory(phases, 10, 10, 10, None)


@pytest.mark.parametrize(
    ("limit", "best", "peak", "plans"),
    [
        (130, {}, 128, 0),
        (60, {"lora": 16}, 56, 1),
        (41, {"lora": 16, "gradient_checkpointing": True}, 40, 3),  # of lora's: kept_logits_gib does not suffice
        (24, {"lora": 16, "gradient_checkpointing": True, "dtype": "bfloat16"}, 24, 7),
        (23, {"lora": 16, "gradient_checkpointing": True, "dtype": "bfloat16", "kept_logits_gib": 0.0}, 23, 9),
        (9, {"lora": 16, "gradient_checkpointing": True, "dtype": "bfloat16", "kept_logits_gib": 0.0}, 23, 11),
    ],
)
def test_remedies_follow_the_peak_into_another_phase(
    limit: int, best: dict[str, Any], peak: int, plans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_of = CountedMemory(monkeypatch)
    work = replace(work_of("sft", "m"), bf16=True)
    found = memory_of(work)
    assert found.peak == 128  # 32 weights, 64 of moments, 32 gradients
    memory_of.planned.clear()
    offered_remedies = list(remedies.find_remedies(work, found, limit))
    assert (offered_remedies[-1].settings, offered_remedies[-1].peak) == (best, peak) if best else not offered_remedies
    assert len(memory_of.planned) == plans


@pytest.mark.parametrize(
    ("method", "changes", "bf16", "offered"),
    [
        ("sft", {"lora": 4}, True, True),
        ("sft", {}, True, False),  # of trained weights small updates would be lost
        ("sft", {"lora": 4}, False, False),
        ("sft", {"lora": {"r": 4, "modules_to_save": ["lm_head"]}}, True, False),
        ("sft", {"lora": 4, "fsdp": True}, True, True),
        ("sft", {"lora": 4, "dtype": "bfloat16"}, True, False),
        ("reward", {"lora": 4}, True, False),  # whose head is trained in full
        ("ppo", {"lora": 4, **ASKED["ppo"]}, True, False),
    ],
)
def test_16_bits_are_offered_for_frozen_weights_alone(
    method: str, changes: dict[str, Any], bf16: bool, offered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_of = CountedMemory(monkeypatch)
    work = replace(work_of(method, "m", **changes), bf16=bf16)
    settings = [r.settings for r in remedies.find_remedies(work, memory_of(work), None)]
    assert ({"dtype": "bfloat16"} in settings) == offered


def test_adapters_stay_in_32_bits_over_weights_in_16(tiny: str) -> None:
    model, _ = load_model(RunConfig(method="sft", model=tiny, data="-", lora=4, dtype="bfloat16"), CPU)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_an_adapter_and_a_reference_that_moves_get_no_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_of = CountedMemory(monkeypatch)

    def offered(work: Work) -> list[dict[str, Any]]:
        return [r.settings for r in remedies.find_remedies(work, memory_of(work), None)]

    assert {"lora": 16} in offered(work_of("dpo", str(tmp_path)))
    moving = work_of("dpo", str(tmp_path), sync_every=2)
    assert moving.method.reference_need() == "moving"
    assert offered(replace(moving, processes=2)) == []
    (tmp_path / "adapter_config.json").write_text("{}")
    assert {"lora": 16} not in offered(work_of("dpo", str(tmp_path)))


@pytest.mark.slow
def test_remedies_are_put_together_where_none_alone_fits(tmp_path: Path) -> None:
    write_tiny(tmp_path, hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
    rows = [{"prompt": "red " * 30, "chosen": " yes" * 10, "rejected": " no" * 10}]
    settings = of("dpo", str(tmp_path), data=rows, batch_size=1)

    both = {"lora": 16, "gradient_checkpointing": True}
    fits = plan(settings | both, gpu=True, remedies=False).memory
    found = plan(settings, gpu=True, limit=fits.peak + 1024)  # the workspace of a pass varies by some bytes
    assert found.memory.peak_phase == "updating"  # which checkpoints alone do nothing for
    assert [r.settings for r in found.remedies] == [{"lora": 16}, both]
    assert found.remedies[-1].peak == pytest.approx(fits.peak, abs=1024)


def test_the_cache_is_looked_up_where_that_is_asked_for(settings: dict[str, Any]) -> None:
    rows = make_rows("pairs", 12)
    given = settings | {"method": "dpo", "data": rows}

    def cache(hits: bool = True, **changes: Any) -> Any:
        return plan(given | changes, hits=hits, remedies=False).cache

    assert cache(hits=False) == (24, None)
    assert cache() == (24, 0)
    alignkit.run(**given | {"max_steps": 1})
    assert cache() == (24, 24)
    assert cache(data=[*rows, *make_rows("pairs", 4, seed=9)]) == (32, 24)
    assert cache(data=rows * 3) == (24, 24)
    assert cache(lora=4) == (24, 24)  # the plain base is the same reference


def test_a_model_that_decides_by_numbers_is_refused(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def decides(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x)) if x.sum() > 0 else x

    monkeypatch.setattr(LlamaMLP, "forward", decides)
    with pytest.raises(ModelError, match="the memory of this model cannot be planned"):
        plan(of("dpo", tiny))


GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8}


@pytest.mark.parametrize("targets", [None, ["experts.gate_up_proj", "experts.down_proj"]])
def test_experts_router_and_adapters_are_counted_by_hand(tmp_path: Path, targets: list[str] | None) -> None:
    from transformers import AutoModelForCausalLM, GptOssConfig

    write_tiny(tmp_path, GptOssConfig, **GPT_OSS)
    found = plan(of("dpo", str(tmp_path), lora={"r": 2, "target_parameters": targets}), remedies=False).experts
    assert found is not None
    # 2 layers of 4 experts: 32 -> 2 x 48 -> 32, with biases; a router 32 -> 4 with biases
    experts, router = 2 * 4 * (32 * 96 + 96 + 48 * 32 + 32), 2 * (4 * 32 + 4)
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path).parameters())
    assert (found.per_layer, found.per_token) == (4, 1)
    assert (found.weights, found.experts, found.router) == (weights, experts, router)
    assert found.active == weights - experts + experts // 4
    # rank 2: per expert 32 + 96, and 48 + 32; attention: q 32 -> 32, k and v 32 -> 16, o 32 -> 32
    on_experts = 2 * 4 * 2 * (32 + 96 + 48 + 32) if targets else 0
    assert found.on_experts == on_experts
    assert found.adapters == on_experts + 2 * 2 * (64 + 48 + 48 + 64)
    line = experts_line(found)
    assert f"4 in a layer, 1 for a token; a token passes {found.active:,} of {weights:,} weights" in line
    assert line.endswith(f"adapters {found.adapters:,}, on experts {on_experts:,}")


def test_the_memory_of_a_mixture_of_experts_has_its_weights_and_activations(tmp_path: Path, tiny: str) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    write_tiny(tmp_path, MixtralConfig, num_local_experts=4, num_experts_per_tok=2)
    found, dense = plan(of("sft", str(tmp_path)), remedies=False), plan(of("sft", tiny), remedies=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found.memory.phases["updating"]["weights"] == n_bytes(model)
    assert found.memory.phases["updating"]["gradients"] == sum(p.nbytes for p in model.parameters())
    assert found.memory.phases["learning"]["activations"] > 0
    assert dense.experts is None


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("80gb", 80 * 10**9)])
def test_sizes_of_memory_are_read(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["24", "much", "GB", "-3GB", "3 parsecs", "0GB", "0.0 MiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="24GB"):
        bytes_of(text)


def test_a_gpu_short_of_memory_gets_an_8_bit_reference_as_in_a_run(tiny: str) -> None:
    work = work_of("grpo", tiny, sampling=SAMPLING, **ASKED["grpo"])
    weights = memory(work).phases["updating"]["weights"]
    assert memory(work).reference == "full"
    assert memory(replace(work, gpu=4 * weights)).reference == "full"
    assert memory(replace(work, gpu=4 * weights - 1)).reference == "int8"


def test_the_program_is_this_process_alone(tiny: str) -> None:
    code = (
        "import subprocess, sys; held = bytearray(2**30);"
        "print(subprocess.run([sys.executable, '-c', sys.argv[1]], capture_output=True, text=True, check=True).stdout)"
    )
    arguments = (
        "from alignkit.config import RunConfig; from alignkit.insight.plan.run_plan import _program;"
        "print(_program(RunConfig(method='sft', model='m', data='d')))"
    )
    ran = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=True)
    assert 2**26 < int(ran.stdout) < 2**30


def test_where_nothing_needs_less_that_is_reported(tiny: str) -> None:
    found = plan(of("dpo", tiny), gpu=True, limit=1, remedies=False)
    assert "No setting needs less: use shorter rows, or another model" in verdict(found)
    assert "to spare" in verdict(plan(of("dpo", tiny), gpu=True, limit=2**40))


def test_the_command_prints_parts_phases_verdict_and_writes_json(
    tiny: str, tmp_path: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "show_log", lambda: None)
    file = tmp_path / "config.yaml"
    settings = of("dpo", tiny, data=write_rows(make_rows("pairs", 12)))
    file.write_text(json.dumps(settings))
    told = CliRunner().invoke(app, ["plan", str(file), "--memory", "1MiB", "--json", str(tmp_path / "plan.json")])
    assert told.exit_code == 0, told.output
    for part in (
        "steps: 3 of 4",
        "activations",
        "program",
        "together",
        "by phase: learning",
        "does not fit into 1 MiB",
    ):
        assert part in told.output, part
    assert json.loads((tmp_path / "plan.json").read_text())["limit"] == 2**20
    told = CliRunner().invoke(app, ["plan", str(file), "--processes", "2", "--gpu"])
    assert "on each of 2 GPUs:" in told.output
    assert "buckets" in told.output


def test_trajectories_are_planned_at_their_longest(chat_model: str) -> None:
    asked = ASKED["grpo"]
    turns = {"environment": {"tools": ["environments:double"], "max_tokens": 60}, "sampling": SAMPLING}
    long = memory(work_of("grpo", chat_model, **asked, **turns)).phases
    same = memory(work_of("grpo", chat_model, **asked, sampling=SAMPLING | {"max_new_tokens": 60})).phases
    short = memory(work_of("grpo", chat_model, **asked, sampling=SAMPLING)).phases
    for name in ("sampling", "learning"):
        assert sum(long[name].values()) == sum(same[name].values()) > sum(short[name].values())
