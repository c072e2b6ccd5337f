"""The demo: its world is sound, its judge is right, and it runs from nothing to a table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit import registry
from alignkit.demo import before_after, recipes, verdict, world
from alignkit.engine import Engine
from alignkit.errors import ConfigError, PluginError
from alignkit.runs.folder import read_metrics
from helpers import ADVISED, write_plugin

METHODS = ["bco", "cpo", "dpo", "grpo", "ipo", "kto", "nash", "online_dpo", "orpo", "ppo", "reinforce", "rloo", "simpo"]


@given(st.integers(0, 50))
def test_held_out_questions_are_new_and_their_facts_are_not(seed: int) -> None:
    train, held_out = world.questions(seed)
    assert not {q.prompt for q in train} & {q.prompt for q in held_out}
    assert {q.fact for q in held_out} <= {q.fact for q in train}
    assert world.questions(seed) == (train, held_out)


def test_the_judge_wants_the_right_fact_and_then_the_brief_style() -> None:
    fact = "The fox is red."
    answers = [
        " The fox is red.",
        " What a lovely question! The fox is red. I hope that this helps!",
        " The fox is blue.",
    ]
    assert [world.score(fact, answer) for answer in answers] == [2, 1, 0]
    assert world.score(fact, " The fox is red. The fox is red.") == 1
    assert verdict.reward(answers, [fact] * 3) == [1, 0.5, 0]
    assert verdict.judge([answers[0]] * 3, answers, [fact] * 3) == [0.5, 1, 1]
    assert verdict.judge(answers, [answers[1]] * 3, [fact] * 3) == [1, 0.5, 0]


def test_the_base_is_trained_on_both_styles_alike() -> None:
    train, _ = world.questions(0)
    answers = [row["completion"] for row in world.sft_rows(train)]
    assert sum(a in {q.brief for q in train} for a in answers) == len(train) == len(answers) / 2
    assert all(r["chosen"] != r["rejected"] for r in world.pair_rows(train))


def test_a_method_that_the_demo_lacks_is_named_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the demo has no 'dpoo'; it has bco, cpo, dpo, .* Did you mean 'dpo'\?"):
        before_after.run_demo("dpoo", tmp_path, 0)


def test_every_method_that_trains_a_policy_is_offered_but_that_of_the_base() -> None:
    assert recipes.offered() == METHODS
    assert (recipes.best("pairs"), recipes.base_trainer(), recipes.best("pairs", "reward")) == ("dpo", "sft", "reward")


def test_without_a_method_for_the_base_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [plugin for plugin in registry.plugins() if plugin.name != "sft"]
    monkeypatch.setattr(registry, "plugins", lambda: others)
    with pytest.raises(PluginError, match="can fine-tune its base; try: pip install alignkit-sft"):
        before_after.run_demo("dpo", Path("nowhere"), 0)


TEXT = """
    from alignkit import Advice, Method, Term, hookimpl

    class Stranger(Method):
        name = "stranger"
        data = "text"

        @classmethod
        def advice(cls, facts):
            return Advice(100, "the best")

        def loss(self, batch, models):
            return {"nll": Term(-models.policy(batch).logps, over="tokens")}

    @hookimpl
    def register_methods():
        return [Stranger]
