"""Methods that sample: what a run writes, what its result depends on, and that it survives any end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from test_engine import close, same
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import alignkit
from alignkit.engine.loop import Loop
from alignkit.engine.rollouts import Online
from alignkit.errors import ConfigError, RewardError
from alignkit.models.scoring import Scorer
from alignkit.rollout.batched import Batched
from alignkit.runs.folder import read_metrics
from alignkit.testing.world import tiny_model, tiny_rows, tiny_tokenizer
from alignkit.types import Layout
from helpers import make_rows, write_tiny

METHODS = ["ppo", "grpo", "rloo", "reinforce", "online_dpo", "nash"]
LOGGED = {
    "loss", "kl", "entropy", "clip_fraction", "ratio/max", "completion/length", "completion/eos_rate",
    "completion/distinct_2", "seconds/sampling", "seconds/scoring", "seconds/learning",
}  # fmt: skip
OF_RATIOS = {"clip_fraction", "ratio/max"}


def reds(completions: list[str], **_: Any) -> list[float]:
    """How often a completion says red, less a little for every character."""
    return [text.count("red") - 0.01 * len(text) for text in completions]


def redder(first: list[str], second: list[str], **_: Any) -> list[float]:
    """P(the first says red more often)."""
    return [0.5 + 0.5 * (a > b) - 0.5 * (a < b) for a, b in zip(reds(first), reds(second), strict=True)]


@pytest.fixture
def online(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a short run of a method that samples."""
    rows = [{"prompt": r["prompt"], "tag": i} for i, r in enumerate(make_rows("text", 10))]
    sampling = {"max_new_tokens": 12, "batch_size": 8}
    return settings | {"data": rows, "max_steps": 4, "sampling": sampling, "save_every": 1, "learning_rate": 3e-3}


def asks(method: str) -> dict[str, Any]:
    """Who scores, and a group size that keeps tests small."""
    return {
        "nash": {"judge": redder},
        "ppo": {"reward": reds, "epochs_per_batch": 2, "minibatches": 2},
        "grpo": {"reward": reds, "group_size": 4, "epochs_per_batch": 2},
        "rloo": {"reward": reds, "group_size": 3},
        "reinforce": {"reward": reds, "beta": 0.1},
        "online_dpo": {"reward": reds, "group_size": 3},
    }[method]


