"""The loop: what it writes, and that its result does not depend on how a step is cut or where a run stops."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignkit
from alignkit.engine.phases import Run
from alignkit.engine.step import rank_batch
from alignkit.errors import CheckpointError, ConfigError, TrainingError
from alignkit.insight.plan.ledger import Ledger
from alignkit.runs.folder import read_metrics
from alignkit_kernels import linear_logps
from helpers import killed_before, make_rows, sentence, write_tiny

METHODS = ["sft", "dpo", "ipo", "kto", "bco", "orpo", "simpo", "cpo"]
TIMED = {"tokens_per_second"}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


def close(a: Any, b: Any, atol: float) -> None:
    for x, y in zip(weights(a).values(), weights(b).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(folder)]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_trains_and_leaves_metrics_config_and_a_model_that_plain_transformers_loads(
    method: str, settings: dict[str, Any], tiny: str
) -> None:
    rows = make_rows("pairs", 24)
    result = alignkit.run(method, data=rows, eval_fraction=0.25, **settings | {"max_steps": 12})
    written = read_metrics(result.folder)
    assert [line["step"] for line in written] == [0, *range(1, 13), 12]
    first, last = written[0]["eval/loss"], written[-1]["eval/loss"]
    assert last < first
    loaded = AutoModelForCausalLM.from_pretrained(result.folder / "model", dtype=torch.float32)
    assert same(loaded, result.model)
    assert not same(loaded, AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32))
    assert AutoTokenizer.from_pretrained(result.folder / "model").eos_token == "<|end|>"
    assert loaded.config.use_cache
    config = (result.folder / "config.yaml").read_text()
    assert f"method: {method}" in config
    assert "max_steps: 12" in config


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changed", [{"max_tokens": 40}, {"layout": "padded"}, {"row_tokens": 1}])
def test_the_result_does_not_depend_on_micro_batches_or_layout(
    method: str, changed: dict[str, Any], settings: dict[str, Any]
) -> None:
    rows = make_rows("pairs", 12)
    # plain SGD-like sensitivity is what is wanted; Adam's first steps turn rounding into signs, so few steps
    settings |= {"max_steps": 2, "learning_rate": 1e-4}
    whole = alignkit.run(method, data=rows, **settings)
    cut = alignkit.run(method, data=rows, **settings | changed)
    for a, b in zip(lines(whole.folder), lines(cut.folder), strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=2e-5, rel=2e-5), name


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("dpo", {}), ("dpo", {"divergence": "forward_kl", "ld_alpha": 0.5}), ("dpo", {"length_normalised": True}),
        ("ipo", {}), ("kto", {"reference": "full"}),
    ],
)  # fmt: skip
def test_a_policy_that_is_its_reference_has_an_accuracy_of_one_half(
    method: str, own: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    """In each of these cuts, the passes of the reference round otherwise than those of the policy."""
    write_tiny(tmp_path / "wider", hidden_size=128, intermediate_size=192, num_hidden_layers=3)
    words = random.Random(0)
    rows = [
        {"prompt": f"{i} {sentence(words)}:", **{k: f" {sentence(words, 1, 40)}" for k in ("chosen", "rejected")}}
        for i in range(40)
    ]
    settings |= {"model": str(tmp_path / "wider"), "data": rows, "eval_fraction": 0.3, "max_steps": 1}
    settings |= {"batch_size": 12, "reference": "cached"} | own
    margins = set()
    for i, cut in enumerate([{}, {"max_tokens": 300}, {"layout": "padded", "max_tokens": 200}]):
        run = alignkit.run(method, **settings | cut | {"cache_file": tmp_path / f"{i}.sqlite"})
        before, step, after = lines(run.folder)
        assert (before["eval/rewards/accuracy"], step["rewards/accuracy"]) == (0.5, 0.5)
        assert abs(after["eval/rewards/margin"]) > 1e-3  # the step itself is far beyond the tolerance
        margins.add(step["rewards/margin"])
    assert len(margins) > 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora", [None, 4])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    method: str, lora: int | None, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows("pairs", 14)
    settings |= {"data": rows, "eval_fraction": 0.2, "save_every": 2, "lora": lora}
    whole = alignkit.run(method, name="whole", **settings)

    from alignkit.engine.loop import Loop

    step = Loop.step

    def dies(self: Loop, number: int, total: int) -> dict[str, float]:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, total)

    monkeypatch.setattr(Loop, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        alignkit.run(method, name="halves", **settings)
    monkeypatch.setattr(Loop, "step", step)
    torch.manual_seed(99)  # what the process drew meanwhile must not matter
    halves = alignkit.run(method, name="halves", resume=True, **settings)
    assert lines(halves.folder) == lines(whole.folder)
    assert same(halves.model, whole.model)


def test_tr_dpo_resumes_with_the_reference_where_it_had_moved_to(settings: dict[str, Any]) -> None:
    settings |= {"data": make_rows("pairs", 12), "save_every": 3, "sync_every": 2}
    whole = alignkit.run("dpo", name="whole", **settings)
    with killed_before(4):
        alignkit.run("dpo", name="halves", **settings)
    halves = alignkit.run("dpo", name="halves", resume=True, **settings)
    assert lines(halves.folder) == lines(whole.folder)
    assert same(halves.model, whole.model)


def test_resume_refuses_other_settings_other_rows_and_a_run_that_is_not_there(settings: dict[str, Any]) -> None:
    rows = make_rows("pairs", 12)
    settings |= {"name": "r", "save_every": 2}
    alignkit.run("dpo", data=rows, **settings)
    with pytest.raises(ConfigError, match=r"beta was 0\.1, is 0\.2"):
        alignkit.run("dpo", data=rows, beta=0.2, resume=True, **settings)
    with pytest.raises(
        CheckpointError, match=r"the rows differ from those of .*step-00000006; resume with the same data"
    ):
        alignkit.run("dpo", data=make_rows("pairs", 12, seed=1), resume=True, **settings)
    with pytest.raises(ConfigError, match=r"other has no run to resume; runs in .*: r"):
        alignkit.run("dpo", data=rows, **settings | {"name": "other", "resume": True})
    with pytest.raises(ConfigError, match="exists; continue it with --resume"):
        alignkit.run("dpo", data=rows, **settings)


def test_other_rows_are_refused_before_a_model_is_loaded(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"name": "r", "save_every": 2}
    alignkit.run("dpo", data=make_rows("pairs", 12), **settings)
    monkeypatch.setattr("alignkit.engine.assemble.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(CheckpointError, match="the rows differ from those of"):
        alignkit.run("dpo", data=make_rows("pairs", 12, seed=1), resume=True, **settings)


def test_resume_refuses_rows_with_other_labels(settings: dict[str, Any]) -> None:
    rows = make_rows("unpaired", 12)
    settings |= {"name": "r", "save_every": 2}
    alignkit.run("kto", data=rows, **settings)
    with pytest.raises(
        CheckpointError, match=r"the rows differ from those of .*step-00000006; resume with the same data"
    ):
        alignkit.run("kto", data=[{**r, "label": not r["label"]} for r in rows], resume=True, **settings)


def test_resuming_a_finished_run_writes_no_line_twice(settings: dict[str, Any]) -> None:
    settings |= {"data": make_rows("pairs", 12), "eval_fraction": 0.3, "name": "r", "save_every": 3}
    first = alignkit.run("dpo", **settings)
    before = lines(first.folder)
    again = alignkit.run("dpo", resume=True, **settings)
    assert lines(again.folder) == before
    assert same(again.model, first.model)


def test_resuming_a_finished_run_that_kept_no_checkpoint_says_so_and_trains_nothing(settings: dict[str, Any]) -> None:
    settings |= {"data": make_rows("pairs", 12), "name": "r"}
    first = alignkit.run("dpo", **settings)
    before = (first.folder / "model/model.safetensors").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"is finished: its model is in .*model. To train it further, start a new run"
    ):
        alignkit.run("dpo", resume=True, **settings)
    assert (first.folder / "model/model.safetensors").read_bytes() == before


def test_a_step_that_is_not_finite_is_skipped_its_row_named_and_the_run_stopped_after_too_many(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import alignkit_sft

    rows = make_rows("text", 8)
    rows[4]["completion"] = " king king king king king king king king king king king"
    honest = alignkit_sft.SFT.loss

    def poisoned(self: Any, batch: alignkit.Batch, models: Any) -> dict[str, alignkit.Term]:
        terms = honest(self, batch, models)
        bad = torch.tensor([e.row == 5 for e in batch.examples]).repeat_interleave(batch.lengths)
        value = torch.where(bad, math.nan, terms["nll"].value)
        return {"nll": alignkit.Term(value, over="tokens")}

    monkeypatch.setattr(alignkit_sft.SFT, "loss", poisoned)
    before = settings | {"max_steps": 2}
    result = alignkit.run("sft", data=rows, **before)
    assert "rows 5: the update is skipped" in caplog.text
    assert all(v.isfinite().all() for v in weights(result.model).values())
    written = read_metrics(result.folder)
    assert [line["skipped"] for line in written] in ([1, 1], [0, 1])
    assert sum(line["loss"] is None for line in written) == 1

    with pytest.raises(TrainingError, match=r"1 updates were not finite \(max_skipped_steps 0\).*rows 5"):
        alignkit.run("sft", data=rows, max_skipped_steps=0, **before)


def test_out_of_memory_halves_the_budget_and_changes_nothing(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import alignkit_dpo

    rows = make_rows("pairs", 8)
    settings |= {"max_steps": 2, "learning_rate": 1e-4, "max_tokens": 1024}
    whole = alignkit.run("dpo", data=rows, **settings)
    honest = alignkit_dpo.DPO.loss

    def greedy(self: Any, batch: alignkit.Batch, models: Any) -> dict[str, alignkit.Term]:
        if batch.n_tokens > 150:
            raise torch.OutOfMemoryError("planted")
        return honest(self, batch, models)

    monkeypatch.setattr(alignkit_dpo.DPO, "loss", greedy)
    small = alignkit.run("dpo", data=rows, **settings)
    assert caplog.text.count("out of memory: continuing with max_tokens") >= 1
    close(small.model, whole.model, 1e-6)


def test_evaluation_runs_at_the_start_the_end_and_between(settings: dict[str, Any]) -> None:
    result = alignkit.run("dpo", data=make_rows("pairs", 12), eval_fraction=0.3, eval_every=4, **settings)
    assert [line["step"] for line in read_metrics(result.folder) if "eval/loss" in line] == [0, 4, 6]


def test_objects_are_taken_as_they_are(tiny: str, settings: dict[str, Any]) -> None:
    import datasets

    rows = make_rows("pairs", 8)
    from_paths = alignkit.run("dpo", data=rows, **settings)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    engine = alignkit.Engine(**settings | {"model": model, "tokenizer": tokenizer})
    from_objects = engine.run(method="dpo", data=datasets.Dataset.from_list(rows))
    assert same(from_objects.model, from_paths.model)


def test_lora_trains_the_adapter_alone_and_merges_on_demand(tiny: str, settings: dict[str, Any]) -> None:
    rows = make_rows("pairs", 8)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    plain = alignkit.run("dpo", data=rows, lora=4, **settings)
    assert same(plain.model.unload(), base)
    assert (plain.folder / "model/adapter_model.safetensors").is_file()
    merged = alignkit.run("dpo", data=rows, lora=4, merge_adapter=True, **settings)
    loaded = AutoModelForCausalLM.from_pretrained(merged.folder / "model", dtype=torch.float32)
    assert not same(loaded, base)


def test_a_policy_that_came_with_an_adapter_is_trained_on_against_a_copy_of_itself(
    settings: dict[str, Any],
) -> None:
    rows = make_rows("pairs", 12)
    first = alignkit.run("sft", data=rows, lora=4, **settings)
    changes = {"model": str(first.folder / "model"), "learning_rate": None, "schedule": "constant"}
    again = alignkit.run("dpo", data=rows, eval_fraction=0.3, **settings | changes)
    written = read_metrics(again.folder)
    assert written[-2]["lr"] == 5e-6  # the method's rate for adapters
    # the reference is the model with its first adapter: at the start nothing has moved yet
    assert written[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert written[0]["eval/kl"] == pytest.approx(0, abs=1e-6)
    assert (again.folder / "model/adapter_config.json").is_file()


def test_gradient_checkpointing_changes_nothing(settings: dict[str, Any]) -> None:
    rows = make_rows("pairs", 8)
    settings |= {"max_steps": 3}
    plain = alignkit.run("dpo", data=rows, **settings)
    saving = alignkit.run("dpo", data=rows, gradient_checkpointing=True, **settings)
    close(saving.model, plain.model, 1e-6)


def test_no_copies_of_the_weights_in_16_bits_stay_beside_checkpointed_layers(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """With more layers a pass needs more memory for their inputs, not for their weights again."""
    peaks = []
    for n in (2, 6):
        write_tiny(tmp_path / str(n), num_hidden_layers=n, hidden_size=128, intermediate_size=256)
        own = {"model": str(tmp_path / str(n)), "precision": "bf16", "gradient_checkpointing": True}
        with Run("dpo", data=make_rows("pairs", 8), **settings | own) as run:
            run.read()
            state = run.build()
            batch = rank_batch(state, state.parts.stream[0])
            with Ledger() as ledger:
                state.parts.roles.policy(batch)
            peaks.append(sum(ledger.peak.values()))
    copies = 4 * 2 * (128 * 128 * 3 + 128 * 256 * 3)  # of four layers: q, k, v (k and v of half the heads), o, MLP
    assert peaks[1] - peaks[0] < copies / 3


def test_bf16_trains_with_float32_losses(settings: dict[str, Any]) -> None:
    rows = make_rows("pairs", 8)
    exact = alignkit.run("dpo", data=rows, **settings)
    mixed = alignkit.run("dpo", data=rows, precision="bf16", **settings)
    a, b = read_metrics(exact.folder), read_metrics(mixed.folder)
    assert a[0]["loss"] == pytest.approx(b[0]["loss"], abs=0.02)
    assert b[-1]["loss"] < b[0]["loss"]


def test_trackers_write_what_metrics_jsonl_holds(settings: dict[str, Any]) -> None:
    result = alignkit.run("dpo", data=make_rows("pairs", 8), trackers=["tensorboard"], **settings)
    assert list(settings["output"].rglob("events.out.tfevents*"))
    assert len(json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[0])) > 5


@pytest.mark.parametrize(("gib", "path"), [(1.0, 2), (0.0, 3)])
def test_kept_logits_gib_reaches_the_head_and_changes_no_result(
    gib: float, path: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    honest = type(linear_logps).plan
    monkeypatch.setattr(
        type(linear_logps), "plan", staticmethod(lambda *sizes: taken.append(honest(*sizes)) or taken[-1])
    )
    result = alignkit.run("sft", data=make_rows("pairs", 12), kept_logits_gib=gib, **settings | {"max_steps": 2})
    assert {plan.path for plan in taken} - {4} == {path}
    plain = alignkit.run("sft", data=make_rows("pairs", 12), **settings | {"max_steps": 2})
    close(result.model, plain.model, atol=1e-4)


def test_an_error_in_an_evaluation_leaves_dropout_as_it_was() -> None:
    from alignkit.engine.evaluation import evaluating

    model, modes = torch.nn.Dropout(0.5).train(), []

    def fail() -> None:
        with evaluating(model, dropout=True):
            modes.append(model.training)
            raise OSError("planted")

    with pytest.raises(OSError, match="planted"):
        fail()
    assert modes == [False]
    assert model.training
