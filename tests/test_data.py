"""Rows in every form that users bring, and what is said about those that cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit.data import FaultyRowsError, Report, Row, load
from alignkit.errors import AlignkitError, ConfigError, DataError

DATA = Path(os.environ.get("ALIGNKIT_DATA", Path(__file__).parents[2] / "shared/data"))
USER = {"role": "user", "content": "2 + 2?"}
SYSTEM = {"role": "system", "content": "Add."}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}


def only(rows: list[dict], kind: str, columns: dict | None = None) -> Row:
    (row,) = load(rows, kind, columns).rows
    return row


# ---- forms ----------------------------------------------------------------------------------------------------------

FORMS = [
    (PAIR, "pairs", "2 + 2?", ("4", "5"), {}),
    ({**PAIR, "margin": 2}, "pairs", "2 + 2?", ("4", "5"), {"margin": 2.0}),
    ({"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}, "pairs", [USER], ([FOUR], [FIVE]), {}),
    ({"prompt": "2 + 2?", "chosen": [USER, FOUR], "rejected": [USER, FIVE]}, "pairs", [USER], ([FOUR], [FIVE]), {}),
    ({"prompt": "2 + 2?", "chosen": [FOUR], "rejected": [FIVE]}, "pairs", [USER], ([FOUR], [FIVE]), {}),
    ({"prompt": [USER], "chosen": "4", "rejected": "5"}, "pairs", [USER], ([FOUR], [FIVE]), {}),
    ({"prompt": [USER], "chosen": [USER, FOUR], "rejected": [USER, FIVE]}, "pairs", [USER], ([FOUR], [FIVE]), {}),
    ({"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, "pairs", [USER], ([FOUR], [FIVE]), {}),
    (
        {"prompt": " 2 + 2? ", "chosen": [SYSTEM, USER, FOUR], "rejected": [SYSTEM, USER, FIVE]},
        "pairs",
        [SYSTEM, USER],
        ([FOUR], [FIVE]),
        {},
    ),
    ({"prompt": [USER], "completion": [FOUR, USER]}, "text", [USER], ([FOUR],), {}),
    ({"prompt": "q", "completions": ["a"], "scores": [0]}, "text", "q", ("a",), {}),
    ({"prompt": "q", "completions": ["a", "b"], "scores": [1, 1]}, "text", "q", ("a",), {}),
    ({"chosen": [USER, FOUR], "rejected": [USER, FOUR]}, "prompts", [USER], (), {}),
    ({"prompt": json.dumps([USER]), "completion": "c"}, "text", json.dumps([USER]), ("c",), {}),
    (
        {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
        "pairs",
        "\n\nHuman: 2 + 2?\n\nAssistant:",
        (" 4", " 5"),
        {},
    ),
    (
        {"prompt": "q", "response_a": "x", "response_b": "y", "winner": "B "},
        "pairs",
        "q",
        ("y", "x"),
        {},
    ),
    ({"prompt": "q", "answer_a": "x", "answer_b": "y", "winner": "a"}, "pairs", "q", ("x", "y"), {}),
    ({"prompt": "q", "completion_a": "x", "completion_b": "y", "winner": "a"}, "pairs", "q", ("x", "y"), {}),
    (
        {"prompt": "q", "completions": ["mid", "worst", "best", "best too"], "scores": [1, -2.5, 3, 3]},
        "pairs",
        "q",
        ("best", "worst"),
        {},
    ),
    ({"prompt": "q", "completion": "c", "label": True}, "unpaired", "q", ("c",), {"desirable": 1.0}),
    ({"prompt": "q", "completion": "c", "label": 0}, "unpaired", "q", ("c",), {"desirable": 0.0}),
    ({"prompt": "q", "completion": "c", "label": "False"}, "unpaired", "q", ("c",), {"desirable": 0.0}),
    ({"prompt": "q", "completion": "c", "label": True}, "text", "q", ("c",), {}),
    ({"prompt": "q", "completion": "c"}, "text", "q", ("c",), {}),
    ({"text": "once"}, "text", "", ("once",), {}),
    ({"messages": [USER, FOUR]}, "text", [USER], ([FOUR],), {}),
    ({"messages": [USER, FOUR, USER, FIVE]}, "text", [USER], ([FOUR, USER, FIVE],), {}),
    ({"messages": [USER, FOUR, USER]}, "text", [USER], ([FOUR],), {}),
    (PAIR, "text", "2 + 2?", ("4",), {}),
    (
        {"prompt": "q", "completions": ["a", "b"], "scores": [0, 1]},
        "text",
        "q",
        ("b",),
        {},
    ),
    (PAIR, "prompts", "2 + 2?", (), {}),
    ({"prompt": "q"}, "prompts", "q", (), {}),
    ({"messages": [USER, FOUR]}, "prompts", [USER], (), {}),
    ({"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, "prompts", [USER], (), {}),
    ({"text": "once"}, "prompts", "once", (), {}),
    ({"prompt": "q", "response_a": "x", "response_b": "y", "winner": "tie"}, "prompts", "q", (), {}),
]


@pytest.mark.parametrize(("row", "kind", "prompt", "completions", "numbers"), FORMS)
def test_every_form_gives_the_rows_that_a_method_needs(row, kind, prompt, completions, numbers):
    got = only([row], kind)
    assert (got.prompt, got.completions, got.numbers, got.row) == (prompt, completions, numbers, 1)


def test_a_tool_turn_belongs_to_the_answer():
    call = {"role": "assistant", "content": "add(2, 2)"}
    result = {"role": "tool", "content": "4"}
    row = only([{"messages": [USER, call, result, FOUR]}], "text")
    assert (row.prompt, row.completions) == ([USER], ([call, result, FOUR],))


def test_pairs_for_an_unpaired_method_are_split():
    rows = load([PAIR, {**PAIR, "rejected": "6"}], "unpaired").rows
    assert [(r.completions, dict(r.numbers), r.row) for r in rows] == [
        (("4",), {"desirable": 1.0}, 1),
        (("5",), {"desirable": 0.0}, 1),
        (("4",), {"desirable": 1.0}, 2),
        (("6",), {"desirable": 0.0}, 2),
    ]


def test_undesirable_answers_are_no_text_to_imitate():
    rows = [{"prompt": "q", "completion": str(i), "label": i != 1} for i in range(3)]
    dataset = load(rows, "text")
    assert [r.completions for r in dataset] == [("0",), ("2",)]
    assert dataset.report.lines() == ["dropped 1 of 3 rows: 1 with an undesirable answer (row 2)"]


def test_other_columns_stay_for_reward_functions():
    assert only([{**PAIR, "id": 7}], "pairs").extra == {"id": 7}
    assert only([{"question": "q", "answer": "4"}], "prompts", {"prompt": "question"}).extra == {"answer": "4"}
    assert only([{"prompt": "q", "completion": "4"}], "prompts").extra == {"completion": "4"}


def test_a_form_that_serves_the_kind_goes_before_one_that_does_not():
    row = {"prompt": "q", "completion": "c", "messages": [USER, FOUR]}
    assert load([row], "text").form == "completion"
    assert load([row], "text", {"form": "messages"}).form == "messages"


def test_columns_rename():
    row = {"instruction": "q", "good": "x", "bad": "y", "prompt": "something else"}
    got = only([row], "pairs", {"prompt": "instruction", "chosen": "good", "rejected": "bad"})
    assert (got.prompt, got.completions) == ("q", ("x", "y"))


# ---- rows that are dropped and counted ------------------------------------------------------------------------------


def test_ties_empty_and_identical_answers_are_dropped_and_counted():
    answers = [("x", "y", "a"), ("x", "y", "tie"), ("x", "x", "a"), (" \n", "y", "b"), ("x", "x", "b"), ("x", "y", "b")]
    rows = [{"prompt": "q", "response_a": a, "response_b": b, "winner": w} for a, b, w in answers]
    dataset = load(rows, "pairs")
    assert [r.row for r in dataset] == [1, 6]
    assert dataset.report.dropped == {"ties": [2], "identical answers": [3, 5], "empty answers": [4]}
    assert dataset.lines() == [
        "the list of rows: 6 rows of the form 'winner', read as pairs",
        "dropped 4 of 6 rows: 1 tie (row 2), 2 identical answers (rows 3, 5), 1 empty answer (row 4)",
    ]


def test_ranked_rows_without_a_difference_are_dropped():
    ranked = [(["x", "y"], [1, 1]), (["x"], [1]), (["x", "y"], [0, 1]), (["x", "x"], [0, 1])]
    rows = [{"prompt": "q", "completions": c, "scores": s} for c, s in ranked]
    dataset = load(rows, "pairs")
    assert [r.completions for r in dataset] == [("y", "x")]
    assert dataset.report.dropped == {"ties": [1], "with a single answer": [2], "identical answers": [4]}


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("\n\nHuman: a\n\nAssistant: x\n\nHuman: b\n\nAssistant: y", "\n\nHuman: a\n\nAssistant: z"),
        (
            "\n\nHuman: a\n\nAssistant: x\n\nHuman: b\n\nAssistant: y",
            "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\n\nAssistant: y",
        ),
        ("\n\nHuman: a\n\nAssistant: z", "\n\nHuman: a\n\nAssistant: x\n\nHuman: b\n\nAssistant: y"),
        ("no turns", "at all"),
        ([USER, FOUR], [{"role": "user", "content": "3 + 3?"}, FOUR]),
        ([USER, FOUR, USER, FOUR], [USER, FOUR, {"role": "user", "content": "3 + 3?"}, FOUR]),
        ([USER, FOUR], [USER, FOUR, USER, FIVE]),
    ],
)
def test_conversations_without_a_common_last_turn_are_dropped(chosen, rejected):
    row = {"chosen": [USER, FOUR], "rejected": [USER, FIVE]}
    dataset = load([row, {"chosen": chosen, "rejected": rejected}], "pairs")
    assert dataset.report.dropped == {"without a common last turn": [2]}


def test_a_common_beginning_of_the_answers_stays_with_the_answers():
    row = {"chosen": "\n\nHuman: a\n\nAssistant: It is x", "rejected": "\n\nHuman: a\n\nAssistant: It is y"}
    assert only([row], "pairs").completions == (" It is x", " It is y")


def test_answers_of_several_turns_keep_what_stands_between():
    more = [FIVE, {"role": "user", "content": "sure?"}, FOUR]
    row = only([{"chosen": [USER, FOUR], "rejected": [USER, *more]}], "pairs")
    assert row.completions == ([FOUR], more)


def test_nothing_left_is_an_error():
    with pytest.raises(DataError, match=r"no row is left; dropped 2 of 2 rows: 2 identical answers \(rows 1, 2\)"):
        load([{**PAIR, "rejected": "4"}] * 2, "pairs")


def test_reports_of_two_stages_join():
    first, second = Report(10), Report(10)
    first.drop("ties", 3)
    second.drop("ties", 4)
    second.drop("empty answers", 4)
    second.note("prompts cut", 5)
    assert (first + second).lines() == [
        "dropped 2 of 10 rows: 2 ties (rows 3, 4), 1 empty answer (row 4)",
        "1 prompts cut (row 5)",
    ]
    assert Report(3).lines() == []


def test_a_long_list_of_rows_is_shortened():
    report = Report(20)
    for row in range(1, 12):
        report.drop("ties", row)
    assert report.lines() == ["dropped 11 of 20 rows: 11 ties (rows 1, 2, 3, 4, 5, 6, 7, 8, ...)"]


# ---- faults ---------------------------------------------------------------------------------------------------------

BAD = {"role": "asistant", "content": "4"}
FAULTS = [
    ({**PAIR, "chosen": None}, "pairs", "chosen", "None"),
    ({**PAIR, "chosen": 3}, "pairs", "chosen", "3"),
    ({**PAIR, "chosen": []}, "pairs", "chosen", r"\[\]"),
    ({**PAIR, "margin": "wide"}, "pairs", "margin", "'wide'"),
    ({**PAIR, "margin": None}, "pairs", "margin", "None"),
    ({**PAIR, "margin": float("nan")}, "pairs", "margin", "nan"),
    ({**PAIR, "chosen": "\ud800"}, "pairs", "chosen", "surrogate"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [FOUR]}, "pairs", "chosen", "no answer after the prompt"),
    ({"chosen": "x", "rejected": [USER, FOUR]}, "pairs", "rejected", "one answer is text"),
    ({"prompt": "q", "response_a": "x", "response_b": "y", "winner": "c"}, "pairs", "winner", "'c'"),
    ({"prompt": "q", "completions": ["x"], "scores": [1, 2]}, "pairs", "scores", "2 scores for 1 completions"),
    ({"prompt": "q", "completions": ["x", None], "scores": [1, 2]}, "pairs", "completions", "None"),
    ({"prompt": "q", "completions": "x", "scores": [1, 2]}, "pairs", "completions", "'x'"),
    ({"prompt": "q", "completions": ["x", "y"], "scores": [1, None]}, "pairs", "scores", "None"),
    ({"prompt": "q", "completion": "c", "label": "maybe"}, "unpaired", "label", "'maybe'"),
    ({"prompt": "q", "completion": "c", "label": None}, "unpaired", "label", "None"),
    ({"prompt": "q", "completion": "c", "label": -1}, "unpaired", "label", "-1"),
    ({"messages": [USER, BAD]}, "text", "messages", "'asistant'.*Did you mean 'assistant'"),
    (
        {"messages": [USER, {"role": "assistant", "content": None}]},
        "text",
        "messages",
        "assistant message has content None",
    ),
    ({"messages": [USER, "4"]}, "text", "messages", "'4'"),
    ({"messages": "hello"}, "text", "messages", "'hello'"),
    ({"messages": [FOUR]}, "text", "messages", "found an assistant message at the start"),
    ({"messages": [USER, {**FOUR, "tool_calls": [1]}]}, "text", "messages", "tool_calls"),
    ({"text": [USER]}, "text", "text", "rename the column to 'messages'"),
    ({"prompt": None}, "prompts", "prompt", "None"),
]


@pytest.mark.parametrize(("row", "kind", "column", "said"), FAULTS)
def test_a_fault_names_row_column_and_what_was_there(row, kind, column, said):
    good = {key: value for key, value in FAULTS_GOOD[frozenset(row)].items() if key in row}
    with pytest.raises(FaultyRowsError, match=said) as error:
        load([good, row], kind)
    (fault,) = error.value.faults
    assert (fault.row, fault.column) == (2, column)
    assert f"row 2, column '{column}': " in str(error.value)
    load([good], kind)  # so it is the row that was refused


FAULTS_GOOD = {
    frozenset(row): {
        **PAIR,
        "margin": 1,
        "response_a": "x",
        "response_b": "y",
        "winner": "a",
        "completion": "c",
        "label": True,
        **({} if "prompt" in row else {"chosen": [USER, FOUR], "rejected": [USER, FIVE]}),
        "completions": ["x", "y"],
        "scores": [0, 1],
        "messages": [USER, FOUR],
        "text": "t",
    }
    for row, *_ in FAULTS
}


def test_all_faults_of_a_file_come_at_once_in_six_lines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps(PAIR), "", "{not json", json.dumps([1]), json.dumps({"prompt": "q", "chosen": "x"})]
    lines += [json.dumps({**PAIR, "prompt": None, "rejected": 0.5})] * 3 + [json.dumps(PAIR)] * 9
    path.write_text("\n".join(lines))
    with pytest.raises(FaultyRowsError) as error:
        load(path, "pairs")
    places = [(fault.row, fault.column) for fault in error.value.faults]
    doubles = [(row, column) for row in (6, 7, 8) for column in ("prompt", "rejected")]
    assert places == [(3, ""), (4, ""), (5, "rejected"), *doubles]
    message = str(error.value).splitlines()
    assert len(message) == 6
    assert message[0] == f"{path}: 9 faults"
    assert message[1].startswith("  row 3: not JSON (Expecting property name")
    assert "'{not json'" in message[1]
    assert message[3].startswith("  row 5, column 'rejected': the column is missing; ")
    assert message[-1] == "  ... and 5 more"


def test_five_faults_fit_into_six_lines():
    with pytest.raises(FaultyRowsError) as error:
        load([PAIR, *[{**PAIR, "chosen": "x" * 5000 if i == 9 else i} for i in range(5)]], "pairs")
    assert len(str(error.value).splitlines()) == 6
    assert "more" not in str(error.value)


def test_what_was_there_is_shortened():
    with pytest.raises(FaultyRowsError) as error:
        load([{**PAIR, "margin": 0}, {**PAIR, "margin": "9" + "x" * 10_000}], "pairs")
    assert max(map(len, str(error.value).splitlines())) < 200


def test_a_margin_in_some_rows_only_is_a_fault_of_the_others():
    with pytest.raises(FaultyRowsError, match="row 2, column 'margin': found None"):
        load([{**PAIR, "margin": 0.5}, PAIR], "pairs")
    assert only([{**PAIR, "margin": None}], "text").extra == {"margin": None}


def test_dropped_rows_do_not_hide_faults():
    tie = {"prompt": None, "response_a": "x", "response_b": "y", "winner": "tie"}
    with pytest.raises(FaultyRowsError, match="column 'prompt': found None"):
        load([tie], "pairs")


# ---- what was found, what is needed, what to type -------------------------------------------------------------------


def test_a_form_that_does_not_serve_the_method():
    with pytest.raises(DataError) as error:
        load([{"prompt": "q", "completion": "c"}], "pairs")
    message = str(error.value)
    assert "found rows of the form 'completion' (prompt + completion)" in message
    assert "The method needs pairs" in message
    assert (
        "--columns chosen=<yours>,rejected=<yours> (in a file, columns: {chosen: <yours>, rejected: <yours>})"
        in message
    )


@pytest.mark.parametrize(
    ("rows", "kind", "columns", "error", "said"),
    [
        ([{"question": "q"}], "text", None, DataError, "found the columns question, which match no known form"),
        ([PAIR], "pair", None, ConfigError, "Did you mean 'pairs'?"),
        ([PAIR], "pairs", {"promt": "prompt"}, ConfigError, "unknown name 'promt'. Did you mean 'prompt'?"),
        ([PAIR], "pairs", {"prompt": "promt"}, DataError, "no column 'promt'.*Did you mean 'prompt'?"),
        ([PAIR], "pairs", {"form": "pair"}, ConfigError, "unknown form 'pair'. Did you mean 'pairs'?"),
        ([PAIR], "text", {"form": "messages"}, DataError, "the form 'messages' needs the columns messages; found"),
        ([], "pairs", None, DataError, "holds no rows"),
        (3, "pairs", None, DataError, "cannot read rows from int"),
    ],
)
def test_errors_say_what_to_do(rows, kind, columns, error, said):
    with pytest.raises(error, match=said):
        load(rows, kind, columns)


def test_one_stray_row_does_not_decide_the_form():
    rows = [{"messages": [USER, FOUR]}] * 2
    with pytest.raises(FaultyRowsError) as error:
        load([*rows, PAIR], "text")
    assert [(fault.row, fault.column) for fault in error.value.faults] == [(3, "messages")]


def test_identical_conversations_are_counted_as_such():
    for answers in ([USER, FOUR], "\n\nHuman: a\n\nAssistant: x"):
        rows = [{"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, {"chosen": answers, "rejected": answers}]
        assert load(rows, "pairs").report.dropped == {"identical answers": [2]}


# ---- whatever users bring -------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
        | st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "tool", "bot"]), "content": inner}
        )
    ),
    max_leaves=8,
)
COLUMNS = ["prompt", "chosen", "rejected", "completion", "label", "messages", "text", "completions", "scores", "winner"]


@given(
    st.lists(st.dictionaries(st.sampled_from([*COLUMNS, "answer_a", "answer_b", "margin"]), JSON), max_size=4),
    st.sampled_from(["pairs", "unpaired", "text", "prompts"]),
)
def test_any_rows_are_loaded_or_refused_with_an_alignkit_error(rows, kind):
    try:
        dataset = load(rows, kind)
    except AlignkitError as refused:
        n_lines = len(str(refused).splitlines())
    else:
        n_lines = 0
    assert n_lines <= 6
    for row in [] if n_lines else dataset:
        assert len({type(row.prompt), *map(type, row.completions)}) == 1
        assert len(row.completions) == {"pairs": 2, "prompts": 0}.get(kind, 1)
        assert 1 <= row.row <= len(rows)


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=3), st.text(), st.text())
def test_conversations_are_cut_without_losing_a_character(turns, one, other):
    lead = "".join(f"\n\nHuman: {a}\n\nAssistant: {b}" for a, b in turns[:-1]) + f"\n\nHuman: {turns[-1][0]}"
    chosen, rejected = f"{lead}\n\nAssistant:{one}", f"{lead}\n\nAssistant:{other}"
    try:
        row = only([{"chosen": chosen, "rejected": rejected}], "pairs")
    except DataError:
        return
    assert (row.prompt + row.completions[0], row.prompt + row.completions[1]) == (chosen, rejected)
    assert row.prompt.endswith("\n\nAssistant:")
    assert "\n\nAssistant:" not in row.completions[0] + row.completions[1]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real rows in {DATA} (set ALIGNKIT_DATA)")
def test_real_preference_pairs():
    dataset = load(DATA / "hh_pairs.jsonl", "pairs")
    assert dataset.form == "conversations"
    assert dataset.report.lines() == [
        "dropped 5 of 1200 rows: 3 empty answers (rows 398, 572, 921), 2 without a common last turn (rows 844, 857)"
    ]
    assert len(dataset) == 1195
    assert all(row.prompt.endswith("\n\nAssistant:") for row in dataset)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real rows in {DATA} (set ALIGNKIT_DATA)")
def test_real_questions():
    path = DATA / "gsm8k_train.jsonl"
    assert len(load(path, "text", {"prompt": "question", "completion": "answer"})) == 7473
    rows = load(path, "prompts", {"prompt": "question"}).rows
    assert rows[0].prompt.startswith("Natalia")
    assert rows[0].extra["answer"].endswith("#### 72")
