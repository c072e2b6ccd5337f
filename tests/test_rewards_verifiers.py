"""The rewards that need no model."""

from __future__ import annotations

import json
import re
import sys
from datetime import date
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit.errors import ConfigError, RewardError
from alignkit.rewards import Answers, build_rewards, check_rewards
from alignkit.rewards.numeric import final_number


def score(spec: Any, completions: list[Any], lengths: list[int] | None = None, **columns: list[Any]) -> list[float]:
    n = len(completions)
    asked = Answers(["?"] * n, completions, columns, list(range(1, n + 1)), lengths or [1] * n, [True] * n)
    return build_rewards(spec).score(asked).total


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\boxed{1{,}000}", "1000"),
        (r"so 1{,}234{,}567 of them", "1234567"),
        (r"1,\!000", "1000"),
        (r"-\$5", "-5"),
        (r"\boxed{\frac12}", "1/2"),
        (r"\boxed{-\frac{1}2}", "-1/2"),
        (r"\frac 3{10}", "3/10"),
        ("2 -3", "-3"),
        ("2 - 3", "3"),
        ("x - 3", "3"),
        ("(a) - 3", "3"),
        ("= - 3", "-3"),
        ("- 3", "-3"),
        ("1,000,1", "1"),
        ("42", "42"),
        ("The answer is 42.", "42"),
        ("It costs $1,234.50 in all", "1234.5"),
        ("48/2 = 24 clips", "24"),
        ("so it is 3/4", "3/4"),
        ("so it is -3/4.", "-3/4"),
        (r"we get \frac{3}{4}", "3/4"),
        (r"we get -\dfrac{ 3 }{ -4 }", "3/4"),
        ("a rise of 12.5%", "12.5"),
        ("−7 degrees", "-7"),
        ("between 3-5", "5"),
        ("x-2", "2"),
        ("1.5e3", "1500"),
        (".5", "1/2"),
        ("-.5", "-1/2"),
        ("-$5", "-5"),
        ("7 and then 9", "9"),
        ("1,2,3", "3"),
        ("12,345,678 people", "12345678"),
        ("12,34", "34"),
        ("first 10, then\n#### 72", "72"),
        ("#### 72\nBut 80 is nice too", "72"),
        ("#### 71\n#### $1,072", "1072"),
        (r"so \boxed{5} of 10", "5"),
        (r"\boxed{1} and \boxed{\frac{1}{2}} is last, not 9", "1/2"),
        (r"\boxed{6", "6"),
        (r"\boxed{3} #### 4", "4"),
        (r"#### 4 \boxed{3} of 5", "3"),
        (r"-\boxed{5}", "-5"),
        (r"$x = -\boxed{5}$", "-5"),
        (r"it is -$\boxed{5}$", "-5"),
        (r"= - \boxed{-5}", "5"),
        (r"the answer - \boxed{5}", "5"),
        (r"8-\boxed{5}", "5"),
        ("(1,000)", "1000"),
        ("10 apples #### none", None),
        (r"10 apples \boxed{x}", None),
        ("no number", None),
        ("", None),
        ("1/0", None),
        ("1e9999", "9999"),
        ("9" * 5000, None),
    ],
)
def test_the_number_that_a_text_gives(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Fraction(number))


@given(
    st.integers(-(10**15), 10**15),
    st.integers(0, 6),
    st.sampled_from(["{}", "I say {}.", "1 2 #### {}", r"\boxed{{{}}} 9"]),
)
def test_decimals_survive_with_and_without_commas(digits: int, places: int, frame: str) -> None:
    want = Fraction(digits, 10**places)
    plain = f"{'-' if digits < 0 else ''}{abs(digits) // 10**places}"
    grouped = f"{'-' if digits < 0 else ''}{abs(digits) // 10**places:,}"
    after = f".{abs(digits) % 10**places:0{places}}" if places else ""
    assert final_number(frame.format(plain + after)) == want
    assert final_number(frame.format("$" + grouped + after)) == want if digits >= 0 else True


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" " * 1_000_000, None),
        ("-" + " " * 1_000_000, None),
        ("- $ " * 300_000, None),
        ("7" + " " * 1_000_000, "7"),
        (r"\frac{1}" + " " * 1_000_000 + "x", "1"),
        ("111," * 200_000 + "8", "8"),
        (r"\frac{" * 200_000, None),
        ("\\boxed{" + " " * 1_000_000, None),
        ("- " * 500_000 + "\\boxed{8}", "-8"),
        ("-" + " " * 1_000_000 + "x\\boxed{8}", "8"),
    ],
)
def test_no_text_takes_more_than_linear_time(text: str, number: str | None) -> None:
    # with any backtracking across the repetitions these would take hours
    assert final_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize("spec", ["exact", "numeric"])
def test_a_row_without_an_answer_is_named(spec: str) -> None:
    with pytest.raises(RewardError, match=f"'{spec}', row 2, prompt '.': the row has no value in the column 'answer'"):
        score(spec, ["4", "4"], answer=[4, None])


