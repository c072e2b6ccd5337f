"""Examples in flat arrays, and sources that are read block by block: the same examples as all at once."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from alignkit.data import FaultyRowsError, load
from alignkit.data import blocks as blocks_module
from alignkit.data import sources as sources_module
from alignkit.data.blocks import encoded
from alignkit.data.rows import RowNumber
from alignkit.data.store import Examples
from alignkit.data.tokenise import tokenise, tokenised
from alignkit.data.views import Joined, Selected, raws
from alignkit.engine.reading import digest
from alignkit.errors import ConfigError, DataError
from alignkit.types import Completion, Example
from helpers import make_rows

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=5)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    completions = []
    for tokens in draw(st.lists(TOKENS, max_size=3)):
        flags = draw(st.none() | st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
        trained = None if flags is None else torch.tensor(flags, dtype=torch.bool)
        completions.append(Completion(torch.tensor(tokens, dtype=torch.int32), trained))
    row = draw(st.integers(1, 9) | st.builds(RowNumber, st.integers(1, 9), st.integers(1, 9), st.sampled_from("ab")))
    numbers = draw(st.dictionaries(st.sampled_from(["margin", "desirable"]), st.floats(-9, 9)))
    given_ = {} if completions else {"asked": draw(st.text()), "columns": {"answer": draw(st.integers())}}
    prompt = torch.tensor([1, *draw(TOKENS)], dtype=torch.int32)
    source, order = draw(st.sampled_from(["", "x", "y"])), draw(st.none() | st.floats(-9, 9))
    declared = draw(st.fixed_dictionaries({}, optional={"weight": st.floats(0, 9), "tags": st.lists(st.text())}))
    more = {"source": source, "order": order, "declared": declared}
    return Example(prompt, tuple(completions), numbers, row, **more, **given_)


def shown(example: Example) -> Any:
    """Everything of an example, to be compared."""
    completions = [(c.tokens.tolist(), None if c.trained is None else c.trained.tolist()) for c in example.completions]
    about = (example.asked, example.columns, example.source, example.order, example.declared)
    return example.prompt.tolist(), completions, dict(example.numbers), str(example.row), int(example.row), *about


@settings(max_examples=60, deadline=None)
@given(st.lists(examples(), max_size=6))
def test_what_goes_in_comes_out(given_examples: list[Example]) -> None:
    stored = Examples(given_examples)
    assert [shown(e) for e in stored] == [shown(e) for e in given_examples]
    assert len(stored) == len(given_examples)
    assert [shown(e) for e in stored[1:4]] == [shown(e) for e in given_examples[1:4]]
    for i in range(-len(given_examples), len(given_examples)):
        assert shown(stored[i]) == shown(given_examples[i])
    with pytest.raises(IndexError):
        stored[len(given_examples)]
    assert {e.prompt.dtype for e in stored} <= {torch.int32}


def by_tensors(examples: list[Example], weights: dict[str, float]) -> str:
    """The digest as it was defined first: over tensors, part by part."""
    whole = hashlib.sha256()
    for e in examples:
        for part in (e.prompt, *(t for c in e.completions for t in (c.tokens, c.trained_at))):
            whole.update(len(part).to_bytes(4, "little") + part.numpy().tobytes())
        whole.update(json.dumps(sorted(e.numbers.items())).encode())
        whole.update(json.dumps(e.columns, sort_keys=True, default=str).encode())
        if e.declared:
            whole.update(json.dumps(e.declared, sort_keys=True, default=str).encode())
        if e.order is not None or weights:
            whole.update(json.dumps([e.source, e.order]).encode())
    if weights:
        whole.update(json.dumps(weights).encode())
    return whole.hexdigest()


@settings(max_examples=80, deadline=None)
@given(st.lists(examples(), max_size=6), st.sampled_from([{}, {"x": 0.5, "y": 2.0}]), st.integers(0, 6))
def test_the_digest_of_arrays_is_that_of_tensors(
    given_examples: list[Example], weights: dict[str, float], n: int
) -> None:
    stored, expected = Examples(given_examples), by_tensors(given_examples, weights)
    assert digest(stored, [], weights) == expected
    assert digest(stored[:n], Selected(stored, range(n, len(stored))), weights) == expected
    assert digest(Joined(stored, given_examples), [], weights) == by_tensors(given_examples * 2, weights)
    assert digest(given_examples[:n], stored[n:], weights) == expected
    assert [raw.n_tokens for raw in raws(stored)] == [e.n_tokens for e in given_examples]


def test_some_of_them_are_chosen_and_changed_when_they_are_asked_for() -> None:
    stored = Examples(Example(torch.tensor([i], dtype=torch.int32), (), row=i) for i in range(5))
    chosen = Selected(stored, [4, 1, 3], lambda e: Example(e.prompt + 10, (), row=e.row))
    assert [int(e.prompt) for e in chosen] == [14, 11, 13]
    assert [e.row for e in chosen[1:]] == [1, 3]
    assert (len(chosen), int(chosen[-1].prompt)) == (3, 13)


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "text", "prompts"])
def test_blocks_give_the_examples_of_all_rows_at_once(kind: Any, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows("pairs", 23)
    rows[5]["rejected"] = rows[5]["chosen"]
    rows[9] = {"prompt": rows[9]["prompt"], "chosen": " ", "rejected": " red"}
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    dataset = load(rows, kind)
    whole, report = tokenise(dataset, tokenizer, 5, 4)
    monkeypatch.setattr(blocks_module, "BLOCK", 4)
    found = encoded(rows, kind, None, lambda part: tokenised(part, tokenizer, 5, 4))
    assert [shown(e) for e in found.examples] == [shown(e) for e in whole]
    assert found.lines() == [*dataset.found(), *(dataset.report + report).lines()]


def test_columns_and_forms_are_those_of_the_whole_source(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    monkeypatch.setattr(blocks_module, "BLOCK", 2)
    rows = [{"question": f"q{i}", "chosen": "red", "rejected": "blue", "margin": i} for i in range(6)]
    named = {"prompt": "question"}
    found = encoded(rows, "pairs", named, lambda part: tokenised(part, tokenizer))
    assert [e.numbers["margin"] for e in found.examples] == list(range(6))
    del rows[4]["margin"]  # in a later block than the first ones that have it
    with pytest.raises(FaultyRowsError, match="row 5, column 'margin': found None"):
        encoded(rows, "pairs", named, lambda part: tokenised(part, tokenizer))
    with pytest.raises(DataError, match="no column 'questions', which `columns` names for prompt"):
        encoded(rows, "pairs", {"prompt": "questions"}, lambda part: tokenised(part, tokenizer))


def once(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the rows that are read of files."""
    read, items_of = [0], sources_module.items_of

    def counted(path: Path) -> Any:
        for item in items_of(path):
            read[0] += 1
            yield item

    monkeypatch.setattr(sources_module, "items_of", counted)
    return read


