"""Sampling settings of one call of `ctx.rollouts`: greedy, another temperature, several calls in a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit import Batch, Context, Method, Models, Term
from alignkit.errors import PluginError
from alignkit.insight.health.watch import Watch
from alignkit.insight.report.run_files import read
from alignkit.rollout import sample
from alignkit.rollout.draws import checked
from alignkit.rollout_settings import Sampling
from alignkit.runs.folder import read_metrics
from alignkit.testing import tiny_model, tiny_tokenizer, train
from alignkit.testing.runs import interrupted_after
from alignkit_kernels import sequence_sum

TOKENIZER = tiny_tokenizer()


class Several(Method[Any]):
    """Samples three times in a step: as the run says, greedily, and at another temperature, which is learned."""

    name = "several"
    data = "prompts"
    uses = frozenset({"policy", "reference", "reward"})
    epochs_per_batch = 2

    def collect(self, batch: Batch, ctx: Context) -> Batch:
        ctx.rollouts(batch)
        ctx.rollouts(batch, greedy=True, name="greedy", logps=False)
        return ctx.rollouts(batch, name="cold", sampling={"temperature": 0.5, "max_new_tokens": 5})

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        logps = models.policy(batch).logps
        off = (logps.detach() - batch["old_logps"]).abs() + (batch.reference_logps - batch["old_logps"]).abs()
        losses = -batch["rewards"] * sequence_sum(logps, batch.cu_seqlens)
        return {"several": Term(losses, over="completions"), "off": Term(off, over="tokens", coef=0.0, largest=True)}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def ids_of(said: dict[str, Any]) -> tuple[list[int], int]:
    prompt = TOKENIZER(said["prompt"])["input_ids"]
    made = TOKENIZER(said["completion"])["input_ids"] + [TOKENIZER.eos_token_id] * said["ended"]
    return prompt + made, len(prompt)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    return train(Several, folder, name="run", max_steps=2, eval_fraction=0.3, learning_rate=1e-9).folder


def test_a_greedy_completion_has_the_most_likely_token_each_time() -> None:
    model, prompts = tiny_model(), ["hello? what", "a"]
    (one,), (two,) = sample(
        model, TOKENIZER, prompts, Sampling(max_new_tokens=9, temperature=3.0, top_k=2), greedy=True
    )
    for prompt, made in zip(prompts, (one, two), strict=True):
        ids = TOKENIZER(prompt)["input_ids"]
        for token in made.tokens:
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_continuous_batching_is_greedy_too() -> None:
    model, settings = tiny_model(), Sampling(max_new_tokens=6)
    got = sample(model, TOKENIZER, ["the fox. ", "a"], settings, greedy=True, backend="continuous")
    assert got == sample(model, TOKENIZER, ["the fox. ", "a"], settings, greedy=True)


def test_each_call_has_its_own_metrics_and_lines(run: Path) -> None:
    said, last = lines(run), read_metrics(run)[1]
    assert {"reward/mean", "greedy/reward/mean", "cold/reward/mean", "cold/completion/length"} <= last.keys()
    for name in (None, "greedy", "cold"):
        own = [s["reward"] for s in said if s["step"] == 1 and s["training"] and s.get("rollout") == name]
        assert len(own) == 4
        assert last[f"{name}/reward/mean" if name else "reward/mean"] == pytest.approx(sum(own) / 4, abs=1e-6)
    assert max(s["tokens"] for s in said if s.get("rollout") == "cold") <= 5
    assert all("logp" in s for s in said if s.get("rollout") != "greedy")
    assert not any("logp" in s for s in said if s.get("rollout") == "greedy")


def test_calls_of_one_step_do_not_share_noise(tmp_path: Path) -> None:
    class Twice(Several):
        def collect(self, batch: Batch, ctx: Context) -> Batch:
            ctx.rollouts(batch, name="first")
            return ctx.rollouts(batch, name="second")

    folder = train(Twice, tmp_path, name="run", max_steps=1).folder
    first, second = ([s["completion"] for s in lines(folder) if s["rollout"] == name] for name in ("first", "second"))
    assert len(first) == len(second) == 4
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_a_resumed_run_samples_the_same_in_every_call(tmp_path: Path) -> None:
    train(Several, tmp_path, name="whole")
    with interrupted_after(1):
        train(Several, tmp_path, name="parts")
    train(Several, tmp_path, name="parts", resume=True)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_completions_are_scored_at_the_temperature_of_their_call(run: Path) -> None:
    """By the model's own forward pass in float64; policy and reference agree before anything is learned."""
    model = tiny_model(dtype=torch.float64)
    checked_at = {0.5: 0, 1.0: 0}
    for said in lines(run):
        ids, start = ids_of(said)
        if "logp" not in said or len(ids) - start != said["tokens"] or said["step"] > 1:
            continue
        temperature = 0.5 if said.get("rollout") == "cold" else 1.0
        with torch.no_grad():
            logps = (model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
        want = sum(float(logps[i - 1, ids[i]]) for i in range(start, len(ids)))
        assert said["logp"] == pytest.approx(want, abs=1e-3)
        checked_at[temperature] += 1
    assert all(checked_at.values()), checked_at
    # the loss's own pass, the pass before it and the reference: at rate 1e-9 all three are one function
    assert read_metrics(run)[1]["off"] < 1e-4


def test_alarms_and_report_read_the_policys_samples_only(run: Path) -> None:
    rows = Watch.of(run, {})
    rows._offset = 0
    assert [row.get("rollout") for row in rows._rows(1, True)] == [None] * 4
    assert all("rollout" not in line for some in read(run, "run").answers for line in some)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"greedy": True, "n": 2}, "gives the same completion every time; n is 2"),
        ({"greedy": True, "sampling": {"temperature": 0.5}}, "draws nothing, so it has no 'temperature'"),
        ({"mixture": 0.5, "greedy": True}, "compares single samples"),
        ({"sampling": {"temprature": 0.5}}, r"cannot change 'temprature'\. Did you mean 'temperature'\?"),
        ({"sampling": {"batch_size": 2}}, "cannot change 'batch_size'"),
        ({"sampling": {"temperature": 0}}, "temperature: Input should be greater than 0"),
        ({"sampling": {"max_new_tokens": 13}}, "more than the run's sampling.max_new_tokens 12"),
        ({"name": ""}, "needs a name of its own"),
        ({"name": "a/b"}, "of letters, digits, _ and -"),
    ],
)
def test_a_call_that_contradicts_itself_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(PluginError, match=said):
        checked(Sampling(max_new_tokens=12), [""], **{"name": "other", **asked})


def test_a_method_that_reads_pairs_cannot_sample(tmp_path: Path) -> None:
    class Pairs(Several):
        data = "pairs"
        uses = frozenset({"policy"})

    with pytest.raises(PluginError, match=r"reads pairs; ctx\.rollouts is for methods with data = 'prompts'"):
        train(Pairs, tmp_path)
