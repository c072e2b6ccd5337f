"""`alignkit audit`: what it finds in rows with known faults, and about rewards with known biases."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifiers import write_classifier
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.errors import ConfigError, DataError, RewardError
from alignkit.insight.audit import Audit, audit, write_html, write_json
from alignkit.insight.audit.bias import biases
from alignkit.insight.intervals import mean_interval
from alignkit.testing.world import tiny_tokenizer

Rows = list[dict[str, Any]]


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def plain(n: int, seed: int = 0) -> Rows:
    """Pairs in which nothing is preferred: which of two answers is chosen is drawn."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        answers = ["a " * draw.randint(1, 30) + end for end in ("x.", "y!")]
        draw.shuffle(answers)
        rows.append(pair(f"question {i}?", *answers))
    return rows


def finding_texts(found: Audit) -> str:
    return "\n".join(finding.what for finding in found.findings)


# ------------------------------------------------------------------------------------------------------ rows


def test_repeats_contradictions_and_what_was_dropped() -> None:
    rows = [
        pair("p", "a", "b"),
        pair("p", "a", "b "),  # a duplicate but for white space
        pair("p", "b", "a"),  # the opposite of row 1
        pair("p", "same", "same"),
        pair("q", "a", "b"),
        pair("q", "", "b"),
    ]
    found = audit(rows)
    assert (found.kind, found.form, found.total, found.kept) == ("pairs", "pairs", 6, 4)
    assert found.dropped == {"identical answers": [4], "empty answers": [6]}
    assert found.repeats.duplicates == (2,)
    assert found.repeats.contradictions == ((1, 3),)
    assert found.repeats.prompts == 2
    assert "contradicts another row (rows 1 and 3)" in finding_texts(found)
    assert "(row 2)" in finding_texts(found)


def test_ties_are_counted() -> None:
    rows = [{"prompt": "p", "answer_a": "x", "answer_b": "y", "winner": w} for w in ("a", "tie", "b")]
    assert audit(rows).dropped == {"ties": [2]}


def test_unpaired_rows_contradict_each_other_by_their_labels() -> None:
    rows = [{"prompt": "p", "completion": c, "label": label} for c, label in (("a", True), ("a", False), ("b", True))]
    found = audit(rows)
    assert (found.kind, found.labels, found.biases) == ("unpaired", (2, 1), ())
    assert found.repeats.contradictions == ((1, 2),)
    assert [x.part for x in found.lengths] == ["prompt", "desirable", "undesirable"]


@pytest.mark.parametrize(
    ("rows", "kind", "parts"),
    [
        ([{"prompt": "p", "completion": "c"}], "text", ["prompt", "completion"]),
        ([{"text": "t"}], "text", ["prompt", "completion"]),
        ([{"prompt": "p"}, {"prompt": "p"}], "prompts", ["prompt"]),
        (
            [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}],
            "text",
            ["prompt", "completion"],
        ),
        ([{"chosen": "\n\nHuman: h\n\nAssistant: a", "rejected": "\n\nHuman: h\n\nAssistant: b c"}], "pairs",
         ["prompt", "chosen", "rejected"]),
        ([{"prompt": "p", "completions": ["a", "b"], "scores": [1, 2]}], "pairs", ["prompt", "chosen", "rejected"]),
    ],
)  # fmt: skip
def test_every_form_is_read_as_the_most_that_it_serves(rows: Rows, kind: str, parts: list[str]) -> None:
    found = audit(rows)
    assert found.kind == kind == found.serves[0]
    assert [x.part for x in found.lengths] == parts
    assert found.repeats.contradictions == ()


def test_prompts_of_held_out_rows() -> None:
    rows, held_out = [pair("p ", "a", "b"), pair("q", "a", "b")], [{"prompt": "r"}, {"prompt": "p"}, {"prompt": "p"}]
    found = audit(rows, eval_data=held_out)
    assert found.shared == (2, 3)
    assert "2 held-out rows have a prompt that is trained on (rows 2, 3 of the held-out data)" in finding_texts(found)
    assert audit(rows).shared is None
    assert audit(rows, eval_data=[{"prompt": "r"}]).findings == ()


