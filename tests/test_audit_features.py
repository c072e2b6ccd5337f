"""What an answer has besides content, counted, added and taken away; and the intervals that findings rest on."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.insight.audit.features import FEATURES, FILLER, answer_text
from alignkit.insight.intervals import mean_interval, wilson

BY_NAME = {feature.name: feature for feature in FEATURES}
PIECES = st.sampled_from(
    ["Sure", "sure thing", "Of course", ", ", "! ", "!", "?", ". ", "**", "*", "a word", "long", "- ", "1. ", "\n",
     "https://a.b/c", "www.x.y", "[name](http://q.r)", "(", ")", "[", "]", "=", "😀", "👍🏽", "👩‍🚀", "🇩🇪", "❤️", "©",
     "• ", " "]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=30)


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("length", "four", 4),
        ("emoji", "no 1 # © ™ here", 0),
        ("emoji", "😀 and 👩‍🚀, 👍🏽, 🇩🇪 and ❤️", 5),
        ("bold", "**a** and **b c**, not ** d ** nor *e*", 2),
        ("emoji", "🇩🇪🇫🇷 1️⃣#⃣ ☝🏽 😀🇩🇪", 7),
        ("emoji", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", 1),
        ("bold", "2 ** 3 ** 4", 0),
        ("bold", "2**3 and 4**5, x**2 + y**2", 0),
        ("bold", "(**a**), 这是**重点**内容", 2),
        ("exclamation marks", "Hi! No?! 你好！", 3),
        ("exclamation marks", "a != b ![image](x)", 0),
        ("list items", "- a\n* b\n  3) c\n4. d\n• e\n-no\n**f** g", 5),
        ("list items", "in 1. the middle - not", 0),
        ("links", "see https://a.b/c, [x](http://d.e) and www.f.g", 3),
        ("affirmative opening", " Sure! I can", 1),
        ("affirmative opening", "You’re absolutely right, it is", 1),
        ("affirmative opening", "CERTAINLY.", 1),
        ("affirmative opening", "Surely not", 0),
        ("affirmative opening", "Of course not", 0),
        ("affirmative opening", "It is, of course, so", 0),
        ("affirmative opening", "Certainly not.", 0),
        ("affirmative opening", "Certainly. Not that it matters", 1),
    ],
)
def test_counts(name: str, text: str, count: int) -> None:
    assert BY_NAME[name].count(text) == count


@pytest.mark.parametrize(
    ("name", "text", "added"),
    [
        ("length", "It is. ", f"It is. {FILLER}"),
        ("emoji", " It is.", " It is. 😊"),
        ("emoji", "It is 😀", None),
        ("bold", "It is quite so", "It is **quite** so"),
        ("bold", "It is", None),
        ("exclamation marks", "It is. So.", "It is. So!"),
        ("exclamation marks", "It is", "It is!"),
        ("list items", "It is. So be it.", "- It is.\n- So be it."),
        ("list items", "It is.", None),
        ("links", "It is.", "It is. (https://en.wikipedia.org)"),
        ("affirmative opening", " It is.", " Sure. It is."),
    ],
)
def test_adding(name: str, text: str, added: str | None) -> None:
    assert BY_NAME[name].added(text) == added


@pytest.mark.parametrize(
    ("name", "text", "taken"),
    [
        ("length", "It is. So be it. ", "It is."),
        ("length", "It is.", None),
        ("emoji", "It 😀 is 👍🏽.", "It is."),
        ("emoji", "It 🇩🇪🇫🇷 is 1️⃣.", "It is."),
        ("bold", "It **is** so", "It is so"),
        ("exclamation marks", "Hi! What?! Go!!! a != b", "Hi. What? Go. a != b"),
        ("list items", "Such:\n- a\n  2. b", "Such:\na\n  b"),
        ("links", "See [this](https://a.b) (https://c.d), or www.e.f now", "See this, or now"),
        ("links", "https://a.b", None),
        (
            "links",
            "  " * 200_000 + "a https://a.b",
            "  " * 200_000 + "a",
        ),  # minutes, where white space is gone back over
        ("affirmative opening", " Sure! Certainly, it is.", " It is."),
        ("affirmative opening", "Of course I can", None),
        ("affirmative opening", "Sure!", None),
    ],
)
def test_taking(name: str, text: str, taken: str | None) -> None:
    assert BY_NAME[name].taken(text) == taken


@settings(deadline=None)
@given(TEXTS)
def test_what_is_added_is_there_and_what_is_taken_is_less(text: str) -> None:
    for feature in FEATURES:
        before = feature.count(text)
        added, taken = feature.added(text), feature.taken(text)
        assert added is None or (feature.count(added) > before and (before == 0 or feature.name == "length"))
        assert taken is None or (feature.count(taken) < before and taken.strip())


@settings(deadline=None)
@given(st.text(alphabet="abcde fgh", min_size=4, max_size=40))
def test_what_was_added_is_taken_away_again(words: str) -> None:
    text = f"It is {words.strip()} here. And so it is there."
    for feature in FEATURES:
        added = feature.added(text)
        assert added is not None
        taken = feature.taken(added)
        assert taken is not None
        if feature.name not in ("affirmative opening", "list items"):
            assert taken == text


def test_only_the_assistant_is_read() -> None:
    turns = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "!"},
        {"role": "assistant", "content": "b"},
    ]
    assert answer_text(turns) == "a\n\nb"
    assert answer_text(" a ") == " a "


@settings(deadline=None)
@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_bounds_are_the_shares_that_the_data_are_just_compatible_with(n: int, part: float) -> None:
    k = round(part * n)
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for bound in (low, high):  # the normal test of that share has |z| = 1.96; where the share is 0 or 1, no variance
        if 1e-9 < bound < 1 - 1e-9:
            assert abs(k / n - bound) / math.sqrt(bound * (1 - bound) / n) == pytest.approx(1.959964, rel=1e-6)


def test_wilson_by_hand() -> None:
    assert wilson(0, 10) == (0.0, pytest.approx(0.27753, abs=1e-5))  # z² / (n + z²)
    assert wilson(10, 10)[1] == 1.0


@pytest.mark.parametrize("n", [2, 3, 4, 6, 11, 101])
@pytest.mark.parametrize("level", [0.95, 0.993])
def test_the_interval_of_a_mean_is_students(n: int, level: float) -> None:
    values = [float(i % 2) for i in range(n)]
    low, high = mean_interval(values, level)
    assert (low + high) / 2 == pytest.approx(statistics.fmean(values))
    t = (high - low) / 2 / (statistics.stdev(values) / math.sqrt(n))
    x, v = np.linspace(-t, t, 400_001), n - 1
    scale = math.exp(math.lgamma((v + 1) / 2) - math.lgamma(v / 2)) / math.sqrt(v * math.pi)
    inside = np.trapezoid(scale * (1 + x**2 / v) ** (-(v + 1) / 2), x)
    assert inside == pytest.approx(level, abs=4e-4)