def lines(folder: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_second", "seconds/")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in read_metrics(folder)]


def completions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_logs_what_it_sampled_and_where_its_time_went(method: str, online: dict[str, Any]) -> None:
    result = alignkit.run(method, eval_fraction=0.2, **online | asks(method))
    written = read_metrics(result.folder)
    assert [line["step"] for line in written] == [0, 1, 2, 3, 4, 4]
    for line in written[1:-1]:
        assert line.keys() >= (LOGGED - OF_RATIOS if method == "online_dpo" else LOGGED)
        assert line["kl"] >= 0
        assert line["entropy"] > 0
    said = completions(result.folder)
    size = {"grpo": 4, "rloo": 3, "online_dpo": 3}.get(method, 1)
    training = [s for s in said if s["training"]]
    assert [s["step"] for s in training] == sorted(4 * [*range(1, 5)] * size)
    assert [s["step"] for s in said if not s["training"]] == [0] * 2 * size + [4] * 2 * size
    score = "wins" if method == "nash" else "reward"
    for step in range(1, 5):
        own = [s[score] for s in training if s["step"] == step]
        assert written[step][f"{score}/mean"] == pytest.approx(sum(own) / len(own), abs=1e-6)
    if method != "nash":
        assert [s["reward"] for s in said] == pytest.approx(reds([s["completion"] for s in said]))
    texts = {r["prompt"] for r in online["data"]}
    assert {s["prompt"] for s in said} <= texts
    tokenizer = AutoTokenizer.from_pretrained(online["model"])
    for s in said:
        assert s["tokens"] <= 12
        assert s["ended"] == (len(tokenizer(s["completion"])["input_ids"]) < s["tokens"] or s["ended"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changed", [{"max_tokens": 60}, {"layout": "padded"}, {"sampling": {"batch_size": 3}}])
def test_the_result_does_not_depend_on_how_a_step_is_cut(
    method: str, changed: dict[str, Any], online: dict[str, Any]
) -> None:
    online |= asks(method) | {"max_steps": 2, "learning_rate": 1e-4}
    if "sampling" in changed:
        changed = {"sampling": online["sampling"] | changed["sampling"]}
    whole = alignkit.run(method, **online)
    cut = alignkit.run(method, **online | changed)
    texts = [[s["completion"] for s in completions(r.folder)] for r in (whole, cut)]
    assert texts[0] == texts[1]
    for a, b in zip(lines(whole.folder), lines(cut.folder), strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=5e-5, rel=5e-5), name


@pytest.mark.parametrize("method", [m for m in METHODS if m != "online_dpo"])
def test_the_first_update_has_a_ratio_of_one(method: str, online: dict[str, Any]) -> None:
    own = asks(method) | {"epochs_per_batch": 1, "minibatches": 1, "max_steps": 1}
    line = read_metrics(alignkit.run(method, **online | own).folder)[0]
    assert line["ratio/max"] == pytest.approx(1.0, abs=1e-5 if method == "ppo" else 0)
    assert line["clip_fraction"] == 0


class _KilledError(BaseException):
    """Stands for the end of the process."""


@contextmanager
def killed(point: str, step: int) -> Iterator[None]:
    """End the process at a point of a step: before it, while it samples or scores, or between two of its updates."""
    places = {"sampling": "sample", "scoring": "answers", "update": "_update", "step": "step"}
    owner: Any = Online if point in ("sampling", "scoring") else Loop
    original, begin = getattr(owner, places[point]), Loop.step
    now = {"step": -1, "updates": 0}

    def begun(self: Loop, number: int, total: int) -> Any:
        now["step"], now["updates"] = number, 0
        if point == "step" and number == step:
            raise _KilledError
        return begin(self, number, total)

    def dying(*args: Any, **kwargs: Any) -> Any:
        now["updates"] += point == "update"
        if now["step"] == step and now["updates"] in (0, 2):
            raise _KilledError
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if point != "step":
            patch.setattr(owner, places[point], dying)
        patch.setattr(Loop, "step", begun)
        with pytest.raises(_KilledError):
            yield


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("point", ["step", "sampling", "scoring", "update"])
@pytest.mark.parametrize("method", METHODS)
def test_killed_anywhere_and_resumed_it_equals_the_uninterrupted_run(
    method: str, point: str, lora: int | None, online: dict[str, Any]
) -> None:
    online |= asks(method) | {"lora": lora, "max_steps": 3, "eval_fraction": 0.2}
    if method not in ("ppo", "grpo"):  # these have several updates a step
        online["epochs_per_batch"] = 2
    whole = alignkit.run(method, **online, name="whole")
    with killed(point, 1):
        alignkit.run(method, **online, name="parts")
    parts = alignkit.run(method, **online, name="parts", resume=True)
    assert same(whole.model, parts.model)
    assert lines(whole.folder) == lines(parts.folder)
    assert completions(whole.folder) == completions(parts.folder)


def test_a_dead_reward_stops_the_run_with_a_checkpoint_and_it_goes_on(online: dict[str, Any]) -> None:
    def dying(prompts: list[str], completions: list[str], tag: list[int]) -> list[float]:
        calls.append(tag)
        if len(calls) == 3:
            raise ConnectionError("nobody listens")
        return reds(completions)

    calls: list[Any] = []
    own = asks("grpo") | {"save_every": None}
    whole = alignkit.run("grpo", **online | own | {"reward": reds}, name="whole")
    with pytest.raises(
        RewardError, match=r"(?s)dying.*nobody listens.*Stopped after step 2; continue with: alignkit run"
    ):
        alignkit.run("grpo", **online | own | {"reward": dying}, name="parts")
    assert [p.name for p in (online["output"] / "parts/checkpoints").iterdir()] == ["step-00000002"]
    assert [len(tags) for tags in calls] == [16, 16, 8]  # the column `tag`, once a completion
    parts = alignkit.run("grpo", **online | own | {"reward": dying}, name="parts", resume=True)
    assert same(whole.model, parts.model)


def test_a_reward_that_dies_in_an_evaluation_is_resumed_there(online: dict[str, Any]) -> None:
    def dying(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 6:  # evaluations of two parts at 0, two steps, the second part at 2
            raise ConnectionError("nobody listens")
        return reds(completions)

    calls: list[int] = []
    dying.__name__ = reds.__name__  # it names metrics
    own = asks("grpo") | {"save_every": None, "eval_every": 2, "eval_data": EIGHT}
    whole = alignkit.run("grpo", **online | own | {"reward": reds}, name="whole")
    with pytest.raises(RewardError, match="Stopped after step 2"):
        alignkit.run("grpo", **online | own | {"reward": dying}, name="parts")
    parts = alignkit.run("grpo", **online | own | {"reward": dying}, name="parts", resume=True)
    assert same(whole.model, parts.model)
    assert lines(whole.folder) == lines(parts.folder)
    assert completions(whole.folder) == completions(parts.folder)


EIGHT = [{"prompt": f"{i} red:", "tag": i} for i in range(8)]


def test_a_run_resumed_at_its_end_writes_nothing_twice(online: dict[str, Any]) -> None:
    whole = alignkit.run("rloo", **online | asks("rloo"), eval_fraction=0.2, name="mine")
    before = lines(whole.folder), completions(whole.folder)
    alignkit.run("rloo", **online | asks("rloo"), eval_fraction=0.2, name="mine", resume=True)
    assert (lines(whole.folder), completions(whole.folder)) == before


def test_patience_watches_the_reward_of_a_method_that_samples(online: dict[str, Any]) -> None:
    own = asks("grpo") | {"eval_every": 1, "patience": 2, "eval_data": EIGHT, "max_steps": 8, "learning_rate": 2e-2}
    result = alignkit.run("grpo", **online | own)
    rewards = {x["step"]: x["eval/reward/mean"] for x in read_metrics(result.folder) if "eval/reward/mean" in x}
    assert result.metrics["eval/reward/mean"] == max(rewards.values())
    with pytest.raises(
        ConfigError, match="has no held-out rows, which eval_data or eval_fraction would set; remove `patience`"
    ):
        alignkit.run("grpo", **online | asks("grpo") | {"patience": 2})


def test_one_bad_step_leaves_ppo_as_it_was(online: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch with a nan no update is made, it counts once, and the controller forgets it."""
    original = Online.rollouts

    def poisoned(self: Online, ctx: Any, *args: Any) -> Any:
        batch = original(self, ctx, *args)
        bad = batch["old_logps"] * (float("nan") if ctx.step == 1 else 1.0)
        return batch.attach(per_token={"old_logps": bad})

    monkeypatch.setattr(Online, "rollouts", poisoned)
    written = read_metrics(alignkit.run("ppo", **online | asks("ppo")).folder)
    assert [line["skipped"] for line in written] == [0, 1, 1, 1]
    assert all(0 < line["beta"] < 1 for line in written)
    assert written[-1]["loss"] is not None


def test_a_batch_is_given_up_before_the_update_that_would_go_too_far(
    online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = asks("ppo") | {"epochs_per_batch": 6, "max_update_kl": 1e-4, "max_steps": 1, "minibatches": 1}
    steps: list[int] = []
    original = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: steps.append(1) or original(self, *a, **k))
    line = read_metrics(alignkit.run("ppo", **online | own).folder)[0]
    assert line["update_kl"] > 1e-4
    assert len(steps) < 6


def test_where_memory_runs_out_while_sampling_or_scoring_less_is_done_at_once(
    online: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = asks("grpo") | {"max_steps": 1}
    whole = alignkit.run("grpo", **online | own)
    batch_rows, score = Batched._decoded, Scorer.forward

    def small_batches(self: Any, prompts: Any, rows: Any, numbers: Any) -> Any:
        if len(rows) > 3:
            raise torch.OutOfMemoryError
        return batch_rows(self, prompts, rows, numbers)

    def small_rows(self: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and len(rows.last_at) > 8:
            raise torch.OutOfMemoryError
        return score(self, rows, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignkit.engine.assemble.choose_layout", lambda *_: Layout("forest", 2048))
        patch.setattr(Batched, "_decoded", small_batches)
        patch.setattr(Scorer, "forward", small_rows)
        small = alignkit.run("grpo", **online | own)
    assert (
        "out of memory: continuing with 4 completions at a time in this batch, which changes no result" in caplog.text
    )
    assert "continuing with parts of 4096 tokens in this batch, which changes no result" in caplog.text
    assert [s["completion"] for s in completions(whole.folder)] == [s["completion"] for s in completions(small.folder)]
    close(whole.model, small.model, atol=1e-4)


def test_a_chat_models_completions_end_with_its_turn(online: dict[str, Any]) -> None:
    """Fine-tuned on turns that a special token closes, it stops there when it is sampled, and so do others with it."""
    tokenizer = AutoTokenizer.from_pretrained(online["model"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|turn|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    model = AutoModelForCausalLM.from_pretrained(online["model"], dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    turns = [{"prompt": [{"role": "user", "content": w}], "completion": " red fox"} for w in ("owl", "newt", "king")]
    given = {k: v for k, v in online.items() if k not in ("data", "sampling")} | {"batch_size": 3, "max_steps": 40}
    tuned = alignkit.run(
        "sft", **given | {"model": model, "tokenizer": tokenizer, "data": turns, "learning_rate": 1e-2}
    )
    saved = AutoModelForCausalLM.from_pretrained(tuned.folder / "model")
    end = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert saved.generation_config.eos_token_id == [tokenizer.eos_token_id, end]
    data = [{"prompt": row["prompt"]} for row in turns]
    own = asks("grpo") | {"model": str(tuned.folder / "model"), "data": data, "max_steps": 1, "batch_size": 3}
    said = completions(alignkit.run("grpo", **online | own).folder)
    assert sum(s["ended"] for s in said) >= len(said) - 1
    assert {s["completion"] for s in said if s["ended"]} == {" red fox"}


def test_without_a_kl_no_reference_is_loaded(online: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a reference was made")

    monkeypatch.setattr("alignkit.engine.references.Reference", refused)
    line = read_metrics(alignkit.run("grpo", **online | asks("grpo") | {"beta": 0.0}).folder)[-1]
    assert "kl" not in line
    with pytest.raises(AssertionError, match="a reference was made"):
        alignkit.run("grpo", **online | asks("grpo"))


def test_equal_rewards_change_nothing_and_are_counted(online: dict[str, Any], tiny: str) -> None:
    own = {"reward": lambda completions, **_: [1.0] * len(completions), "group_size": 4, "beta": 0.0}
    result = alignkit.run("grpo", **online | own)
    assert [line["advantage/zero_variance_groups"] for line in read_metrics(result.folder)] == [4, 4, 2, 4]
    assert same(result.model, AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32))


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_where_no_reward_applies_nothing_is_learned_and_it_is_counted(
    method: str, online: dict[str, Any], tiny: str
) -> None:
    sizes = {} if method == "ppo" else {"group_size": 4}
    online |= {"max_steps": 1, "beta": 0.0, **sizes}
    none = alignkit.run(method, reward=lambda completions: [None] * len(completions), name="none", **online)
    (line,) = [line for line in read_metrics(none.folder) if "loss" in line]
    assert line["loss"] == 0
    assert "reward/mean" not in line
    n = 4 * sizes.get("group_size", 1)
    assert (line["reward/unscored"], line["reward/unscored_groups"]) == (n, 4)
    assert same(none.model, AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32))

    def odd(completions: list[str]) -> list[float | None]:
        return [None if i % 2 else float(text.count("red")) for i, text in enumerate(completions)]

    half = alignkit.run(method, reward=odd, name="half", **online)
    (line,) = [line for line in read_metrics(half.folder) if "loss" in line]
    assert line["reward/unscored"] == n / 2
    written = [json.loads(text) for text in (half.folder / "completions.jsonl").read_text().splitlines()]
    assert [row["reward"] is None for row in written] == [False, True] * (n // 2)
    mean = sum(row["reward"] for row in written if row["reward"] is not None) / (n / 2)
    assert line["reward/mean"] == pytest.approx(mean)


@pytest.fixture
def reward_folder(online: dict[str, Any]) -> str:
    rows = make_rows("pairs", 16)
    settings = {k: v for k, v in online.items() if k not in ("data", "sampling")}
    return str(alignkit.run("reward", data=rows, name="reward", **settings).folder / "model")


def test_a_reward_model_is_a_plain_classifier_and_scores_as_it_did_in_training(
    online: dict[str, Any], reward_folder: str
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32)
    assert model.config.num_labels == 1
    result = alignkit.run("grpo", **online | asks("grpo") | {"reward": reward_folder, "max_steps": 1})
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    for said in completions(result.folder):
        ids = tokenizer(said["prompt"] + said["completion"])["input_ids"]
        ids += [tokenizer.eos_token_id] * said["ended"]
        with torch.no_grad():
            want = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
        if tokenizer.decode(ids) == said["prompt"] + said["completion"] + tokenizer.eos_token * said["ended"]:
            assert said["reward"] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("critic", ["policy", "shared", "reward", "auto"])
@pytest.mark.parametrize("lora", [None, 4])
def test_the_critic_learns_wherever_it_begins(
    critic: str, lora: int | None, online: dict[str, Any], reward_folder: str
) -> None:
    own = asks("ppo") | {"reward": reward_folder, "critic": critic, "lora": lora, "max_steps": 3}
    own |= {"critic_warmup_steps": 1, "critic_learning_rate": 1e-2, "name": f"ppo-{critic}"}
    written = read_metrics(alignkit.run("ppo", **online | own).folder)
    assert all(line["value"] > 0 for line in written)
    assert written[0]["ratio/max"] == pytest.approx(1.0, abs=1e-5)  # warming up: the policy has not moved
    assert abs(written[-1]["ratio/max"] - 1) > 1e-4


def test_a_critic_that_reads_other_tokens_is_refused(online: dict[str, Any], tmp_path: Path) -> None:
    write_tiny(tmp_path / "other", hidden_size=16)
    other = tmp_path / "other"
    model = AutoModelForSequenceClassification.from_pretrained(other, num_labels=1)
    model.resize_token_embeddings(400)
    model.save_pretrained(other)
    with pytest.raises(ConfigError, match="the critic has a vocabulary of 400 tokens and the policy one of 300"):
        alignkit.run("ppo", **online | asks("ppo") | {"critic": str(other)})
    with pytest.raises(ConfigError, match="critic: the folder 'nowhere' does not exist"):
        alignkit.run("ppo", **online | asks("ppo") | {"critic": "nowhere"})


def test_a_reward_model_with_other_tokens_scores_and_the_critic_begins_as_the_policy(
    online: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny(tmp_path / "other", hidden_size=16)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "other", num_labels=1)
    model.resize_token_embeddings(400)
    model.save_pretrained(tmp_path / "other")
    caplog.set_level("INFO", "alignkit")
    result = alignkit.run("ppo", **online | asks("ppo") | {"reward": str(tmp_path / "other"), "max_steps": 1})
    assert "the critic starts from the policy" in caplog.text
    assert "value" in result.metrics


def test_samples_are_scored_at_their_temperature(online: dict[str, Any]) -> None:
    """The logged log-probability of a sample, by the model's own forward in float64 at temperature 0.5."""
    cold = online["sampling"] | {"temperature": 0.5}
    tokenizer = tiny_tokenizer()  # of single characters, so that a text has one tokenisation
    given = {"model": tiny_model(), "tokenizer": tokenizer, "data": tiny_rows("prompts"), "sampling": cold}
    result = alignkit.run("ppo", **online | asks("ppo") | given | {"max_steps": 1})
    model = tiny_model(dtype=torch.float64)
    checked = 0
    for said in completions(result.folder):
        prompt = tokenizer(said["prompt"])["input_ids"]
        ids = prompt + tokenizer(said["completion"])["input_ids"] + [tokenizer.eos_token_id] * said["ended"]
        if len(ids) - len(prompt) != said["tokens"]:
            continue  # a special token was sampled, which the text leaves out
        with torch.no_grad():
            logps = (model(input_ids=torch.tensor([ids])).logits[0] / 0.5).log_softmax(-1)
        at = range(len(prompt), len(ids))
        assert said["logp"] == pytest.approx(sum(float(logps[i - 1, ids[i]]) for i in at), abs=1e-3)
        checked += 1
    assert checked


def test_what_a_method_needs_is_said_before_anything_is_loaded(online: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="'grpo' needs a reward: set `reward`"):
        alignkit.run("grpo", **online)
    with pytest.raises(ConfigError, match="'nash' needs a judge: set `judge`"):
        alignkit.run("nash", **online)
    with pytest.raises(ConfigError, match="'nash' does not use a reward; remove `reward`"):
        alignkit.run("nash", **online, judge=redder, reward=reds)
    with pytest.raises(ConfigError, match="reference: int8 would be whole on each rank; use reference: full"):
        alignkit.run("nash", **online, judge=redder, fsdp=True, reference="int8")
    with pytest.raises(ConfigError, match="samples from a mixture, which backend: continuous does not support"):
        alignkit.run("nash", **online | {"judge": redder, "rollout": {"backend": "continuous"}})
    with pytest.raises(ConfigError, match="backend: continuous does not support `stop`"):
        alignkit.run(
            "grpo", **online | {"reward": reds, "rollout": {"backend": "continuous"}, "sampling": {"stop": ["."]}}
        )
    assert not (online["output"]).exists()


@pytest.mark.parametrize("more", [{}, {"lora": {"r": 4}}, {"layout": "padded"}, {"attention": "eager"}])
def test_continuous_batching_samples_in_a_run_on_a_cpu(
    online: dict[str, Any], more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's own attention on a CPU is unknown to transformers, and is there again after sampling."""
    during: list[str] = []
    generate_batch = tf.GenerationMixin.generate_batch

    def watched(lm: Any, *args: Any, **options: Any) -> Any:
        during.append(lm.config._attn_implementation)
        return generate_batch(lm, *args, **options)

    monkeypatch.setattr(tf.GenerationMixin, "generate_batch", watched)
    given = {
        "device": "cpu",
        "max_steps": 2,
        "rollout": {"backend": "continuous"},
        "sampling": {"max_new_tokens": 6},
        "batch_size": 3,
    }
    result = alignkit.run("grpo", **online | asks("grpo") | given | more)
    after = result.model.config._attn_implementation
    assert len(during) == 2
    assert "alignkit_branches" not in during
    assert after == ("eager" if "attention" in more else "sdpa" if "layout" in more else "alignkit_branches")
    said = completions(result.folder)
    assert len(said) == 2 * 3 * 4
    assert all(1 <= line["tokens"] <= 6 for line in said)


def test_training_ends_where_held_out_rows_no_longer_gain_with_the_best_weights(settings: dict[str, Any]) -> None:
    rows = make_rows("pairs", 24)
    given = settings | {"max_steps": 60, "eval_every": 2, "patience": 3, "eval_fraction": 0.3, "learning_rate": 2e-2}
    result = alignkit.run("reward", data=rows, **given)
    losses = {line["step"]: line["eval/loss"] for line in read_metrics(result.folder) if "eval/loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) < 60
    assert max(losses) == best + 6
    assert result.metrics["eval/loss"] == losses[best]
    # resumed from before its end, it ends in the same place
    parts = given | {"save_every": 1, "keep_checkpoints": 100}
    whole = alignkit.run("reward", data=rows, name="whole", **parts)
    with killed("step", best + 3):
        alignkit.run("reward", data=rows, name="parts", **parts)
    again = alignkit.run("reward", data=rows, name="parts", resume=True, **parts)
    assert same(whole.model, again.model)
    assert same(whole.model, result.model)


def test_dropout_is_for_training_alone(settings: dict[str, Any]) -> None:
    """With weights that hardly move, a batch's training loss changes by its dropout, and an evaluation's does not."""
    config = tf.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, num_labels=1)
    model = tf.GPT2ForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    given = settings | {"model": model, "learning_rate": 1e-12, "batch_size": 6, "max_steps": 3}
    given |= {"tokenizer": settings["model"], "dtype": "float32", "eval_data": make_rows("pairs", 4, seed=1)}
    written = read_metrics(alignkit.run("reward", data=make_rows("pairs", 6), dropout_rate=0.5, **given).folder)
    losses = [line["loss"] for line in written if "loss" in line]
    assert len({round(loss, 5) for loss in losses}) == 3
    held_out = [line["eval/loss"] for line in written if "eval/loss" in line]
    assert held_out[0] == pytest.approx(held_out[-1], abs=1e-6)
    written = read_metrics(alignkit.run("reward", data=make_rows("pairs", 6), **given).folder)
    assert len({round(line["loss"], 5) for line in written if "loss" in line}) == 1


@pytest.mark.parametrize("method", ["grpo", "nash"])
def test_a_column_that_no_row_has_is_named_before_a_model_is_loaded(method: str, online: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"reward": "exact"} if method == "grpo" else {"judge": {"bradley_terry": "exact"}}
    with pytest.raises(RewardError, match="'exact' needs the column 'answer'; the rows have tag"):
        alignkit.run(method, **online | asked | {"model": tiny_model(), "tokenizer": online["model"]})
    assert not any(online["output"].glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_real_sigkill_at_any_time_is_survived(method: str, online: dict[str, Any], write_rows: Any) -> None:
    """Killed somewhere in the steps after a checkpoint, it leaves what the uninterrupted run leaves."""
    judged: dict[str, Any] = {"judge": {"bradley_terry": {"use": "length", "max": 5}}}
    scored = judged if method == "nash" else {"reward": {"use": "length", "max": 5}}
    given = online | asks(method) | {"data": str(write_rows(online["data"])), "method": method, **scored}
    given |= {
        "output": str(online["output"]),
        "max_steps": 14,
        "save_every": 2,
        "cache_file": str(online["cache_file"]),
    }
    whole = alignkit.run(**given, name="whole").folder
    file = online["output"] / "parts.yaml"
    file.write_text(json.dumps(given | {"name": "parts"}))
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "alignkit", "run", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
    folder = online["output"] / "parts"
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints/step-00000004").exists():
        assert process.poll() is None, process.stderr and process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.4))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    again = alignkit.run(**given, name="parts", resume=True).folder
    assert lines(again) == lines(whole)
    assert completions(again) == completions(whole)
    assert (again / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