def test_lengths_in_characters_and_in_tokens() -> None:
    rows = [pair("ab", "c", "dd"), pair("ab", "ccc", "dddd"), pair("abcd", "ccccc", "d")]
    found = audit(rows)
    assert found.unit == "characters"
    chosen = found.lengths[1]
    assert (chosen.n, chosen.mean, chosen.longest) == (3, 3.0, 5)
    assert chosen.quantiles == pytest.approx((1.2, 2, 3, 4, 4.8))
    found = audit(rows, model=tiny_tokenizer(), max_prompt_tokens=3, max_completion_tokens=4)
    assert found.unit == "tokens"
    assert [x.mean for x in found.lengths] == [pytest.approx(8 / 3), 4.0, pytest.approx(7 / 3 + 1)]  # answers with EOS
    assert found.budgets is not None
    assert (found.budgets.prompts_cut, found.budgets.answers_cut, found.budgets.answers) == (1, 2, 6)
    assert "2 of 6 answers are longer than max_completion_tokens 4" in finding_texts(found)
    roomy = audit(rows, model=tiny_tokenizer())
    assert roomy.budgets is not None
    assert roomy.budgets.answers_cut == 0
    assert "longer than" not in finding_texts(roomy)


def test_what_a_budget_makes_identical_is_named() -> None:
    found = audit([pair("p", "aab", "aac"), pair("p", "x", "y")], model=tiny_tokenizer(), max_completion_tokens=2)
    assert found.budgets is not None
    assert found.budgets.dropped == {"with answers that became identical": [1]}


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([pair("p", "a", "a")], "no row is left; dropped 1 of 1 rows: 1 identical answers"),
        ([{"question": "p"}], "found the columns question, which match no known form"),
        ([], "holds no rows"),
        ([pair("p", "a", "b"), pair("p", "a", None)], "row 2, column 'rejected'"),  # type: ignore[arg-type]
    ],
)
def test_rows_that_cannot_be_read(rows: Rows, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        audit(rows)


# ------------------------------------------------------------------------------------------------------ bias


def test_biases_by_hand() -> None:
    rows = [
        pair("1", "Sure! Long answer here.", "no."),
        pair("2", "- a\n- b", "abcdef gh"),
        pair("3", "same.", "other"),
        pair("4", "see http://a.b", "*no* **link**"),
    ]
    found = {b.feature: b for b in audit(rows).biases}
    assert {name: (b.differs, b.more, b.direction, b.accuracy) for name, b in found.items()} == {
        "length": (3, 2, "more", (2 + 0.5) / 4),
        "emoji": (0, 0, "more", 0.5),
        "bold": (1, 0, "less", (1 + 1.5) / 4),  # of the rule that less of it is chosen
        "exclamation marks": (1, 1, "more", 2.5 / 4),
        "list items": (1, 1, "more", 2.5 / 4),
        "links": (1, 1, "more", 2.5 / 4),
        "affirmative opening": (1, 1, "more", 2.5 / 4),
    }
    assert (found["emoji"].share, found["emoji"].low) == (None, None)
    assert not any(b.beyond_chance for b in found.values())


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([-2.0, 0.0, 1.0])), min_size=1))
def test_biases_are_those_of_a_plain_count(pairs: list[tuple[int, int, float]]) -> None:
    counts = {"length": np.array([p[:2] for p in pairs], dtype=float)}
    got = biases(counts, np.array([p[2] for p in pairs]))
    sided = [(a, b) if side > 0 else (b, a) for a, b, side in pairs if side]
    if not sided:
        assert got == ()
        return
    assert got[0].pairs == len(sided)
    assert got[0].differs == sum(a != b for a, b in sided)
    assert got[0].more == sum(a > b for a, b in sided)
    more = statistics.fmean((a > b) + 0.5 * (a == b) for a, b in sided)
    less = statistics.fmean((a < b) + 0.5 * (a == b) for a, b in sided)
    assert got[0].accuracy == pytest.approx(max(more, less))
    assert got[0].direction == ("more" if more >= less else "less")


