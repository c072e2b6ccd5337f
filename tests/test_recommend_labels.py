"""What `alignkit recommend` makes of labels and answers: how many are flipped, which are rare, what can be checked."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit.data import load
from alignkit.errors import ConfigError, RewardError
from alignkit.insight.audit.repeats import votes
from alignkit.insight.recommend import Recommendation, recommend
from alignkit.insight.recommend.data_facts import TWICE, disagreement
from alignkit.insight.recommend.recommendation_text import lines

Rows = list[dict[str, Any]]


def judged(i: int, *wins: bool) -> Rows:
    """One pair, judged as often as there are `wins`."""
    return [{"prompt": f"{i}?", "chosen": "yes" if won else "no", "rejected": "no" if won else "yes"} for won in wins]


def values(found: Recommendation) -> dict[str, Any]:
    return {choice.name: choice.value for choice in found.settings}


def thumbs(good: int, bad: int) -> Rows:
    return [{"prompt": f"{i}?", "completion": f"{i}!", "label": i < good} for i in range(good + bad)]


# ------------------------------------------------------------------------------------------------ flipped labels


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8), st.randoms())
def test_votes_are_counted_for_a_pair_in_any_order(counts: list[tuple[int, int]], chance: random.Random) -> None:
    rows = [row for i, (a, b) in enumerate(counts) for row in judged(i, *[True] * a, *[False] * b)]
    chance.shuffle(rows)
    if rows:
        found = [tuple(sorted(v)) for v in votes(load(rows, "pairs").rows)]
        assert sorted(found) == sorted(tuple(sorted(c)) for c in counts if sum(c) > 1)


@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=7), min_size=TWICE, max_size=TWICE + 5))
def test_disagreement_is_that_of_all_couples_of_judgements_and_pairs_weigh_alike(judgements: list[list[bool]]) -> None:
    couples = [[a != b for a, b in combinations(of_pair, 2)] for of_pair in judgements]
    said = disagreement([(sum(of_pair), len(of_pair) - sum(of_pair)) for of_pair in judgements])
    assert said == pytest.approx(sum(sum(c) / len(c) for c in couples) / len(couples))


def test_too_few_pairs_that_are_judged_again_tell_nothing() -> None:
    assert disagreement([(1, 1)] * (TWICE - 1)) is None
    assert disagreement([(3, 1)] * TWICE) == 0.5  # 3 of 6 couples


@pytest.mark.parametrize("times", [(2,), (3,), (5,), (1, 2, 3, 5, 8)], ids=str)
@pytest.mark.parametrize("part", [0.05, 0.3])
def test_the_part_of_flipped_labels_is_found_however_often_pairs_are_judged(
    part: float, times: tuple[int, ...]
) -> None:
    chance = random.Random(7)
    rows: Rows = []
    for i in range(1500):
        rows += judged(i, *(chance.random() >= part for _ in range(times[i % len(times)])))
    found = recommend(rows)
    assert found.facts.data.flipped == pytest.approx(part, abs=0.03)
    assert values(found)["label_smoothing"] == pytest.approx(part, abs=0.03)
    assert values(found)["loss_type"] == "robust"


def test_a_small_estimate_is_presented_as_it_is() -> None:
    # 3 of 600 pairs: 2 e (1 - e) = 0.005, so e = (1 - sqrt(0.99)) / 2 = 0.002506
    found = recommend([row for i in range(600) for row in judged(i, True, i >= 3)])
    assert found.facts.data.noisy is None  # 3 of 1,200 rows
    assert "label_smoothing" not in values(found)
    # 4 of 200 pairs: e = (1 - sqrt(0.96)) / 2 = 0.0101
    found = recommend([row for i in range(200) for row in judged(i, True, i >= 4)])
    assert values(found)["label_smoothing"] == 0.01


@pytest.mark.parametrize(
    ("against", "said"),
    [
        (49, "49% of the judgements differ"),  # e = (1 - sqrt(1 - 0.98)) / 2 = 0.43
        (50, "50% of the judgements differ"),
        (90, "90% of the judgements differ"),
    ],
)
def test_labels_that_say_nothing_are_said_to_and_nothing_is_made_of_them(against: int, said: str) -> None:
    found = recommend([row for i in range(100) for row in judged(i, True, i >= against)])
    assert not values(found).keys() & {"label_smoothing", "loss_type"}
    assert said in found.cautions[0]
    advice = "The labels carry almost no information, and no setting solves that. Look at the data first"
    assert advice in found.cautions[0]
    assert found.describe()["cautions"] == found.cautions
    text = lines(found)
    assert text.index(f"[bold]warning:[/bold] {found.cautions[0]}") < next(
        i for i, line in enumerate(text) if "start with" in line
    )


def test_labels_that_say_something_are_smoothed_without_a_caution() -> None:
    # e = (1 - sqrt(1 - 0.94)) / 2 = 0.3775
    found = recommend([row for i in range(100) for row in judged(i, True, i >= 47)])
    assert found.cautions == ()
    assert values(found)["label_smoothing"] == 0.38


def test_ties_are_no_noise_where_judgements_that_are_made_again_agree() -> None:
    ties = [{"prompt": f"t{i}?", "winner": "tie", "response_a": "yes", "response_b": "no"} for i in range(20)]
    again = [{"prompt": f"{i}?", "winner": "a", "response_a": "yes", "response_b": "no"} for i in range(25)]
    assert recommend([*ties, *again]).facts.data.noisy is not None
    assert recommend([*ties, *again, *again]).facts.data.noisy is None


# ---------------------------------------------------------------------------------------------- one kind of label


@pytest.mark.parametrize(("good", "bad", "which"), [(50, 0, "good"), (0, 50, "bad")])
def test_kto_is_refused_where_all_rows_are_of_one_kind(good: int, bad: int, which: str) -> None:
    found = recommend(thumbs(good, bad))
    assert found.refused["kto"] == f"all rows are {which}: it learns from the difference between good and bad ones"
    assert (found.first.method if found.first else None) == ("sft" if good else None)
    with pytest.raises(ConfigError, match=f"'kto' cannot be used: all rows are {which}"):
        recommend(thumbs(good, bad), method="kto")


@pytest.mark.parametrize(
    ("good", "bad", "name", "value"),
    [(1, 4999, "desirable_weight", 10.0), (4999, 1, "undesirable_weight", 10.0), (100, 900, "desirable_weight", 9.0)],
)
def test_a_rare_row_weighs_ten_times_another_at_most(good: int, bad: int, name: str, value: float) -> None:
    chosen = next(c for c in recommend(thumbs(good, bad), method="kto").settings if c.name == name)
    assert chosen.value == value
    rare = "good" if good < bad else "bad"
    assert (f"would weigh as much as 4,999 others, so it is limited to 10; find more {rare} rows" in chosen.why) == (
        value == 10
    )


# ------------------------------------------------------------------------------------------------ rewards' columns


def by_colour(prompts: list[str], completions: list[str], colour: list[str]) -> list[float]:
    return [float(c in text) for c, text in zip(colour, completions, strict=True)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reward": "numeric"}, "reward 'numeric' needs the column 'answer'; the rows have colours"),
        ({"reward": ["json", {"use": "exact", "column": "key"}]}, "reward 'exact' needs the column 'key'"),
        ({"reward": {"ensemble": ["json", by_colour]}}, "needs the column 'colour'.*Did you mean 'colours'"),
        ({"judge": {"bradley_terry": "numeric"}}, "reward 'numeric' needs the column 'answer'"),
    ],
)
def test_a_column_that_a_reward_asks_for_must_be_there(given: dict[str, Any], said: str) -> None:
    rows = [{"prompt": f"{i}?", "colours": "red"} for i in range(30)]
    with pytest.raises(RewardError, match=said):
        recommend(rows, **given)


def test_a_reward_whose_columns_are_there_is_served() -> None:
    rows = [{"prompt": f"{i}?", "colour": "red"} for i in range(30)]
    found = recommend(rows, reward=by_colour)
    assert found.first is not None
    assert found.first.method == "grpo"


class Heavy:
    """A reward that is something to make: nobody who only advises may."""

    def __init__(self) -> None:
        raise AssertionError("it was made")

    def __call__(self, completions: list[str], colour: list[str]) -> list[float]:
        raise AssertionError("it was asked")


def test_a_class_of_a_reward_is_not_made_to_be_looked_at() -> None:
    found = recommend([{"prompt": f"{i}?", "colours": "red"} for i in range(30)], reward={"use": Heavy})
    assert found.first is not None


def test_prose_with_a_number_in_it_is_no_number() -> None:
    prose = ["Vitamin B12 helps the nerves of people at any age", "It was in World War 2 that this was first seen"]
    found = recommend([{"prompt": f"{i}?", "answer": prose[i % 2]} for i in range(30)])
    assert found.facts.data.verifier is None
    assert found.first is None