def test_rows_are_read_once_unless_later_ones_change_how(
    tiny: str, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    monkeypatch.setattr(blocks_module, "BLOCK", 4)
    read, rows = once(Path(), monkeypatch), make_rows("pairs", 11)
    seen: list[int] = []
    found = encoded(write_rows(rows), "pairs", None, lambda part: tokenised(part, tokenizer), progress=seen.append)
    assert (len(found.examples), read[0], seen) == (11, 11, [4, 8, 11])
    # in the first block the rows are pairs, in most rows they are ranked
    ranked = [{"prompt": row["prompt"], "completions": [" a", " b"], "scores": [1, 2]} for row in rows]
    mixed = [*({**row, **one} for row, one in zip(rows[:4], ranked, strict=False)), *ranked[4:]]
    whole = load(mixed, "pairs")
    assert whole.form == "ranked"
    read[0] = 0
    found = encoded(write_rows(mixed), "pairs", None, lambda part: tokenised(part, tokenizer))
    assert [shown(e) for e in found.examples] == [shown(e) for e in tokenise(whole, tokenizer)[0]]
    assert read[0] > 11
    # rows that could not be read at all, and then others: the form is known from all of them
    with pytest.raises(FaultyRowsError, match="5 faults"):
        encoded([5] * 5 + rows, "pairs", None, lambda part: tokenised(part, tokenizer))
    # an error of the first block counts where the whole source is read like it
    chats = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}] * 4
    with pytest.raises(ConfigError, match="has no chat template"):
        encoded(chats + chats, "text", None, lambda part: tokenised(part, tokenizer))
    texts = [{"prompt": "q", "completion": " a"}] * 12
    with pytest.raises(FaultyRowsError, match="8 faults"):
        encoded(chats + texts, "text", None, lambda part: tokenised(part, tokenizer))


def test_the_faults_of_all_blocks_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK", 2)
    tokenizer = tokenizer_of("deepseek_r1_distill")
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    cut = [good[0], {"role": "assistant", "content": "<think>why</think>a"}]
    rows: list[Any] = [{"messages": good} for _ in range(7)]
    rows[0], rows[4], rows[6] = ({"messages": cut} for _ in range(3))
    with pytest.raises(FaultyRowsError, match="the list of rows, in the chat template: 3 faults") as error:
        encoded(rows, "text", None, lambda part: tokenised(part, tokenizer))
    assert [fault.row for fault in error.value.faults] == [1, 5, 7]
    rows[1] = {"messages": 5}
    rows[5] = "text"
    with pytest.raises(FaultyRowsError, match="the list of rows: 2 faults") as error:
        encoded(rows, "text", None, lambda part: tokenised(part, tokenizer))
    assert [fault.row for fault in error.value.faults] == [2, 6]


def test_memory_grows_by_the_tokens_alone(tiny: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    sizes, tokens = [], []
    for n in (1500, 6000):
        path = tmp_path / f"{n}.jsonl"
        lines = ({"prompt": f"red blue {i} " * 9, "chosen": " green" * 12, "rejected": " yes" * 12} for i in range(n))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        tracemalloc.start()
        found = encoded(path, "pairs", None, lambda part: tokenised(part, tokenizer))
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        tokens.append(sum(e.n_tokens for e in found.examples))
    assert (sizes[1] - sizes[0]) / (tokens[1] - tokens[0]) < 8  # bytes: 4 for the token, the rest for the row
