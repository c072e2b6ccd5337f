"""Rows as they were published: ShareGPT, Alpaca, UltraFeedback, HelpSteer and others, for every kind of method."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from alignkit.data import Dataset, FaultyRowsError, load
from alignkit.errors import DataError

Turn = dict[str, str]


def system(text: str) -> Turn:
    return {"role": "system", "content": text}


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def assistant(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def said(name: str, text: str) -> Turn:
    return {"from": name, "value": text}


def only(row: dict[str, Any], kind: str) -> tuple[Any, Any, dict[str, float]]:
    (found,) = load([row], kind).rows  # type: ignore[arg-type]
    return found.prompt, found.completions, dict(found.numbers)


TALK = [said("human", "2 + 2?"), said("gpt", "4")]
LONG = [*TALK, said("human", "3 + 3?")]
CALL = '{"name": "add", "arguments": {"a": 2, "b": 2}}'
TOOLS = '[{"name": "add"}]'
ASKED = [user("2 + 2?"), assistant("4"), user("3 + 3?")]

# ---- ShareGPT -------------------------------------------------------------------------------------------------------

SHAREGPT = [
    ({"conversations": TALK}, "text", [user("2 + 2?")], ([assistant("4")],), {}),
    ({"messages": TALK}, "text", [user("2 + 2?")], ([assistant("4")],), {}),
    ({"conversations": [user("2 + 2?"), assistant("4")]}, "text", [user("2 + 2?")], ([assistant("4")],), {}),
    (
        {"conversations": [said("system", "Add."), *LONG, said("chatgpt", "6")]},
        "text",
        [system("Add."), user("2 + 2?")],
        ([assistant("4"), user("3 + 3?"), assistant("6")],),
        {},
    ),
    ({"conversations": LONG, "system": "Add."}, "prompts", [system("Add."), *ASKED], (), {}),
    (
        {"messages": [user("q"), assistant("a")], "system": "S"},
        "text",
        [system("S"), user("q")],
        ([assistant("a")],),
        {},
    ),
    (
        {
            "conversations": [said("system", "First."), *TALK],
            "system": "Second.",
        },  # as LLaMA-Factory: the message counts
        "text",
        [system("First."), user("2 + 2?")],
        ([assistant("4")],),
        {},
    ),
    (
        {"conversations": LONG, "chosen": said("gpt", "6"), "rejected": said("gpt", "7"), "system": ""},
        "pairs",
        ASKED,
        ([assistant("6")], [assistant("7")]),
        {},
    ),
    ({"conversations": LONG, "chosen": said("gpt", "6"), "rejected": said("gpt", "7")}, "prompts", ASKED, (), {}),
    (
        {"conversations": [*LONG, said("gpt", "6")], "kto_tag": False},
        "unpaired",
        ASKED,
        ([assistant("6")],),
        {"desirable": 0.0},
    ),
    ({"messages": TALK, "kto_tag": True}, "unpaired", [user("2 + 2?")], ([assistant("4")],), {"desirable": 1.0}),
    ({"conversations": TALK, "label": True}, "unpaired", [user("2 + 2?")], ([assistant("4")],), {"desirable": 1.0}),
    ({"conversations": [*LONG, said("gpt", "6")], "kto_tag": False}, "prompts", ASKED, (), {}),
    (
        {"prompt": "2 + 2?", "chosen": TALK, "rejected": [TALK[0], said("gpt", "5")]},  # in a form of ours too
        "pairs",
        [user("2 + 2?")],
        ([assistant("4")], [assistant("5")]),
        {},
    ),
]


@pytest.mark.parametrize(("row", "kind", "prompt", "completions", "numbers"), SHAREGPT)
def test_sharegpt(row: Any, kind: str, prompt: Any, completions: Any, numbers: Any) -> None:
    assert only(row, kind) == (prompt, completions, numbers)


@pytest.mark.parametrize("name", ["gpt", "assistant", "chatgpt", "bing", "bard", "GPT"])
def test_every_name_of_an_assistant(name: str) -> None:
    assert only({"conversations": [said("human", "q"), said(name, "a")]}, "text")[1] == ([assistant("a")],)


@pytest.mark.parametrize("name", ["tool", "function", "observation"])
def test_a_call_and_its_result_keep_their_text(name: str) -> None:
    turns = [said("user", "2 + 2?"), said("function_call", CALL), said(name, "4"), said("gpt", "It is 4.")]
    (row,) = load([{"conversations": turns, "tools": TOOLS}], "text").rows
    assert row.prompt == [user("2 + 2?")]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert row.completions == ([asked, {"role": "tool", "content": "4"}, assistant("It is 4.")],)
    assert row.extra == {"tools": TOOLS}
    turns[1] = said("function_call", f"[{CALL}, {CALL}]")
    (row,) = load([{"conversations": turns}], "text").rows
    assert row.completions[0][0]["tool_calls"] == [call, call]
    turns[1] = said("function_call", "add 2 and 2")  # is no call
    (row,) = load([{"conversations": turns}], "text").rows
    assert row.completions[0][0] == assistant("add 2 and 2")


def test_sharegpt_through_parquet_and_csv(tmp_path: Path) -> None:
    rows = [{"conversations": TALK, "system": "Add."}, {"conversations": LONG, "system": None}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["conversations", "system"])
        writer.writerows([[json.dumps(row["conversations"]), row["system"] or ""] for row in rows])
    for name in ("rows.parquet", "rows.csv"):
        found = load(tmp_path / name, "text").rows
        assert [row.prompt for row in found] == [[system("Add."), user("2 + 2?")], [user("2 + 2?")]]


# ---- Alpaca ---------------------------------------------------------------------------------------------------------

ALPACA = {"instruction": "Add.", "input": "2 + 2", "output": "4"}
FULL = {**ALPACA, "system": "Be brief.", "history": [["Hello", "Hi"]]}
BEFORE = [system("Be brief."), user("Hello"), assistant("Hi"), user("Add.\n2 + 2")]
ALPACAS = [
    (ALPACA, "text", [user("Add.\n2 + 2")], ([assistant("4")],), {}),
    ({"instruction": "Add.", "input": "", "output": "4"}, "text", [user("Add.")], ([assistant("4")],), {}),
    ({"instruction": "Add.", "input": None, "output": "4"}, "text", [user("Add.")], ([assistant("4")],), {}),
    ({"instruction": "Add.", "output": "4"}, "text", [user("Add.")], ([assistant("4")],), {}),
    (FULL, "text", BEFORE[:2], ([*BEFORE[2:], assistant("4")],), {}),  # answers of the history are learned too
    (FULL, "prompts", BEFORE, (), {}),
    ({**FULL, "kto_tag": True}, "unpaired", BEFORE, ([assistant("4")],), {"desirable": 1.0}),
    ({**ALPACA, "label": 0}, "unpaired", [user("Add.\n2 + 2")], ([assistant("4")],), {"desirable": 0.0}),
    (
        {**FULL, "chosen": "4", "rejected": "5"},
        "pairs",
        BEFORE,
        ([assistant("4")], [assistant("5")]),
        {},
    ),
    (
        {"instruction": "Add.", "chosen": [user("Add."), assistant("4")], "rejected": [user("Add."), assistant("5")]},
        "pairs",
        [user("Add.")],
        ([assistant("4")], [assistant("5")]),
        {},
    ),
    ({**ALPACA, "history": [], "system": ""}, "text", [user("Add.\n2 + 2")], ([assistant("4")],), {}),
]


@pytest.mark.parametrize(("row", "kind", "prompt", "completions", "numbers"), ALPACAS)
def test_alpaca(row: Any, kind: str, prompt: Any, completions: Any, numbers: Any) -> None:
    assert only(row, kind) == (prompt, completions, numbers)


def test_alpaca_as_text_by_columns() -> None:
    (row,) = load([ALPACA], "text", {"prompt": "instruction", "completion": "output"}).rows
    assert (row.prompt, row.completions) == ("Add.", ("4",))


def test_rewards_receive_the_columns_that_are_not_the_prompt() -> None:
    assert load([FULL], "prompts").rows[0].extra == {"output": "4"}
    assert load([{"question": "2 + 2?", "answer": "4"}], "prompts").rows[0].extra == {"answer": "4"}
    row = {"conversations": LONG, "chosen": said("gpt", "6"), "rejected": said("gpt", "7"), "tools": TOOLS}
    assert load([row], "prompts").rows[0].extra == {
        "chosen": row["chosen"],
        "rejected": row["rejected"],
        "tools": TOOLS,
    }


# ---- questions ------------------------------------------------------------------------------------------------------

QUESTIONS = [
    ({"question": "2 + 2?", "answer": "4"}, "text", "2 + 2?", ("4",), {}),
    ({"question": "2 + 2?", "answer": "4", "system": ""}, "text", "2 + 2?", ("4",), {}),
    ({"question": "2 + 2?", "answer": "4"}, "prompts", "2 + 2?", (), {}),
    (
        {"question": "2 + 2?", "answer": "4", "system": "Add."},
        "text",
        [system("Add."), user("2 + 2?")],
        ([assistant("4")],),
        {},
    ),
    ({"question": "2 + 2?", "chosen": "4", "rejected": "5"}, "pairs", "2 + 2?", ("4", "5"), {}),
    (
        {"system": "Add.", "question": "2 + 2?", "chosen": "4", "rejected": "5"},  # as Intel/orca_dpo_pairs
        "pairs",
        [system("Add."), user("2 + 2?")],
        ([assistant("4")], [assistant("5")]),
        {},
    ),
]


@pytest.mark.parametrize(("row", "kind", "prompt", "completions", "numbers"), QUESTIONS)
def test_questions(row: Any, kind: str, prompt: Any, completions: Any, numbers: Any) -> None:
    assert only(row, kind) == (prompt, completions, numbers)


def test_our_own_forms_go_first_as_they_always_did() -> None:
    asked = {"prompt": "p", "question": "2 + 2?", "answer": "4", "conversations": TALK}
    assert load([asked], "prompts").form == "prompt"
    assert load([asked], "text").form == "sharegpt"
    assert load([{**ALPACA, "text": "Add. 2 + 2: 4"}], "text").form == "text"
    assert load([{"prompt": "p", "messages": [user("q"), assistant("a")]}], "prompts").form == "messages"


def test_whole_conversations_need_no_question() -> None:
    whole = {
        "chosen": [system("S"), user("Add it."), assistant("4")],
        "rejected": [system("S"), user("Add it."), assistant("5")],
    }
    for row in ({"question": "Add.", **whole}, {"instruction": "Add.", **whole}):
        assert only(row, "pairs") == ([system("S"), user("Add it.")], ([assistant("4")], [assistant("5")]), {})


def test_lists_of_objects_as_older_data_sets_hold_them() -> None:
    names = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = datasets.Features({"conversations": datasets.Sequence(names)})
    held = {"from": ["human", "gpt"], "value": ["2 + 2?", "4"]}
    table = datasets.Dataset.from_dict({"conversations": [held]}, features=features)
    assert table[0]["conversations"] == held
    (row,) = load(table, "text").rows
    assert (row.prompt, row.completions) == ([user("2 + 2?")], ([assistant("4")],))


# ---- scores and preferences -----------------------------------------------------------------------------------------


def rating(helpfulness: object, honesty: object) -> dict[str, Any]:
    return {"helpfulness": {"Rating": helpfulness, "Rationale": "."}, "honesty": {"Rating": honesty}}


def feedback(*completions: dict[str, Any]) -> dict[str, Any]:
    return {"source": "evol", "instruction": "2 + 2?", "models": ["a", "b"], "completions": list(completions)}


BINARIZED = {
    "prompt": "2 + 2?",
    "prompt_id": "1",
    "chosen": [user("2 + 2?"), assistant("4")],
    "rejected": [user("2 + 2?"), assistant("5")],
    "messages": [user("2 + 2?"), assistant("4")],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}
TURNS = "2 + 2?\n<extra_id_1>Assistant\n4\n<extra_id_1>User\n3 + 3?"
STRENGTH = {"prompt": TURNS, "response_1": "6", "response_2": "7", "split": "train"}
THIRD = {"context": ASKED, "response1": "6", "response2": "7", "domain": "general"}
RATED = {"prompt": "2 + 2?", "response": "4", "correctness": 4, "coherence": 4, "complexity": 0, "verbosity": 0}
SCORED = [
    (BINARIZED, "pairs", [user("2 + 2?")], ([assistant("4")], [assistant("5")]), {}),
    (
        feedback(
            {"response": "5", "overall_score": 2.0, "fine-grained_score": 5.0},
            {"response": "4", "overall_score": 8.5, "fine-grained_score": 4.0},
            {"response": "?", "overall_score": 1.0, "fine-grained_score": 4.5},
        ),
        "pairs",
        [user("2 + 2?")],
        ([assistant("4")], [assistant("?")]),
        {},
    ),
    (
        feedback(
            {"response": "5", "overall_score": None, "fine-grained_score": 1.5},
            {"response": "4", "overall_score": None, "fine-grained_score": 2.0},
        ),
        "pairs",
        [user("2 + 2?")],
        ([assistant("4")], [assistant("5")]),
        {},
    ),
    (  # mean ratings 3 and 4: what has no number does not count
        feedback(
            {"response": "5", "annotations": rating("4", "2")}, {"response": "4", "annotations": rating("N/A", "4")}
        ),
        "pairs",
        [user("2 + 2?")],
        ([assistant("4")], [assistant("5")]),
        {},
    ),
    (feedback({"response": "4", "overall_score": 9}), "text", [user("2 + 2?")], ([assistant("4")],), {}),
    (feedback(), "prompts", [user("2 + 2?")], (), {}),
    ({**STRENGTH, "preference_strength": -1}, "pairs", ASKED, ([assistant("6")], [assistant("7")]), {}),
    ({**STRENGTH, "preference_strength": 3}, "pairs", ASKED, ([assistant("7")], [assistant("6")]), {}),
    ({**STRENGTH, "preference_strength": None}, "prompts", ASKED, (), {}),
    ({**THIRD, "overall_preference": -3}, "pairs", ASKED, ([assistant("6")], [assistant("7")]), {}),
    ({**THIRD, "overall_preference": 1}, "pairs", ASKED, ([assistant("7")], [assistant("6")]), {}),
    ({**THIRD, "overall_preference": 1}, "text", ASKED, ([assistant("7")],), {}),
    ({**THIRD, "overall_preference": 1}, "prompts", ASKED, (), {}),
    ({**RATED, "helpfulness": 3}, "unpaired", [user("2 + 2?")], ([assistant("4")],), {"desirable": 1.0}),
    ({**RATED, "helpfulness": 1}, "unpaired", [user("2 + 2?")], ([assistant("4")],), {"desirable": 0.0}),
    ({**RATED, "helpfulness": 3}, "text", [user("2 + 2?")], ([assistant("4")],), {}),
    ({**RATED, "helpfulness": 0}, "prompts", [user("2 + 2?")], (), {}),
    ({"prompt": "q", "response_a": "x", "response_b": "y", "preference": "B"}, "pairs", "q", ("y", "x"), {}),
]


@pytest.mark.parametrize(("row", "kind", "prompt", "completions", "numbers"), SCORED)
def test_scores_and_preferences(row: Any, kind: str, prompt: Any, completions: Any, numbers: Any) -> None:
    assert only(row, kind) == (prompt, completions, numbers)


def test_rated_rows_of_one_prompt_become_a_pair() -> None:
    ratings = [("q", "a", 1), ("q", "b", 4), ("r", "c", 2), ("q", "d", 0), ("s", "e", 3), ("s", "f", 3)]
    rows = [{**RATED, "prompt": p, "response": r, "helpfulness": h} for p, r, h in ratings]
    dataset = load(rows, "pairs")
    assert [(row.row, row.prompt, row.completions) for row in dataset] == [
        (1, [user("q")], ([assistant("b")], [assistant("d")]))
    ]
    assert dataset.report.dropped == {"with a single answer": [3], "ties": [5]}
    assert dataset.form == "rated"


def test_what_says_nothing_is_dropped_and_counted() -> None:
    def dropped(rows: list[dict[str, Any]], kind: str) -> dict[str, list[int]]:
        return load(rows, kind).report.dropped  # type: ignore[arg-type]

    tie = {**STRENGTH, "preference_strength": 0}
    assert dropped([tie, {**tie, "preference_strength": 1}], "pairs") == {"ties": [1]}
    rated = [{**RATED, "helpfulness": h} for h in (2, 4, 0)]
    assert dropped(rated, "unpaired") == {"with a rating in the middle": [1]}
    assert dropped(rated, "text") == {"with a rating in the middle": [1], "with an undesirable answer": [3]}
    one, two = {"response": "4", "overall_score": 9}, {"response": "5", "overall_score": 1}
    assert dropped([feedback(), feedback(one, two), feedback(one)], "pairs") == {
        "without an answer": [1],
        "with a single answer": [3],
    }


# ---- what must not be lost, and faults ------------------------------------------------------------------------------


def test_a_system_prompt_that_a_form_does_not_read_is_reported() -> None:
    rows = [{"prompt": "q", "completion": "a", "system": text} for text in ("Be brief.", "", None)]
    assert load(rows, "text").lines()[1:] == [
        "1 rows with a column 'system', which the form 'completion' does not read (row 1)"
    ]
    assert load([{"conversations": TALK, "system": "Add."}], "text").report.noted == {}


FAULTS = [
    ({"conversations": [said("human", "q"), said("narrator", "a")]}, "text", "conversations", "role 'narrator'"),
    ({"conversations": [said("human", "q"), {"from": "gpt", "value": None}]}, "text", "conversations", "content None"),
    ({"conversations": None}, "text", "conversations", "found None"),
    ({"conversations": []}, "text", "conversations", r"found \[\]"),
    ({"conversations": TALK, "kto_tag": "maybe"}, "unpaired", "kto_tag", "'maybe'"),
    ({"conversations": LONG, "chosen": said("gpt", "6"), "rejected": None}, "pairs", "rejected", "None"),
    (
        {"conversations": TALK, "chosen": said("gpt", "6"), "rejected": said("gpt", "7")},
        "pairs",
        "conversations",
        "at the end",
    ),
    ({**ALPACA, "output": None}, "text", "output", "found None"),
    ({**ALPACA, "instruction": 5}, "text", "instruction", "found 5"),
    ({**ALPACA, "system": 5}, "text", "system", "found 5"),
    ({**ALPACA, "history": ["Hello"]}, "text", "history", r"\['Hello'\]; give a list of \[question, answer\]"),
    ({**ALPACA, "history": [["Hello", None]]}, "text", "history", "None"),
    ({**ALPACA, "label": None}, "unpaired", "label", "None"),
    ({"question": "2 + 2?", "answer": 4}, "text", "answer", "found 4"),
    (feedback({"response": "4"}), "pairs", "completions", "a completion without a score"),
    (feedback({"response": None, "overall_score": 3}), "pairs", "completions", "None"),
    ({"instruction": "q", "completions": ["4"]}, "pairs", "completions", "'4'"),
    ({**STRENGTH, "preference_strength": "high"}, "pairs", "preference_strength", "'high'"),
    ({**STRENGTH, "preference_strength": 1, "response_2": None}, "pairs", "response_2", "None"),
    ({**THIRD, "overall_preference": 1, "context": None}, "pairs", "context", "None"),
    ({**RATED, "helpfulness": "good"}, "unpaired", "helpfulness", "'good'"),
    ({**RATED, "helpfulness": None}, "pairs", "helpfulness", "None"),
    ({"prompt": "q", "response_a": "x", "response_b": "y", "preference": "c"}, "pairs", "preference", "'c'"),
]


@pytest.mark.parametrize(("row", "kind", "column", "text"), FAULTS)
def test_a_fault_names_the_column_of_the_row(row: Any, kind: str, column: str, text: str) -> None:
    with pytest.raises(FaultyRowsError, match=text) as error:
        load([row], kind)  # type: ignore[arg-type]
    assert {(fault.row, fault.column) for fault in error.value.faults} == {(1, column)}


def test_a_column_that_is_missing_in_one_row_is_called_missing() -> None:
    strength = {**STRENGTH, "preference_strength": 1}
    without = {column: cell for column, cell in strength.items() if column != "response_2"}
    with pytest.raises(FaultyRowsError, match=r"row 2, column 'output': the column is missing"):
        load([ALPACA, {"instruction": "q"}], "text")
    with pytest.raises(FaultyRowsError, match=r"row 2, column 'conversations': the column is missing"):
        load([{"conversations": TALK}, {}], "text")
    with pytest.raises(FaultyRowsError, match=r"row 2, column 'response_2': the column is missing"):
        load([strength, without], "pairs")


def test_rows_that_do_not_serve_a_kind_list_the_short_forms_first() -> None:
    with pytest.raises(DataError, match=r"read from: prompt \+ chosen \+ rejected; .*; or rows of sharegpt, alpaca, "):
        load([{"conversations": TALK}], "pairs")


def test_the_form_can_be_forced() -> None:
    row = {**ALPACA, "messages": [user("q"), assistant("a")]}
    found: list[Dataset] = [load([row], "text"), load([row], "text", {"form": "alpaca"})]
    assert [(one.form, one.rows[0].prompt) for one in found] == [
        ("messages", [user("q")]),
        ("alpaca", [user("Add.\n2 + 2")]),
    ]
