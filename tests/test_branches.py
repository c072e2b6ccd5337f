"""Attention branch by branch: every architecture says what it says of one sequence at a time, and learns the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import CPU, FOREST, config, examples, fresh, one_at_a_time

from alignkit.models import branches
from alignkit.models.branches import BRANCHES, BranchMask, attend_by_branches, branch_attention, branch_mask
from alignkit.models.layouts import choose_layout
from alignkit.models.loading import readied
from alignkit.models.packing import batch_of, dense_mask, pack
from alignkit.models.scoring import Scorer
from alignkit.types import Completion, Example, Layout
from exact import assert_rounding_only, exact_copy, gradients

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
    own, exact = (one_at_a_time(m, examples()) for m in (fresh(name), exact_copy(fresh(name))))
    assert_rounding_only(logps, own, exact)


@pytest.mark.parametrize("long", [branches.LONG, 1])
@pytest.mark.parametrize("name", SDPA)
def test_gradients_are_those_of_one_sequence_at_a_time(name: str, long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "LONG", long)
    monkeypatch.setattr(branches, "PIECE", 3)
    batch = batch_of(examples(), Layout("forest", 4096))
    weights = torch.linspace(-1, 1, len(batch.targets))
    got = gradients(branching(name), lambda m: (Scorer(m)(batch.rows, batch.targets).logps * weights).sum())
    alone = (fresh(name), exact_copy(fresh(name)))
    own, exact = (gradients(m, lambda m: (one_at_a_time(m, examples()) * weights).sum()) for m in alone)
    for what in own:
        assert_rounding_only(got[what], own[what], exact[what], what)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 20), min_size=1, max_size=5)), min_size=1, max_size=5
    ),
    st.integers(1, 80),
    st.sampled_from([None, 1, 7]),
    st.sampled_from([branches.LONG, 60, 0]),
)
def test_every_token_is_asked_once_and_sees_what_the_dense_mask_lets_it_see(
    trees: list[tuple[int, list[int]]], row_tokens: int, window: int | None, long: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branches, "LONG", long)
        patch.setattr(branches, "PIECE", 4)
        check_what_is_seen(trees, row_tokens, window)


def check_what_is_seen(trees: list[tuple[int, list[int]]], row_tokens: int, window: int | None) -> None:
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
        b.keys[i, : q + 1] if b.mask is None else b.keys[i][b.mask[i, 0, q]]
        for b in mask.buckets
        for i in range(len(b.keys))
        for q in range(b.queries.shape[1])
    ]
    for at in (rows.tree_ids.flatten() >= 0).nonzero().flatten().tolist():
        slot = int(mask.slots[at])
        row, column = divmod(at, width)
        assert int(queries[slot]) == at
        assert sorted(seen[slot].tolist()) == (row * width + dense[row, column].nonzero().flatten()).tolist()


@pytest.mark.parametrize(("window", "cells"), [(None, 0), (64, 512 * (512 + 64))])
def test_the_mask_of_a_long_branch_does_not_grow_with_the_square_of_its_length(window: int | None, cells: int) -> None:
    n = 4096
    long = Example(torch.zeros(2, dtype=torch.int32), (Completion(torch.zeros(n, dtype=torch.int32)),))
    mask = branch_mask(pack([long], Layout("forest", n + 2)), window)
    largest = max(b.mask.nelement() // len(b.mask) for b in mask.buckets if b.mask is not None)
    assert largest <= max(cells, 4)


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