"""


@pytest.mark.parametrize("extra", ["", 'demo_base = {"learning_rate": 1e-9}'])
def test_a_strangers_method_for_texts_does_not_train_the_base(
    extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = TEXT.replace('data = "text"', f'data = "text"\n        {extra}')
    monkeypatch.syspath_prepend(write_plugin(tmp_path, "stranger", code, "a-method"))
    assert registry.get("stranger").data == "text"
    assert (recipes.base_trainer(), recipes.best("pairs")) == ("sft", "dpo")
    assert recipes.base_settings()["learning_rate"] == 3e-3
    assert recipes.offered() == sorted([*METHODS, "stranger"])


def test_without_the_built_in_one_a_stranger_trains_the_base_at_its_own_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = TEXT.replace('data = "text"', 'data = "text"\n        demo_base = {"learning_rate": 1e-5}')
    monkeypatch.syspath_prepend(write_plugin(tmp_path, "stranger", code, "a-method"))
    others = [plugin for plugin in registry.plugins() if plugin.name != "sft"]
    monkeypatch.setattr(registry, "plugins", lambda: others)
    assert (recipes.base_trainer(), recipes.base_settings()) == ("stranger", {"learning_rate": 1e-5})


def test_the_trainer_of_the_base_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the demo trains its base with 'sft'; choose the next method: bco, cpo, dpo"):
        before_after.run_demo("sft", tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_broken_advice_stops_nobody_else_in_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = ADVISED.replace("if facts.length_bias is None:", "exit('bye')\n            if True:")
    monkeypatch.syspath_prepend(write_plugin(tmp_path, "stranger", code))
    assert recipes.best("pairs") == "dpo"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("[1]", r"= \[1\]; it must be a mapping of settings"),
        ("{'taau': 1}", "'taau', which is not a setting of the method or of the run. Did you mean 'tau'"),
        ("{3: 1}", "with 3, which is not a setting"),
        *((f"{{'{key}': 1}}", f"with '{key}', which the demo sets itself") for key in (
            "model", "data", "eval_data", "name", "output", "method", "resume",
        )),
    ],
)  # fmt: skip
def test_names_in_demo_settings_are_checked_with_the_class(
    settings: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.sub(r"demo_settings = .*", f"demo_settings = {settings}", ADVISED)
    monkeypatch.syspath_prepend(write_plugin(tmp_path, "stranger", code))
    with pytest.raises(PluginError, match=f"method 'stranger' has demo_settings .*{problem}"):
        registry.get("stranger")


def test_values_of_demo_settings_are_checked_before_the_base_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.get("dpo"), "demo_settings", {"beta": -1, "epochs": 0})
    monkeypatch.setattr(recipes, "train_base", lambda *_: pytest.fail("trained"))
    with pytest.raises(PluginError, match=r"the demo_settings of 'dpo' cannot be used: epochs: .*; beta: "):
        before_after.run_demo("dpo", tmp_path, 0)
    monkeypatch.setattr(registry.get("reward"), "demo_settings", {"epochs": 0})  # PPO needs it first
    with pytest.raises(PluginError, match="the demo_settings of 'reward' cannot be used: epochs: "):
        before_after.run_demo("ppo", tmp_path, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("own", [{"sampling": {"temperature": 0.5}}, {"sampling.temperature": 0.5}])
def test_a_methods_own_sampling_wins_over_the_demos(own: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.get("grpo"), "demo_settings", own)
    sampling = recipes.recipe("grpo")["sampling"]
    assert (sampling["temperature"], sampling["max_new_tokens"]) == (0.5, recipes.LENGTH.max_new_tokens)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the bases that the demos of this session share."""
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(autouse=True)
def _own_bases(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNKIT_DEMO", str(bases))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of few questions and steps."""
    base = registry.get("sft")
    monkeypatch.setattr(base, "demo_base", {**base.demo_base, "epochs": 2})
    monkeypatch.setitem(recipes.SHARED, "epochs", 1)
    monkeypatch.setattr(world, "CREATURES", world.CREATURES[:6])


@pytest.mark.usefixtures("small")
def test_a_strangers_method_runs_with_its_own_settings(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(write_plugin(tmp_path / "site", "stranger", ADVISED))
    code, out, err = command("demo", "--method", "stranger", "--output", tmp_path / "runs")
    assert code == 0, err
    assert "after stranger" in out
    run = tmp_path / "runs/demo-stranger-001/stranger"
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["learning_rate"], settings["tau"], settings["batch_size"]) == (5e-4, 0.3, 16)
    assert "eval/stranger" in read_metrics(run)[-1]
    assert (run / "model/model.safetensors").is_file()


@pytest.mark.usefixtures("small")
def test_a_base_is_trained_once_and_again_where_it_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNKIT_DEMO", str(tmp_path / "bases"))
    train, _ = world.questions(0)

    def base(name: str) -> recipes.Base:
        return recipes.train_base(Engine(output=tmp_path / name), tmp_path / name / "data", train, 0)

    first, second = base("a"), base("b")
    assert (second.folder.parent, (tmp_path / "b/sft").exists()) == (tmp_path / "bases", False)
    weights = [one.model.state_dict()["model.embed_tokens.weight"] for one in (first, second)]
    assert torch.equal(*weights)
    (second.folder / "model.safetensors").write_bytes(b"damaged")
    third = base("c")
    assert third.folder == tmp_path / "c/sft/model"
    assert torch.equal(third.model.state_dict()["model.embed_tokens.weight"], weights[0])
    assert base("d").folder == second.folder
    monkeypatch.setattr(registry.get("sft"), "demo_base", {"epochs": 1, "learning_rate": 1e-5})
    assert base("e").folder == tmp_path / "e/sft/model"


@pytest.mark.parametrize(
    ("facts", "says"), [([2, 2, 1, 0], "(75% -> 75%);"), ([2, 0, 0, 0], "(75% -> 25%, some are lost)")]
)
def test_a_loss_of_facts_is_said(facts: list[int], says: str) -> None:
    before, after = (before_after.Evaluation([], scores, 0.5, 0.0, None) for scores in ([2, 1, 1, 0], facts))
    line = before_after._meaning("dpo", before, after)
    assert line.startswith(f"dpo was to make the preferred style more frequent (25% -> {after.rate(2):.0%})")
    assert says in line


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("method", [m for m in METHODS if m != "grpo"])  # see the next test
def test_it_runs_from_nothing_to_a_table_and_leaves_what_it_promises(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cls = registry.get(method)
    monkeypatch.setattr(cls, "demo_settings", {**cls.demo_settings, "epochs": 1})
    last = before_after.run_demo(method, tmp_path, 0)
    check_what_a_demo_leaves(method, tmp_path, capsys.readouterr().out, last)


def check_what_a_demo_leaves(method: str, tmp_path: Path, table: str, last: str) -> None:
    for row in ("win rate against the base", "preference accuracy", "KL to the base (nats per sequence)", "question"):
        assert row in table
    folder = tmp_path / f"demo-{method}-001"
    assert str(folder / method / "model") in last
    assert f"alignkit run {folder / method / 'config.yaml'} --name again" in last
    assert "eval/loss" in read_metrics(folder / method)[-1]
    model = AutoModelForCausalLM.from_pretrained(folder / method / "model")
    ids = AutoTokenizer.from_pretrained(folder / method / "model")("Question:", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    online = registry.get(method).data == "prompts"
    rows = [json.loads(line) for line in (folder / f"data/{'prompts' if online else 'pairs'}.jsonl").open()]
    assert set(rows[0]) == ({"prompt", "fact"} if online else {"prompt", "chosen", "rejected"})
    assert ("mean reward" in table) == online
    assert (folder / "reward/model").is_dir() == (method == "ppo")


@pytest.mark.slow
def test_grpo_raises_the_reward_near_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = before_after.run_demo("grpo", tmp_path, 0)
    table = capsys.readouterr().out
    check_what_a_demo_leaves("grpo", tmp_path, table, last)
    figures = dict(re.findall(r"^ (\w[^%\d]+?) +[\d.%-]+ +([\d.]+)", table, re.MULTILINE))
    assert float(figures["mean reward"]) > 0.85
    assert float(figures["win rate against the base"]) > 60
    assert 0.1 < float(figures["KL to the base (nats per sequence)"]) < 10