def test_a_planted_bias_is_found_and_nothing_else() -> None:
    rows = plain(300)
    for row in rows[:200]:
        row["chosen"] += " 😀"
    found = audit(rows)
    assert [b.feature for b in found.biases if b.beyond_chance] == ["emoji"]
    assert finding_texts(found) == "the answer with more emoji is chosen in 100% of the pairs in which they differ"
    turned = audit([pair(r["prompt"], r["rejected"], r["chosen"]) for r in rows])
    assert finding_texts(turned) == "the answer with fewer emoji is chosen in 100% of the pairs in which they differ"


def test_the_remedy_of_a_length_bias_names_its_direction() -> None:
    for preferred, other, how in (("a longer one", "short", "writing more"), ("short", "a longer one", "writing less")):
        found = audit([pair(f"p{i}", preferred, other) for i in range(20)])
        assert [how in finding.remedy for finding in found.findings] == [True]


def test_findings_on_rows_without_a_bias_are_rare() -> None:
    assert sum(bool(audit(plain(60, seed)).findings) for seed in range(60)) <= 6  # 5 % of 60 are expected


def test_a_pair_that_stands_twenty_times_is_one_observation() -> None:
    found = audit([pair("p", "longer", "short")] * 20)
    assert (found.biases[0].pairs, found.biases[0].beyond_chance) == (1, False)


# ---------------------------------------------------------------------------------------------------- reward


def by_length(completions: list[str], **columns: Any) -> list[float]:
    return [2.0 * len(text) for text in completions]


def test_a_reward_for_length() -> None:
    found = audit(plain(40), reward=by_length)
    reward = found.reward
    assert reward is not None
    texts = [text for row in plain(40) for text in (row["chosen"], row["rejected"])]
    lengths = [len(t) for t in texts]
    assert (reward.rows, reward.mean) == (40, pytest.approx(2 * statistics.fmean(lengths)))
    assert reward.deviation == pytest.approx(2 * statistics.stdev(lengths))
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(lengths[0::2], lengths[1::2], strict=True)]
    assert reward.accuracy == pytest.approx(statistics.fmean(wins))
    assert reward.ties == wins.count(0.5) > 0
    assert (reward.biases[0].share, reward.biases[0].pairs) == (1.0, 40 - reward.ties)
    effects = {(e.feature, e.change): e for e in reward.effects}
    emoji = effects["emoji", "added"]  # a space and a character
    assert (emoji.n, emoji.mean) == (40, pytest.approx(4 / reward.deviation))
    assert emoji.low == pytest.approx(emoji.mean)
    assert emoji.beyond_chance
    assert (effects["emoji", "taken"].n, effects["emoji", "taken"].mean) == (0, None)
    assert effects["exclamation marks", "taken"].mean == 0  # a mark becomes a full stop
    assert not effects["exclamation marks", "taken"].beyond_chance
    people = sum(a > b for a, b in zip(lengths[0::2], lengths[1::2], strict=True)) / (40 - reward.ties)
    told = "the longer answer has the higher score in 100% of the pairs in which they differ, and is chosen in"
    assert f"{told} {people:.0%}" in finding_texts(found)
    assert "adding length to the same answer changes the score by +" in finding_texts(found)


def test_the_changed_answers_are_taken_from_both_sides_in_turn() -> None:
    seen: list[str] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(c) % 7) for c in completions]

    audit([pair(str(i), f"first {i}", f"second {i}") for i in range(4)], reward=reward)
    assert seen[:8] == [f"{side} {i}" for i in range(4) for side in ("first", "second")]
    assert [text for text in seen if text.endswith("😊")] == ["first 0 😊", "second 1 😊", "first 2 😊", "second 3 😊"]


def test_an_effect_has_the_interval_of_a_mean() -> None:
    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [10.0 * len(t) + ("😊" in t) * (len(t) - 4) for t in completions]

    reward_of = audit([pair(str(i), "a" * (i + 1), "b" * (i + 2)) for i in range(9)], reward=reward).reward
    assert reward_of is not None
    effect = next(e for e in reward_of.effects if (e.feature, e.change) == ("emoji", "added"))
    lengths = [i + 1 + i % 2 for i in range(9)]
    moved = [(20 + n + 2 - 4) / reward_of.deviation for n in lengths]
    assert effect.mean == pytest.approx(statistics.fmean(moved))
    half = 2.306004 * statistics.stdev(moved) / math.sqrt(9)  # Student's t, 8 degrees of freedom
    assert effect.high - effect.mean == pytest.approx(half, rel=1e-4)  # type: ignore[operator]


