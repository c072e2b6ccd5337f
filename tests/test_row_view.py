"""`alignkit data show`: what one row becomes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import tokenizer_of

MESSAGES = [
    {"role": "user", "content": "Name a bird."},
    {"role": "assistant", "content": "A gull."},
    {"role": "user", "content": "And a fish?"},
    {"role": "assistant", "content": "A cod."},
]
ROWS = [
    {"prompt": "2 + 2?", "chosen": " 4", "rejected": " 5"},
    {"prompt": "2 + 2?", "chosen": " 4", "rejected": ""},
    {"prompt": "2 + 2?", "chosen": None, "rejected": " 5"},
]


@pytest.fixture
def show(command: Callable[..., Any], tmp_path: Path, write_rows: Callable[..., str]) -> Callable[..., Any]:
    """Run `alignkit data show` on rows with the tokenizer of a family."""
    tokenizer_of("qwen2_5").save_pretrained(tmp_path / "model")

    def run(rows: list[dict[str, Any]], *arguments: object) -> tuple[int, str, str]:
        return command("data", "show", write_rows(rows), "--model", tmp_path / "model", *arguments)

    return run


def test_a_row_is_shown_as_the_run_reads_it(show: Callable[..., Any], tmp_path: Path) -> None:
    code, out, _ = show([{"messages": MESSAGES}], "--json", tmp_path / "row.json", "--html", tmp_path / "row.html")
    assert code == 0
    assert "row 1: form 'messages', read as text" in out
    assert "<|im_start|>assistant\n[[A gull.<|im_end|>]]\n<|im_start|>user\nAnd a fish?" in out
    assert "[[A cod.<|im_end|>]]" in out
    view = json.loads((tmp_path / "row.json").read_text())
    pieces = view["sides"][0]["pieces"]
    assert [piece["use"] for piece in pieces] == ["prompt", "learned", "read", "learned"]
    assert pieces[1] == {"text": "A gull.<|im_end|>", "use": "learned", "n_tokens": len("A gull.") + 1}
    page = (tmp_path / "row.html").read_text()
    assert 'class="learned" title="8 tokens learned">A gull.&lt;|im_end|&gt;</span>' in page


def test_both_answers_of_a_pair_and_what_is_cut(show: Callable[..., Any]) -> None:
    code, out, _ = show(ROWS, "--set", "max_prompt_tokens=4", "--set", "max_completion_tokens=2")
    assert code == 0
    # tokens are bytes: the prompt keeps its last four, the answers their first two
    assert "chosen: 4 tokens given, 2 tokens learned, 3 tokens cut by the limits\n~~2 ~~+ 2?[[ 4]]~~</s>~~" in out
    assert "The run reports: prompts cut to their last 4 tokens." in out
    code, out, _ = show(ROWS, "--set", "max_completion_tokens=1")
    assert "The run drops this row: with answers that became identical." in out


def test_a_dropped_row_and_a_faulty_one_say_why(show: Callable[..., Any]) -> None:
    code, out, _ = show(ROWS, "--row", 2)
    assert code == 0
    assert "The run drops this row: empty answers." in out
    code, _, err = show(ROWS, "--row", 3)
    assert code == 2
    assert "row 3, column 'chosen': found None" in err
    code, _, err = show(ROWS, "--row", 9)
    assert code == 2
    assert "there is no row 9; the rows are 1 to 3" in err


def test_the_method_and_the_settings_decide_how_it_is_read(show: Callable[..., Any]) -> None:
    _, out, _ = show(ROWS, "--method", "grpo")
    assert "form 'pairs', read as prompts" in out
    assert "prompt: 6 tokens given\n2 + 2?" in out
    _, out, _ = show([{"messages": MESSAGES}], "--set", "train_on=last")
    assert "assistant\nA gull.<|im_end|>" in out
    code, _, err = show(ROWS, "--set", "train_onn=last")
    assert code == 2
    assert "--set train_onn: no such setting of a run. Did you mean 'train_on'?" in err
