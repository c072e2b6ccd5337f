"""Attention branch by branch: every architecture says what it says of one sequence at a time, and learns the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import CPU, FOREST, config, examples, fresh, one_at_a_time

from alignkit.models.branches import BRANCHES, BranchMask, attend_by_branches, branch_attention, branch_mask
from alignkit.models.layouts import choose_layout
from alignkit.models.loading import readied
from alignkit.models.packing import batch_of, dense_mask, pack
from alignkit.models.scoring import Scorer
from alignkit.types import Completion, Example, Layout

SDPA = [name for name in FOREST if fresh(name).config._attn_implementation == "sdpa"]


def branching(name: str) -> Any:
    model = fresh(name)
    attend_by_branches(model)
    assert model.config._attn_implementation == BRANCHES
    return model


@pytest.mark.parametrize("name", SDPA)
@pytest.mark.parametrize("row_tokens", [1, 64, 4096])
def test_a_model_says_what_it_says_of_one_sequence_at_a_time(name: str, row_tokens: int) -> None:
    batch = batch_of(examples(), Layout("forest", row_tokens))
    logps = Scorer(branching(name))(batch.rows, batch.targets).logps
    torch.testing.assert_close(logps, one_at_a_time(fresh(name), examples()), atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", SDPA)
def test_gradients_are_those_of_one_sequence_at_a_time(name: str) -> None:
    packed, alone = branching(name), fresh(name)
    batch = batch_of(examples(), Layout("forest", 4096))
    weights = torch.linspace(-1, 1, len(batch.targets))
    (Scorer(packed)(batch.rows, batch.targets).logps * weights).sum().backward()
    with torch.enable_grad():
        (one_at_a_time(alone, examples()) * weights).sum().backward()
    for (what, mine), theirs in zip(packed.named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, atol=2e-3, rtol=1e-3, msg=lambda m, w=what: f"{w}: {m}")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 20), min_size=1, max_size=5)), min_size=1, max_size=5
    ),
    st.integers(1, 80),
    st.sampled_from([None, 1, 7]),
)
def test_every_token_is_asked_once_and_sees_what_the_dense_mask_lets_it_see(
    trees: list[tuple[int, list[int]]], row_tokens: int, window: int | None
) -> None:
    made = [
        Example(torch.arange(p, dtype=torch.int32), tuple(Completion(torch.arange(n, dtype=torch.int32)) for n in ns))
        for p, ns in trees
    ]
    rows = pack(made, Layout("forest", row_tokens))
    mask = branch_mask(rows, window)
    dense = dense_mask(rows, window)[:, 0]
    width = rows.input_ids.shape[1]
    queries = torch.cat([b.queries.flatten() for b in mask.buckets])
    seen = [
        b.keys[i][b.mask[i, 0, q]] for b in mask.buckets for i in range(len(b.keys)) for q in range(b.mask.shape[2])
    ]
    for at in (rows.tree_ids.flatten() >= 0).nonzero().flatten().tolist():
        slot = int(mask.slots[at])
        row, column = divmod(at, width)
        assert int(queries[slot]) == at
        assert sorted(seen[slot].tolist()) == (row * width + dense[row, column].nonzero().flatten()).tolist()


def test_other_masks_go_to_sdpa_so_that_the_model_can_sample() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(branching("llama").eval()(ids).logits, fresh("llama").eval()(ids).logits)
    sampled = branching("llama").eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    assert torch.equal(
        sampled, fresh("llama").eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    )


def test_a_model_that_cannot_be_read_so_is_read_with_a_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def unscaled(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        wrong = {"scaling": 1.0} if isinstance(mask, BranchMask) else {}
        return branch_attention(module, query, key, value, mask, **{**options, **wrong})

    monkeypatch.setattr("alignkit.models.branches.branch_attention", unscaled)
    model = branching("llama")
    assert choose_layout(Scorer(model), examples(), config(), CPU).kind == "forest"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("attention", "used"), [("auto", BRANCHES), ("sdpa", "sdpa"), ("eager", "eager")])
def test_a_cpu_attends_by_branches_unless_another_attention_was_asked_for(attention: str, used: str) -> None:
    model = readied(fresh("llama"), config(attention=attention), CPU)
    assert model.config._attn_implementation == used


def test_the_saved_model_does_not_know_of_it(tmp_path: Path) -> None:
    branching("llama").save_pretrained(tmp_path)
    assert "branches" not in (tmp_path / "config.json").read_text()