def scored_by(n: int, level: float) -> bool:
    """Whether a reward that adds 0, 1, ... for an emoji has an effect beyond chance, with a t just at `level`."""
    moved = [float(i) for i in range(n)]
    shift = mean_interval(moved, level)[0]  # the mean, less the half width of that level
    rises = iter(value - shift for value in moved)

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [base(text) + (next(rises) if "😊" in text else 0.0) for text in completions]

    def base(text: str) -> float:
        return float(text.startswith("first"))

    found = audit([pair(str(i), f"first {i}", f"second {i}") for i in range(n)], reward=reward).reward
    assert found is not None
    return next(e.beyond_chance for e in found.effects if (e.feature, e.change) == ("emoji", "added"))


def test_an_effect_stands_against_all_fourteen() -> None:
    assert not scored_by(20, 1 - 0.05 / 7)  # enough for one of seven features alone
    assert not scored_by(20, 1 - 0.05 / 14 * 1.001)
    assert scored_by(20, 1 - 0.05 / 14 * 0.999)


@pytest.mark.parametrize(("n", "beyond"), [(2, False), (9, False), (10, True)])
def test_few_answers_that_agree_by_accident_are_no_finding(n: int, beyond: bool) -> None:
    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [3.0 * ("😊" in text) + text.startswith("first") for text in completions]

    found = audit([pair(str(i), f"first {i}", f"second {i}") for i in range(n)], reward=reward)
    assert found.reward is not None
    effect = next(e for e in found.reward.effects if (e.feature, e.change) == ("emoji", "added"))
    assert (effect.n, effect.low) == (n, effect.high)
    assert effect.beyond_chance == beyond
    assert ("adding emoji" in finding_texts(found)) == beyond


def test_columns_lengths_and_messages_reach_the_reward() -> None:
    given: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, topic: Any, lengths: Any, ended: Any) -> list[float]:
        given.setdefault("first", (prompts[0], completions[0], topic, lengths[0], ended[0]))
        return [float(len(text)) for text in completions]

    rows = [
        pair("hi", [{"role": "assistant", "content": "one two"}], [{"role": "assistant", "content": "x"}], topic="t")
    ]  # type: ignore[arg-type]
    reward_of = audit(rows, reward={"use": reward, "probe": False}).reward
    assert given["first"] == ([{"role": "user", "content": "hi"}], "one two", ["t", "t"], 2, True)
    assert reward_of is not None
    assert reward_of.accuracy == 1.0


def test_at_most_so_many_rows_are_asked_about() -> None:
    found = audit(plain(50), reward=by_length, asked=7).reward
    assert found is not None
    assert (found.rows, found.biases[0].pairs + found.ties) == (7, 7)


def test_a_constant_reward_and_one_that_is_wrong() -> None:
    rows = [pair(f"{i}", f"good {i}", f"bad {i}!") for i in range(30)]
    same = audit(rows, reward=lambda completions, **_: [1.0] * len(completions))
    assert same.reward is not None
    assert (same.reward.accuracy, same.reward.ties, same.reward.biases) == (0.5, 30, ())
    assert "gives every answer the same score" in finding_texts(same)
    assert all(e.mean is None for e in same.reward.effects)
    wrong = audit(rows, reward=lambda completions, **_: [float("bad" in c) for c in completions])
    assert "agrees with 0% of the preferences, worse than chance" in finding_texts(wrong)


def test_a_reward_on_rows_that_are_no_pairs() -> None:
    found = audit([{"prompt": "p", "completion": "c" * i} for i in (1, 2, 3)], reward=by_length).reward
    assert found is not None
    assert (found.accuracy, found.biases, found.mean) == (None, (), 4.0)
    assert next(e.n for e in found.effects if e.feature == "emoji") == 3
    with pytest.raises(DataError, match="only prompts; leave out the reward"):
        audit([{"prompt": "p"}], reward=by_length)