@given(st.integers(-999, 999), st.integers(1, 999))
def test_fractions_survive(top: int, bottom: int) -> None:
    assert final_number(f"it is {top}/{bottom}") == Fraction(top, bottom)
    assert final_number(rf"it is \frac{{{top}}}{{{bottom}}}") == Fraction(top, bottom)


@given(st.text(alphabet="0123456789,./-+eE$%#{} \\boxedfrac\n", max_size=60))
def test_any_text_is_read(text: str) -> None:
    found = final_number(text)
    assert found is None or isinstance(found, Fraction)


GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72"


def test_numeric_reads_worked_answers_and_plain_numbers() -> None:
    completions = ["It is 72", "72.0 clips", "#### 73", "no idea", r"\boxed{144/2}"]
    assert score("numeric", completions, answer=[GSM8K] * 5) == [1, 1, 0, 0, 1]
    assert score({"use": "numeric", "column": "gold"}, ["0.1", "0.1"], gold=[0.1, "0.10000001"]) == [1, 0]


def test_an_answer_without_a_number_is_an_error() -> None:
    with pytest.raises(RewardError, match=r"'numeric', row 2, prompt '\?': the answer 'many' has no number"):
        score("numeric", ["1", "1"], answer=["1", "many"])
    with pytest.raises(RewardError, match=r"the answer datetime.date\(2024, 5, 1\) is neither text nor a number"):
        score("numeric", ["1"], answer=[date(2024, 5, 1)])
    with pytest.raises(RewardError, match="needs the column 'answer'; the rows have gold"):
        score("numeric", ["1"], gold=["1"])


EXPRESSIONS = {"use": "numeric", "verify": "math"}


def test_expressions_by_math_verify() -> None:
    pytest.importorskip("math_verify")
    completions = [r"$\frac{\sqrt{8}}{2}$", r"$1.5$", "72"]
    assert score(EXPRESSIONS, completions, answer=[r"$\sqrt{2}$"] * 2 + [GSM8K]) == [1, 0, 1]
    with pytest.raises(RewardError, match="math-verify finds no expression in the answer ''"):
        score(EXPRESSIONS, ["1"], answer=[""])


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("2x+1", [r"\boxed{2x+1}", "so $1+2x$", "2x+1"], [r"\boxed{2}", r"\boxed{2x}", "no idea"]),
        ("2", [r"\boxed{2}", "It is 2."], ["2x+1", r"\boxed{2x+1}"]),
        (r"1+\sqrt{3}", [r"\boxed{\sqrt3+1}"], [r"\boxed{1}"]),
        ("2^{10}", [r"\boxed{1024}"], [r"\boxed{2}"]),
        ("3,4", [r"\boxed{3, 4}"], [r"\boxed{3.4}"]),
        (r"\sqrt{2}", [r"$\sqrt{2}$"], [r"\boxed{2}"]),
        (r"2\sqrt{2}", [r"\boxed{\sqrt{8}}"], [r"\boxed{2}"]),
        ("(1,0)", [r"\boxed{(1,0)}"], [r"\boxed{1}", r"\boxed{(0,1)}"]),
        ("x^2+1", [r"\boxed{1+x^2}"], [r"\boxed{x^2}"]),
        (r"\frac{1}{2}", ["1/2", r"\boxed{0.5}", r"= - \boxed{-\frac12}"], [r"\boxed{1}", r"-\boxed{\frac12}"]),
        ("1,000", [r"\boxed{1000}"], [r"\boxed{1}"]),
        ("(1,000)", [r"\boxed{1000}", r"\boxed{(1,000)}"], [r"\boxed{(1,0)}"]),
        ("(100,200)", [r"\boxed{(100,200)}"], [r"\boxed{100200}"]),
        ("[0,1)", [r"\boxed{[0,1)}"], [r"\boxed{(0,1)}"]),
        (r"\{1,2\}", [r"\boxed{\{2,1\}}"], [r"\boxed{1}"]),
        ("x=5", [r"\boxed{5}"], [r"\boxed{x}"]),
        ("-5", [r"-\boxed{5}", r"\boxed{-5}"], [r"\boxed{5}"]),
        ("5", [r"\boxed{3} then \boxed{5}"], [r"-\boxed{5}", r"\boxed{5} then \boxed{3}"]),
        (r"10\text{ cm}", [r"\boxed{10}"], [r"\boxed{1}"]),
        ("many", [r"\boxed{many}", "Many."], ["not many", r"\boxed{few}", r"\boxed{yman}"]),
        (r"\text{Tuesday}", [r"\boxed{Tuesday}"], [r"\boxed{Monday}"]),
        ("A", [r"\boxed{\text{A}}"], [r"\boxed{B}"]),
        ("twice one\n#### 2x+1", [r"\boxed{2x+1}", "#### 2x+1"], ["#### 2"]),
    ],
)
def test_a_bare_answer_is_read_whole(answer: str, right: list[str], wrong: list[str]) -> None:
    pytest.importorskip("math_verify")
    completions = [*right, *wrong]
    expected = [1.0] * len(right) + [0.0] * len(wrong)
    assert score(EXPRESSIONS, completions, answer=[answer] * len(completions)) == expected


