"""`alignkit recommend` and `alignkit init`: what rows can serve, what is said of it, and a config that runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignkit import registry
from alignkit.config import split
from alignkit.errors import ConfigError
from alignkit.insight.recommend import Recommendation, fit, recommend
from helpers import ADVISED, make_rows, write_plugin

Rows = list[dict[str, Any]]
PAIRS = {"cpo", "dpo", "ipo", "orpo", "reward", "simpo"}
SAMPLING = {"grpo", "nash", "online_dpo", "ppo", "reinforce", "rloo"}


def served(found: Recommendation) -> set[str]:
    return {o.method for o in (found.first, *found.also) if o is not None}


def values(found: Recommendation) -> dict[str, Any]:
    return {choice.name: choice.value for choice in found.settings}


def reason(found: Recommendation, method: str) -> str:
    return next(o.reason for o in (found.first, *found.also) if o is not None and o.method == method)


def noisy_rows(same: int, against: int, others: int = 0) -> Rows:
    """Pairs that are judged twice, so many of them the same way and the other way round, and others judged once."""
    rows = make_rows("pairs", same + against + others)
    again = [dict(row) for row in rows[:same]]
    again += [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[same : same + against]]
    return rows + again


# ------------------------------------------------------------------------------------------------- which methods


@pytest.mark.parametrize(
    ("kind", "first", "others"),
    [
        ("pairs", "dpo", PAIRS | {"bco", "kto", "sft"}),
        ("unpaired", "kto", {"bco", "kto", "sft"}),
        ("text", "sft", {"sft"}),
    ],
)
def test_what_each_kind_of_rows_serves(kind: str, first: str, others: set[str]) -> None:
    found = recommend(make_rows(kind, 60))
    assert found.first is not None
    assert found.first.method == first
    assert served(found) == others
    assert set(found.refused) == set(registry.names()) - others
    assert all(o.reason for o in (found.first, *found.also))
    assert "give --reward" in found.refused["grpo"]
    assert "give --judge" in found.refused["nash"]


def test_prompts_alone_serve_nothing_and_it_is_said_what_is_missing() -> None:
    found = recommend([{"prompt": f"{i}?"} for i in range(30)])
    assert found.first is None
    assert served(found) == set()
    assert "needs pairs" in found.refused["dpo"]
    assert {name for name, why in found.refused.items() if "give --" in why} == SAMPLING


@pytest.mark.parametrize(
    ("answers", "reward"),
    [
        (["#### 72", "so \\boxed{3}", "1/2", "$1,250.50", "-3 km", "40 %", ".5", "\\frac{3}{4}", "1e-3"], "numeric"),
        (["72", "Vitamin B12", "World War 2"], "exact"),
        (["2020-01-02", "12:30", "4th", "3D", "1,2,3", "7 and 8"], "exact"),
        (["Paris", "London", "Rome"], "exact"),
        ([72, 3.5, 1], "numeric"),
    ],
)
def test_an_answer_that_can_be_checked_is_a_reward(answers: list[Any], reward: str) -> None:
    found = recommend([{"prompt": f"{i}?", "answer": a} for i, a in enumerate(answers * 10)])
    assert found.first is not None
    assert found.first.method == "grpo"
    assert served(found) == SAMPLING - {"nash"}
    assert values(found)["reward"] == reward


@pytest.mark.parametrize("answer", [None, "", "words " * 20, ["a"], math.nan, math.inf, True])
def test_one_answer_that_cannot_be_checked_spoils_it(answer: Any) -> None:
    rows = [{"prompt": f"{i}?", "answer": "Paris"} for i in range(20)]
    assert recommend([*rows, {"prompt": "last?", "answer": answer}]).first is None


def test_a_reward_decides_for_methods_that_sample() -> None:
    found = recommend(make_rows("pairs", 60), reward="json")
    assert [o.method for o in (found.first, *found.also) if o][:4] == ["grpo", "rloo", "ppo", "dpo"]
    assert values(found)["reward"] == "json"


@pytest.mark.parametrize("spec", [{"ensemble": ["json", {"use": "llm", "url": "http://localhost:1/v1", "model": "m"}]}])
def test_a_reward_that_is_a_model_is_begun_with_rloo(spec: Any) -> None:
    found = recommend(make_rows("pairs", 60), reward=spec)
    assert found.first is not None
    assert found.first.method == "rloo"


def test_a_judge_decides_for_nash() -> None:
    found = recommend(make_rows("pairs", 60), judge={"bradley_terry": "json"})
    assert found.first is not None
    assert found.first.method == "nash"
    assert values(found)["judge"] == {"bradley_terry": "json"}


def test_a_method_that_is_named_comes_first_and_one_that_cannot_be_served_is_refused() -> None:
    rows = make_rows("pairs", 60)
    found = recommend(rows, method="kto")
    assert found.first is not None
    assert found.first.method == "kto"
    assert served(found) == PAIRS | {"bco", "kto", "sft"}
    with pytest.raises(ConfigError, match=r"'grpo' cannot be used: .* give --reward"):
        recommend(rows, method="grpo")
    with pytest.raises(ConfigError, match="'dpo' cannot be used: it needs pairs"):
        recommend(make_rows("unpaired", 60), method="dpo")


PLAIN = """
    from pydantic import Field
    from alignkit import Method, MethodConfig, Term, hookimpl


    class Stranger(Method):
        name = "stranger"
        data = "{data}"
        uses = frozenset({{"policy", "{role}"}})

        class Config(MethodConfig):
            tau: float = Field(0.7, description="how strange")

        def loss(self, batch, models):
            return {{}}


    @hookimpl
    def register_methods():
        return [Stranger]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Install a distribution with the method "stranger"."""
    return lambda code: monkeypatch.syspath_prepend(write_plugin(tmp_path / "site", "stranger", code))


@pytest.mark.parametrize(("data", "role"), [("pairs", "reference"), ("prompts", "judge"), ("unpaired", "policy")])
def test_a_strangers_method_without_advice_is_judged_by_its_rows_and_roles(
    data: str, role: str, install: Callable[[str], None]
) -> None:
    install(PLAIN.format(data=data, role=role))
    found = recommend(make_rows("pairs", 60))
    if role == "judge":
        assert "--judge" in found.refused["stranger"]
        return
    assert reason(found, "stranger") == f"reads rows of the kind '{data}'; see its documentation"
    ranks = {o.method: o.rank for o in (found.first, *found.also) if o}
    assert min(ranks.values()) < ranks["stranger"] < max(ranks.values())
    chosen = recommend(make_rows("pairs", 60), method="stranger")
    assert values(chosen)["tau"] == 0.7
    assert next(c.why for c in chosen.settings if c.name == "tau") == "how strange"


def test_a_docstring_is_the_reason_of_a_method_without_advice(install: Callable[[str], None]) -> None:
    install(
        PLAIN.format(data="pairs", role="policy").replace("name =", '"""Learns twice.\n\n    More."""\n        name =')
    )
    assert reason(recommend(make_rows("pairs", 60)), "stranger") == "Learns twice"


def test_a_strangers_advice_is_followed(
    install: Callable[[str], None], command: Callable[..., Any], write_rows: Callable[..., str]
) -> None:
    install(ADVISED)
    rows = [{"prompt": f"{i}?", "chosen": "a b c", "rejected": "a"} for i in range(60)]
    found = recommend(rows)
    assert found.first is not None
    assert found.first.reason == "made for this: the longer answer is chosen in 100% of the pairs that differ in length"
    # once: a setting that the method advises takes the place of the run's word on it
    assert [(c.value, c.why) for c in found.settings if c.name == "tau"] == [(0.2, "half of the bias")]
    code, out, err = command("recommend", "--data", write_rows(rows))
    assert (code, err) == (0, "")
    assert "start with stranger: made for this: the longer answer" in out
    clean = recommend(make_rows("pairs", 60))
    assert clean.refused["stranger"] == "nothing to learn: answers are of like lengths"
    assert served(clean) == PAIRS | {"bco", "kto", "sft"}


@pytest.mark.parametrize(
    ("advice", "problem"),
    [
        ("1 / 0", "the advice of 'stranger' failed: ZeroDivisionError: division by zero"),
        ("exit('bye')", "the advice of 'stranger' failed: SystemExit: bye"),
        ("(90, 'good')", "the advice of 'stranger' must be an alignkit.Advice, got tuple"),
        ("Advice(101, 'good')", "has rank 101; it must be an integer from 0 to 100, or None"),
        ("Advice(True, 'good')", "has rank True; it must be an integer from 0 to 100, or None"),
        ("Advice('9', 'good')", "has rank '9'; it must be an integer from 0 to 100, or None"),
        ("Advice(9, ' ')", "has the reason ' '; it must be a text that is not empty"),
        ("Advice(9, None)", "has the reason None; it must be a text that is not empty"),
        ("Advice(9, 'good', None)", "has settings None; they must be a sequence of alignkit.Choice"),
        ("Advice(9, 'good', Choice('tau', 1, 'so'))", "they must be a sequence of alignkit.Choice"),
        ("Advice(9, 'good', [('tau', 1, 'so')])", "has ('tau', 1, 'so') in its settings; each must be an alignkit.Ch"),
        ("Advice(9, 'good', [Choice('taau', 1, 'so')])", "not a setting of the method (tau). Did you mean 'tau'?"),
        ("Advice(9, 'good', [Choice(3, 1, 'so')])", "sets 3, which is not a setting of the method (tau)."),
        ("Advice(9, 'good', [Choice('tau', -1, 'so')])", "does not accept: tau: Input should be greater than 0"),
        ("Advice(9, 'good', [Choice('tau', 1, '')])", "has the reason for tau ''; it must be a text that is not empty"),
        ("Advice(9, 'good', [Choice('tau', __import__('numpy').float64(1), 'so')])", "it must be a plain YAML value"),
    ],
)
def test_broken_advice_is_reported_and_stops_nobody_else(
    advice: str, problem: str, install: Callable[[str], None]
) -> None:
    install(ADVISED.replace("if facts.length_bias is None:", f"return {advice}\n            if True:"))
    found = recommend(make_rows("pairs", 60))
    assert found.refused["stranger"].startswith("it is broken: the advice of 'stranger' ")
    assert problem in found.refused["stranger"]
    assert "\n" not in found.refused["stranger"]
    assert served(found) == PAIRS | {"bco", "kto", "sft"}
    with pytest.raises(ConfigError, match="'stranger' cannot be used: it is broken: the advice"):
        recommend(make_rows("pairs", 60), method="stranger")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("raise KeyError('oh')", "roles() of 'stranger' failed: KeyError: 'oh'"),
        ("exit('bye')", "roles() of 'stranger' failed: SystemExit: bye"),
        ("return {'critic'}", "roles() of 'stranger' must return a set of policy, got {'critic'}"),
        ("return 'policy'", "roles() of 'stranger' must return a set of policy, got 'policy'"),
    ],
)
@pytest.mark.parametrize("data", ["pairs", "prompts"])
def test_a_method_whose_roles_fail_is_broken_and_stops_nobody_else(
    data: str, body: str, problem: str, install: Callable[[str], None]
) -> None:
    code = PLAIN.format(data=data, role="policy").replace(
        "        def loss", f"        def roles(self):\n            {body}\n\n        def loss"
    )
    install(code)
    found = recommend(make_rows("pairs", 60))
    assert found.refused["stranger"].startswith(f"it is broken: {problem}")
    assert served(found) == PAIRS | {"bco", "kto", "sft"}


def test_a_setting_that_a_subclass_lacks_is_not_advised(install: Callable[[str], None]) -> None:
    parent = """
    class Heir(Stranger):
        name = "stranger"

        class Config(MethodConfig):
            beta: float = Field(0.5, description="what it has")

        def loss(self, batch, models):
            return {}


    @hookimpl"""
    install(ADVISED.replace("    @hookimpl", parent.lstrip("\n")).replace("return [Stranger]", "return [Heir]"))
    found = recommend([{"prompt": f"{i}?", "chosen": "a b c", "rejected": "a"} for i in range(60)])
    assert found.first is not None
    assert found.first.method == "stranger"
    assert values(found)["beta"] == 0.5
    assert "tau" not in values(found)


def test_texts_of_advice_become_one_line(install: Callable[[str], None]) -> None:
    install(ADVISED.replace('f"made for this: {facts.length_bias}"', "' made\\n for  this '"))
    found = recommend([{"prompt": f"{i}?", "chosen": "a b c", "rejected": "a"} for i in range(60)])
    assert reason(found, "stranger") == "made for this"


@pytest.mark.parametrize("docstring", ["", " ", "\n", "."])
def test_a_blank_docstring_is_no_reason(docstring: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.get("cpo"), "__doc__", docstring)
    monkeypatch.delattr(registry.get("cpo"), "advice")
    expected = "reads rows of the kind 'pairs'; see its documentation"
    assert reason(recommend(make_rows("pairs", 60)), "cpo") == expected


def test_a_broken_method_is_listed_as_such(install: Callable[[str], None]) -> None:
    install("raise RuntimeError('oh')\n")
    assert "broken" in recommend(make_rows("pairs", 60)).refused["stranger"]


# -------------------------------------------------------------------------------------------- what the rows tell


def test_noise_is_estimated_from_pairs_that_are_judged_twice() -> None:
    found = recommend(noisy_rows(same=41, against=9))
    # 2 e (1 - e) = 9 / 50, so e = (1 - sqrt(1 - 0.36)) / 2 = 0.1
    assert found.facts.data.flipped == pytest.approx(0.1)
    assert values(found)["label_smoothing"] == 0.1
    assert values(found)["loss_type"] == "robust"
    # and the other methods that were made for it move up
    order = [o.method for o in (found.first, *found.also) if o]
    assert order[:3] == ["dpo", "ipo", "kto"]
    assert "noisy" in reason(found, "kto")


def test_noise_that_cannot_be_estimated_is_guessed_and_said_to_be() -> None:
    found = recommend(noisy_rows(same=0, against=4, others=60))
    assert found.facts.data.flipped is None
    assert values(found)["label_smoothing"] == 0.1
    assert "loss_type" not in values(found)  # robust wants to know the part
    assert any("the 10 % are a guess" in c.why for c in found.settings)


def test_many_ties_count_as_noise_and_few_do_not() -> None:
    def judged(n_ties: int) -> Rows:
        winners = ["tie"] * n_ties + ["a"] * (40 - n_ties)
        return [
            {"prompt": f"{i}?", "winner": w, "response_a": "yes", "response_b": "no"} for i, w in enumerate(winners)
        ]

    assert "label_smoothing" in values(recommend(judged(4)))
    assert "label_smoothing" not in values(recommend(judged(3)))


def test_clean_pairs_get_no_smoothing() -> None:
    found = recommend(make_rows("pairs", 60))
    assert found.facts.data.noisy is None
    assert not values(found).keys() & {"label_smoothing", "loss_type", "ld_alpha"}
    assert "With clean pairs DPO comes first" in reason(found, "kto")


@pytest.mark.parametrize(("chosen", "rejected", "which"), [("a b c", "a", "longer"), ("a", "a b c", "shorter")])
def test_a_lean_to_length_is_answered(chosen: str, rejected: str, which: str) -> None:
    found = recommend([{"prompt": f"{i}?", "chosen": chosen, "rejected": rejected} for i in range(60)])
    assert found.facts.data.length_bias == f"the {which} answer is chosen in 100% of the pairs that differ in length"
    assert values(found)["ld_alpha"] == 0.5
    assert found.also[0].method == "simpo"


def test_a_lean_that_is_little_is_none() -> None:
    # 54 % of 4,000: beyond chance, and below 55 %
    rows = [
        {"prompt": f"{i}?", "chosen": "aa" if i % 100 < 54 else "a", "rejected": "a" if i % 100 < 54 else "aa"}
        for i in range(4000)
    ]
    found = recommend(rows)
    assert found.facts.audit.biases[0].beyond_chance
    assert found.facts.data.length_bias is None


def test_ktos_weights_are_in_its_settings() -> None:
    rows = [{"prompt": f"{i}?", "completion": "yes", "label": i % 5 == 0} for i in range(100)]
    assert values(recommend(rows))["desirable_weight"] == 4.0  # 20 are good and 80 bad


def test_few_rows_get_adapters_small_steps_and_their_rate() -> None:
    found = recommend(make_rows("pairs", 200))
    assert values(found)["lora"] == 16
    assert values(found)["learning_rate"] == registry.get("dpo").lora_learning_rate
    assert values(found)["batch_size"] == 8  # 190 of them are trained on, 190 / 20 = 9.5
    assert values(recommend(make_rows("unpaired", 200)))["batch_size"] == 16  # KTO's baseline wants more
    many = recommend(make_rows("pairs", 1000))
    assert "lora" not in values(many)
    assert values(many)["learning_rate"] == registry.get("dpo").learning_rate
    assert values(many)["batch_size"] == 32


def test_rows_are_held_out_where_there_are_enough_prompts(write_rows: Callable[..., str]) -> None:
    assert values(recommend(make_rows("pairs", 300)))["eval_fraction"] == 0.05
    assert values(recommend(make_rows("pairs", 100)))["eval_fraction"] == 0.1
    assert "eval_fraction" not in values(recommend(make_rows("pairs", 19)))
    held = write_rows(make_rows("pairs", 5, seed=9), "held.jsonl")
    given = values(recommend(make_rows("pairs", 300), eval_data=held))
    assert given["eval_data"] == held
    assert "eval_fraction" not in given


def test_a_model_without_a_chat_template_may_be_a_base_model(tiny: str) -> None:
    assert "base model without SFT" in reason(recommend(make_rows("pairs", 60), model=tiny), "orpo")
    assert "base model without SFT" not in reason(recommend(make_rows("pairs", 60)), "orpo")


def test_answers_that_would_be_cut_raise_the_budget(tiny: str) -> None:
    long = [{"prompt": f"{i}:", "chosen": "red fox " * 700, "rejected": "blue owl " * 600} for i in range(30)]
    found = recommend(long, model=tiny)
    assert found.facts.audit.budgets is not None
    assert found.facts.audit.budgets.answers_cut == 60
    chosen = next(length for length in found.facts.audit.lengths if length.part == "chosen")
    assert values(found)["max_completion_tokens"] == 64 * math.ceil(chosen.longest / 64)


# ----------------------------------------------------------------------------------------- settings that there are


@pytest.mark.parametrize("rows", [noisy_rows(41, 9), noisy_rows(0, 4, 60), make_rows("pairs", 1200)], ids=len)
@pytest.mark.parametrize("method", sorted(PAIRS | {"bco", "kto", "sft"} | SAMPLING))
def test_what_is_advised_is_accepted(rows: Rows, method: str) -> None:
    rows = [{**row, "chosen": row["chosen"] + " and more"} for row in rows]
    given = {"reward": "json"} if method != "nash" else {"judge": {"bradley_terry": "json"}}
    found = recommend(rows, method=method, **(given if method in SAMPLING else {}))
    cls = registry.get(method)
    run, own = split({"method": method, "model": "m", "data": "d", **values(found)}, cls.Config)
    cls(own)
    assert [c.name for c in found.settings if not c.why] == []
    assert len({c.name for c in found.settings}) == len(found.settings)
    assert run.batch_size >= cls.min_batch


@pytest.mark.parametrize("name", sorted(PAIRS | SAMPLING | {"bco", "kto", "sft"}))
def test_every_first_party_method_advises_for_itself(name: str) -> None:
    assert "advice" in vars(registry.get(name))
    pages = Path(__file__).parents[1] / "docs/methods"
    assert (pages / f"{name}.md").is_file()


# ------------------------------------------------------------------------------------------------------- commands


def test_the_command_says_and_writes_what_was_found(
    command: Callable[..., Any], write_rows: Callable[..., str], tmp_path: Path
) -> None:
    data = write_rows([{"question": f"[b]{i}", "chosen": "red fox", "rejected": "owl"} for i in range(60)], "a b.jsonl")
    code, out, err = command("recommend", "--data", data, "--columns", "{prompt: question}", "--json", "r.json")
    assert (code, err) == (0, "")
    assert "start with dpo: learns from pairs" in out
    assert "\nalso:\n  simpo: " in out
    assert "\ncannot be used:\n  grpo: " in out
    assert "  ld_alpha: 0.5  the longer answer" in out
    assert f"alignkit init --data '{data}' --model MODEL --columns '{{prompt: question}}'" in out
    described = json.loads((tmp_path / "r.json").read_text())
    assert described["first"]["method"] == "dpo"
    assert described["data"]["rows"] == {"pairs": 60, "unpaired": 120, "text": 60, "prompts": 60}


def test_the_command_where_nothing_can_be_served(command: Callable[..., Any], write_rows: Callable[..., str]) -> None:
    code, out, _ = command("recommend", "--data", write_rows([{"prompt": f"{i}?"} for i in range(9)]))
    assert code == 0
    assert "no installed method can be used with these rows:" in out
    assert "alignkit init" not in out


@pytest.mark.parametrize("method", sorted(PAIRS | SAMPLING | {"bco", "kto", "sft"}))
def test_what_init_writes_is_valid(
    method: str, command: Callable[..., Any], write_rows: Callable[..., str], tiny: str, tmp_path: Path
) -> None:
    data = write_rows(make_rows("pairs", 80))
    more = {"nash": ["--judge", "{bradley_terry: json}"]}.get(method, ["--reward", "json"])
    asked = ["init", "--method", method, "--data", data, "--model", tiny, *(more if method in SAMPLING else [])]
    code, out, err = command(*asked)
    assert (code, err) == (0, "")
    assert out.startswith(f"config.yaml: {method}")
    text = (tmp_path / "config.yaml").read_text()
    written = yaml.safe_load(text)
    assert (written["method"], written["model"], written["data"]) == (method, tiny, data)
    lines = text.split("\n")
    settings = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert len(settings) == len(written)  # one line each
    assert all(lines[i - 1].startswith("# ") for i in settings)
    assert command("validate", "config.yaml")[0] == 0


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_what_init_writes_can_be_planned(
    method: str, command: Callable[..., Any], write_rows: Callable[..., str], tiny: str
) -> None:
    data = write_rows(make_rows("pairs", 80))
    more = ["--reward", "json"] if method == "grpo" else []
    assert (
        command("init", "--method", method, "--data", data, "--model", tiny, "-o", "c.yml", "--lora", 4, *more)[0] == 0
    )
    code, out, _ = command("plan", "c.yml")
    assert code == 0
    assert f"{method}: {144 if method == 'kto' else 72} rows to train on" in out


def test_init_does_not_write_over_a_file(
    command: Callable[..., Any], write_rows: Callable[..., str], tiny: str, tmp_path: Path
) -> None:
    data = write_rows(make_rows("pairs", 60))
    (tmp_path / "config.yaml").write_text("mine")
    code, _, err = command("init", "--data", data, "--model", tiny)
    assert code == 2
    assert "'config.yaml' exists; give another --output" in err
    assert (tmp_path / "config.yaml").read_text() == "mine"
    assert command("init", "--data", data, "--model", tiny, "--force")[0] == 0
    assert "method: dpo" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "none.jsonl", "--model", "TINY"], "no such file: none.jsonl"),
        (["--data", "rows.jsonl", "--model", "./none"], "the folder './none' does not exist"),
        (["--data", "rows.jsonl", "--model", "TINY", "--method", "dop"], "Did you mean 'dpo'?"),
        (["--data", "rows.jsonl", "--model", "TINY", "-o", "c.txt"], "must end in .yaml or .yml"),
        (["--data", "rows.jsonl", "--model", "TINY", "-o", "no/c.yaml"], "there is no folder 'no'"),
        (["--data", "rows.jsonl", "--model", "TINY", "--gpu-memory", "big"], "'big' is not a size of memory"),
        (["--data", "rows.jsonl", "--model", "TINY", "--reward", "jsn"], "Did you mean 'json'?"),
        (["--data", "prompts.jsonl", "--model", "TINY"], "no installed method can be used with these rows"),
        (["--data", "bad.jsonl", "--model", "TINY"], "row 1, column 'chosen'"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_few_lines(
    arguments: list[str],
    said: str,
    command: Callable[..., Any],
    write_rows: Callable[..., str],
    tiny: str,
    tmp_path: Path,
) -> None:
    write_rows(make_rows("pairs", 60))
    write_rows([{"prompt": f"{i}?"} for i in range(9)], "prompts.jsonl")
    write_rows([{"prompt": "a", "chosen": None, "rejected": "b"}], "bad.jsonl")
    code, _, err = command("init", *[tiny if a == "TINY" else a for a in arguments])
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "config.yaml").exists()


def test_no_text_leaves_its_comment(command: Callable[..., Any], write_rows: Callable[..., str], tiny: str) -> None:
    data = write_rows(make_rows("pairs", 60), "a: b #\nname: evil.jsonl")
    assert command("init", "--data", data, "--model", tiny, "--columns", "{prompt: prompt}")[0] == 0
    written = yaml.safe_load(Path("config.yaml").read_text())
    assert written["data"] == data
    assert "name" not in written
    assert written["columns"] == {"prompt": "prompt"}


def test_the_page_has_the_limits_as_they_are() -> None:
    from alignkit.insight.recommend import data_facts as facts
    from alignkit.insight.recommend import run_settings, verifiable_rewards
    from alignkit_kto import MAX_WEIGHT

    text = " ".join((Path(__file__).parents[1] / "docs/recommend.md").read_text().split())
    said = [f"{facts.FEW:,} rows", f"{facts.NOISY:.1%}", f"{facts.TIES:.0%}", f"{facts.TWICE} pairs"]
    said += [f"{0.5 + facts.LENGTH_BIAS:.0%}", f"{verifiable_rewards.SHORT} characters", f"{1 - fit.SPARE:.0%}"]
    said += [f"{facts.UNINFORMATIVE:.0%}", f"{MAX_WEIGHT:g} times", f"{run_settings.LEAST} rows"]
    assert [one for one in said if one.replace("%", " %") not in text] == []