def test_a_reward_models_folder_brings_its_tokenizer(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "reward")
    found = audit([pair("ab", "cd", "efg"), pair("a", "bc", "d")], reward=folder)
    assert found.unit == "tokens"
    assert found.budgets is None  # the reward's model does not tell what a policy reads
    assert found.reward is not None
    assert found.reward.deviation > 0


def test_what_cannot_be_scored(tmp_path: Path) -> None:
    rows = plain(3)
    three = write_classifier(tmp_path / "three", labels=3)
    with pytest.raises(ConfigError, match="has 3 labels; a reward model has 1"):
        audit(rows, reward=three)
    with pytest.raises(RewardError, match="needs the column 'answer'"):
        audit(rows, reward="exact")
    with pytest.raises(ConfigError, match="at least 2 rows"):
        audit(rows, reward=by_length, asked=1)


# ---------------------------------------------------------------------------------------- what is shown of it


def test_json_and_html(tmp_path: Path) -> None:
    rows = [pair(f"{i}", f"<script>alert({i})</script> it is longer", "no") for i in range(40)]
    found = audit(rows, reward=by_length)
    write_json(found, tmp_path / "a.json")
    read = json.loads((tmp_path / "a.json").read_text())
    assert read["biases"][0]["share"] == 1.0
    assert read["reward"]["effects"][0]["feature"] == "length"
    assert read["findings"][0].keys() == {"what", "remedy"}
    hostile = [{**row, "prompt": "p"} for row in rows]
    page = tmp_path / "a.html"
    write_html(audit(hostile, reward={"use": by_length, "name": "<script>x</script>"}), page)
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;x&lt;/script&gt;" in text
    assert "the longer answer is chosen in 100% of the pairs" in text


def test_the_command(command: Callable[..., Any], write_rows: Callable[..., str], tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "my_rewards.py").write_text("def longer(completions):\n    return [len(c) for c in completions]\n")
    rows = [{"question": f"[b]{i}[/b]", "chosen": "red fox " * 3, "rejected": "red"} for i in range(30)]
    code, out, err = command(
        "audit", write_rows(rows, "prefs.jsonl"), "--columns", "{prompt: question}", "--model", "base", "--reward",
        "my_rewards:longer", "--json", "a.json", "--html", "a.html",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "30 rows are kept, with 30 different prompts" in out
    assert "max_completion_tokens 1024 cuts 0 of 60 answers" in out
    assert re.search(r"length +30 of 30 +100\.0% \* +\S+ to \S+ +more: 100\.0%", out)
    assert "agrees with 100.0% of the preferences" in out
    assert (tmp_path / "a.html").is_file()
    assert json.loads((tmp_path / "a.json").read_text())["unit"] == "tokens"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["none.jsonl"], "no such file: none.jsonl"),
        (["prefs.jsonl", "--columns", "prompt"], "--columns needs names such as prompt=question"),
        (["prefs.jsonl", "--html", "no/a.html"], "there is no folder 'no'"),
        (["prefs.jsonl", "--json", "/proc/a.json"], "--json '/proc/a.json': cannot be written"),
        (["prefs.jsonl", "--max-completion-tokens", "2"], "--max-completion-tokens counts tokens"),
        (["prefs.jsonl", "--reward", "lenght"], "Did you mean 'length'?"),
        (["prefs.jsonl", "--model", "./base"], "the folder './base' does not exist"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], problem: str, command: Callable[..., Any], write_rows: Callable[..., str]
) -> None:
    write_rows(plain(3), "prefs.jsonl")
    code, out, err = command("audit", *arguments)
    assert (code, out) == (2, "")
    assert problem in err
    assert len(err.splitlines()) <= 3


def test_a_full_disk_ends_in_one_line(command: Callable[..., Any], write_rows: Callable[..., str]) -> None:
    code, _, err = command("audit", write_rows(plain(3), "prefs.jsonl"), "--json", "/dev/full")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "cannot write /dev/full: No space left on device" in err
    assert Path("/dev/full").is_char_device()