def test_math_verify_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r'pip install "alignkit\[math\]"'):
        check_rewards({"use": "numeric", "verify": "math"})


# ------------------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    ("answer", "shown"),
    [(1000.0, "1000.0 is no text (float)"), (date(2024, 5, 1), "datetime.date(2024, 5, 1) is no text (date)")],
)
def test_an_answer_that_has_several_spellings_is_refused(answer: object, shown: str) -> None:
    with pytest.raises(RewardError, match=re.escape(f"'exact', row 2, prompt '?': the answer {shown}")):
        score("exact", ["1000", "1000"], answer=["1000", answer])


def test_exact() -> None:
    assert score("exact", ["Paris", " Paris\n", "paris", "Paris."], answer=["Paris"] * 4) == [1, 1, 0, 0]
    assert score("exact", ["4", ""], answer=[4, "none"]) == [1, 0]
    assert score("exact", ["true", "True", "false"], answer=[True, True, False]) == [1, 0, 1]
    message = [{"role": "assistant", "content": "Paris"}]
    assert score({"use": "exact", "column": "capital"}, [message], capital=["Paris "]) == [1]


def test_format() -> None:
    completions = ["<think>a</think>", "<think>a</think> b", "x", "<think>a\nb</think>"]
    assert score({"use": "format", "pattern": "<think>.*</think>"}, completions) == [1, 0, 0, 0]
    assert score({"use": "format", "pattern": "(?s)<think>.*</think>", "match": "search"}, completions) == [1, 1, 0, 1]
    with pytest.raises(ConfigError, match="pattern: is not a regular expression"):
        check_rewards({"use": "format", "pattern": "(a"})


def test_a_pattern_without_an_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.rewards.verifiers._SECONDS", 0.05)
    with pytest.raises(
        RewardError, match=r"'format', row 2, .*: the pattern '\(a\|aa\)\*\$' takes more than 0.05 s on 'aaaa"
    ):
        score({"use": "format", "pattern": "(a|aa)*$"}, ["aaa", "a" * 60 + "c"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_json_takes_json(value: Any) -> None:
    text = json.dumps(value, indent=1)
    assert score("json", [f" {text}\n"]) == [1]
    assert score("json", [f"Here it is: {text}"]) == [0]


def test_json() -> None:
    bad = ["{", "", "NaN", "[Infinity]", "[" * 100_000, '{"a": 1,}', "9" * 5000]
    assert score("json", bad) == [0] * len(bad)
    keyed = {"use": "json", "keys": ["a", "b"]}
    assert score(keyed, ['{"a": 1, "b": null, "c": 2}', '{"a": 1}', '["a", "b"]', '"ab"']) == [1, 0, 0, 0]


# ---------------------------------------------------------------------------------------------------------- lengths


def lengths(spec: Any, *n: int) -> list[float]:
    return score(spec, [""] * len(n), list(n))


def test_length_by_hand() -> None:
    window = {"use": "length", "min": 4, "max": 8, "slack": 4}
    assert lengths(window, 0, 1, 3, 4, 8, 9, 11, 12, 50) == [0, 0.25, 0.75, 1, 1, 0.75, 0.25, 0, 0]
    assert lengths({"use": "length", "min": 4, "max": 8}, 3, 4, 8, 9) == [0, 1, 1, 0]
    with pytest.raises(ConfigError, match="min is 5 and max 4"):
        check_rewards({"use": "length", "min": 5, "max": 4})


def test_brevity_is_dapos_overlong_punishment() -> None:
    # 2503.14476, eq. 13, with L_max 20480 and L_cache 4096
    spec = {"use": "brevity", "free": 20480 - 4096, "limit": 20480}
    want = [0.0, 0.0, (16384 - 17408) / 4096, -1.0, -1.0]
    assert lengths(spec, 1, 16384, 17408, 20480, 30000) == want
    assert lengths({"use": "brevity", "limit": 10}, 0, 1, 5, 10, 11) == pytest.approx([0, -0.1, -0.5, -1, -1])
    with pytest.raises(ConfigError, match="free is 9 and limit 9"):
        check_rewards({"use": "brevity", "free": 9, "limit": 9})


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 20), st.integers(0, 120))
def test_longer_outside_of_the_window_is_never_better(low: int, width: int, slack: int, n: int) -> None:
    window = {"use": "length", "min": low, "max": low + width, "slack": slack}
    here, longer = lengths(window, n, n + 1)
    assert 0 <= here <= 1
    assert (here == 1) == (low <= n <= low + width)
    assert longer <= here if n >= low + width else longer >= here or n >= low


def test_every_option_is_described() -> None:
    from alignkit.rewards.spec import JUDGE, REWARD

    for cls in (*REWARD.built_in.values(), *JUDGE.built_in.values()):
        for name, option in cls.model_fields.items():
            assert option.description, f"{cls.__name__}.{name}"
            assert not re.search(r"[.]$", option.description)
