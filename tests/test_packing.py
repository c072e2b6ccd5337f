"""The packed forest: what stands where, who sees whom, and that cutting a batch loses nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.models import packing
from alignkit.models.packing import batch_of, dense_mask, pack, tree_mask
from alignkit.types import Batch, Completion, Example, Layout, Outputs, Term, metric


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def example(prompt: list[int], *completions: list[int], trained: dict[int, list[bool]] | None = None) -> Example:
    """An example by its token ids; `trained` maps a completion's number to its mask."""
    masks = {k: torch.tensor(v, dtype=torch.bool) for k, v in (trained or {}).items()}
    return Example(ints(*prompt), tuple(Completion(ints(*c), masks.get(i)) for i, c in enumerate(completions)))


A = example([1, 2, 3], [10, 11], [20])
B = example([4], [30, 31, 32])


@st.composite
def forests(draw: Any, least: int = 1) -> list[Example]:
    """Examples with prompts of 1 to 5 tokens, 0 to 3 completions of 0 to 4 tokens, some with a mask."""
    examples = []
    for row in range(draw(st.integers(least, 5))):
        prompt = draw(st.lists(st.integers(0, 50), min_size=1, max_size=5))
        completions = []
        for tokens in draw(st.lists(st.lists(st.integers(0, 50), max_size=4), min_size=1, max_size=3)):
            trained = draw(st.none() | st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
            mask = None if trained is None else torch.tensor(trained, dtype=torch.bool)
            completions.append(Completion(ints(*tokens), mask))
        examples.append(Example(ints(*prompt), tuple(completions), row=row))
    return examples


LAYOUTS = st.builds(Layout, st.sampled_from(["forest", "padded"]), st.integers(1, 40), st.sampled_from([1, 1, 4, 16]))


def trained_of(c: Completion) -> list[int]:
    mask = [True] * len(c.tokens) if c.trained is None else c.trained.tolist()
    return [i for i, kept in enumerate(mask) if kept]


# ---------------------------------------------------------------------------------------------------- by hand


def test_a_forest_row_is_written_as_drawn_by_hand() -> None:
    rows = pack([A], Layout("forest", 64))
    assert rows.input_ids.tolist() == [[1, 2, 3, 10, 11, 20]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert rows.tree_ids.tolist() == [[0] * 6]
    assert rows.branch_ids.tolist() == [[0, 0, 0, 1, 1, 2]]
    # 10 and 20 are predicted by the prompt's end, 11 by 10
    assert rows.predict_at.tolist() == [2, 3, 2]
    assert all(t.dtype == torch.int64 for t in (rows.input_ids, rows.position_ids, rows.predict_at))


def test_the_mask_of_a_tree_is_the_one_drawn_by_hand() -> None:
    #   sees:  1  2  3 10 11 20
    drawn = [
        [1, 0, 0, 0, 0, 0],  # 1
        [1, 1, 0, 0, 0, 0],  # 2
        [1, 1, 1, 0, 0, 0],  # 3
        [1, 1, 1, 1, 0, 0],  # 10
        [1, 1, 1, 1, 1, 0],  # 11
        [1, 1, 1, 0, 0, 1],  # 20
    ]
    mask = dense_mask(pack([A], Layout("forest", 64)))
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].int().tolist() == drawn


def test_a_window_counts_positions_of_the_sequence_and_not_places_in_the_row() -> None:
    #   sees:  1  2  3 10 11 20
    drawn = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 1, 0, 0, 1],  # 20 stands at position 3, right behind 3
    ]
    assert dense_mask(pack([A], Layout("forest", 64)), window=2)[0, 0].int().tolist() == drawn


def test_two_trees_share_a_row_and_do_not_see_each_other() -> None:
    rows = pack([A, B], Layout("forest", 64))
    assert rows.input_ids.tolist() == [[1, 2, 3, 10, 11, 20, 4, 30, 31, 32]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3]]
    assert rows.tree_ids.tolist() == [[0] * 6 + [1] * 4]
    assert rows.predict_at.tolist() == [2, 3, 2, 6, 7, 8]
    mask = dense_mask(rows)[0, 0]
    assert not mask[6:, :6].any()
    assert not mask[:6, 6:].any()


def test_padded_rows_are_written_as_drawn_by_hand() -> None:
    rows = pack([A, B], Layout("padded"))
    assert rows.input_ids.tolist() == [[1, 2, 3, 10, 11], [1, 2, 3, 20, 0], [4, 30, 31, 32, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0], [0, 1, 2, 3, 0]]
    assert (rows.tree_ids >= 0).int().tolist() == [[1] * 5, [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert rows.predict_at.tolist() == [2, 3, 5 + 2, 10, 11, 12]
    assert rows.kind == "padded"


def test_the_targets_of_a_batch_stand_in_the_order_of_its_examples() -> None:
    batch = batch_of([B, A], Layout("forest", 4))
    assert batch.targets.tolist() == [30, 31, 32, 10, 11, 20]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert batch.cu_completions.tolist() == [0, 1, 3]
    assert batch.lengths.tolist() == [3, 2, 1]
    assert batch.n_tokens == 10
    assert len(batch) == 2
    first, second = batch_of([A], Layout()).pairs(torch.tensor([5.0, 7.0]))
    assert (first.tolist(), second.tolist()) == ([5.0], [7.0])


def test_tokens_that_are_not_trained_are_read_but_never_predicted() -> None:
    e = example([1, 2], [10, 11, 12, 13], [20, 21], trained={0: [False, True, False, True], 1: [True, False]})
    batch = batch_of([e], Layout())
    assert batch.targets.tolist() == [11, 13, 20]
    assert batch.rows.predict_at.tolist() == [2, 4, 1]
    assert batch.rows.input_ids.tolist() == [[1, 2, 10, 11, 12, 13, 20, 21]]
    assert batch.lengths.tolist() == [2, 1]
    assert e.n_trained == (2, 1)
    assert batch_of([e], Layout("padded")).rows.predict_at.tolist() == [2, 4, 6 + 1]
    untrained = batch_of([example([1], [5, 6], trained={0: [False, False]}), B], Layout())
    assert untrained.targets.tolist() == [30, 31, 32]
    assert untrained.lengths.tolist() == [0, 3]


def test_rows_are_padded_to_the_multiple_that_block_masks_want() -> None:
    rows = pack([A, B], Layout("forest", 6, multiple_of=8))
    assert rows.input_ids.shape[1] % 8 == 0
    assert int((rows.tree_ids >= 0).sum()) == 10
    assert pack([A], Layout("padded", multiple_of=8)).input_ids.shape == (2, 8)


def test_packing_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot pack a batch of no examples"):
        pack([], Layout())


# ------------------------------------------------------------------------------------------------ any forest


@settings(max_examples=150, deadline=None)
@given(forests(), LAYOUTS, st.none() | st.integers(1, 6))
def test_what_predicts_a_token_sees_exactly_the_prefix_of_its_own_sequence(
    examples: list[Example], layout: Layout, window: int | None
) -> None:
    rows = pack(examples, layout)
    width = rows.input_ids.shape[1]
    mask, ids, positions = dense_mask(rows, window)[:, 0], rows.input_ids, rows.position_ids
    predict = iter(rows.predict_at.tolist())
    for e in examples:
        for c in e.completions:
            sequence = [*e.prompt.tolist(), *c.tokens.tolist()]
            for i in trained_of(c):
                row, query = divmod(next(predict), width)
                seen = mask[row, query].nonzero().squeeze(1).tolist()
                end = len(e.prompt) + i  # tokens before the one that is predicted
                start = 0 if window is None else max(0, end - window)
                by_position = sorted((int(positions[row, k]), int(ids[row, k])) for k in seen)
                assert by_position == list(enumerate(sequence))[start:end]
    assert next(predict, None) is None


@settings(max_examples=150, deadline=None)
@given(forests(), LAYOUTS)
def test_every_tree_lies_whole_in_one_row_and_no_row_is_wider_than_it_must(
    examples: list[Example], layout: Layout
) -> None:
    rows = pack(examples, layout)
    forest = layout.kind == "forest"
    if forest:
        trees = [[*e.prompt.tolist(), *(t for c in e.completions for t in c.tokens.tolist())] for e in examples]
    else:
        trees = [[*e.prompt.tolist(), *c.tokens.tolist()] for e in examples for c in e.completions]
    longest = max(len(t) for t in trees)
    width = rows.input_ids.shape[1]
    assert width % layout.multiple_of == 0
    allowed = max(layout.row_tokens, longest) if forest else longest
    assert width - allowed < layout.multiple_of
    # every token of every tree has a place of its own: as many places are taken as there are tokens
    assert int((rows.tree_ids >= 0).sum()) == sum(len(t) for t in trees)
    for number, tree in enumerate(trees):
        at_row, at = (rows.tree_ids == number).nonzero(as_tuple=True)
        assert len(at_row.unique()) == 1
        assert at.tolist() == list(range(int(at[0]), int(at[0]) + len(tree)))
        assert rows.input_ids[at_row, at].tolist() == tree
    empty = rows.tree_ids < 0
    assert not rows.input_ids[empty].any()
    assert not rows.position_ids[empty].any()


@settings(max_examples=100, deadline=None)
@given(forests(), LAYOUTS)
def test_the_order_of_the_targets_never_depends_on_the_layout(examples: list[Example], layout: Layout) -> None:
    batch = batch_of(examples, layout)
    want = [int(c.tokens[i]) for e in examples for c in e.completions for i in trained_of(c)]
    assert batch.targets.tolist() == want
    # and the token that each position predicts is the next one of its sequence, wherever the row put it
    expected = [
        (e.prompt if i == 0 else c.tokens)[i - 1].item() for e in examples for c in e.completions for i in trained_of(c)
    ]
    assert batch.rows.input_ids.flatten()[batch.rows.predict_at].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(forests(), LAYOUTS, st.none() | st.integers(1, 4))
def test_no_position_of_a_row_is_left_without_anything_to_see(
    examples: list[Example], layout: Layout, window: int | None
) -> None:
    # a row of a mask that is all False gives nan in softmax, and nan in a gradient spreads
    assert dense_mask(pack(examples, layout), window).any(-1).all()


@settings(max_examples=30, deadline=None)
@given(forests(), LAYOUTS, st.none() | st.integers(1, 4))
def test_the_mask_function_gives_single_cells_as_flex_attention_asks_for_them(
    examples: list[Example], layout: Layout, window: int | None
) -> None:
    rows = pack(examples, layout)
    mask, dense = tree_mask(rows, window), dense_mask(rows, window)
    n_rows, width = rows.input_ids.shape
    zero = torch.tensor(0)
    for b, q, k in {(0, 0, 0), (n_rows - 1, width - 1, 0), (0, width - 1, width // 2), (n_rows // 2, 0, width - 1)}:
        assert bool(mask(torch.tensor(b), zero, torch.tensor(q), torch.tensor(k))) == bool(dense[b, 0, q, k])


# ------------------------------------------------------------------------------------------- cutting a batch


def numbered(examples: list[Example], layout: Layout = Layout()) -> Batch:  # noqa: B008
    """A batch whose numbers name their own place."""
    batch = batch_of(examples, layout)
    n_s, n_c = sum(len(e.completions) for e in examples), sum(sum(e.n_trained) for e in examples)
    return batch.attach(
        per_example={"e": torch.arange(len(examples))},
        per_completion={"s": torch.arange(n_s) * 10},
        per_token={"c": torch.arange(n_c) * 100},
    )


def places(examples: list[Example]) -> list[tuple[list[int], list[int]]]:
    """(S places, C places) of each example, counted by hand."""
    out, s, c = [], 0, 0
    for e in examples:
        n_s, n_c = len(e.completions), sum(len(trained_of(k)) for k in e.completions)
        out.append(([10 * i for i in range(s, s + n_s)], [100 * i for i in range(c, c + n_c)]))
        s, c = s + n_s, c + n_c
    return out


def check_part(part: Batch, examples: list[Example]) -> list[int]:
    """The part's examples carry their own numbers; return their places in the whole."""
    at, where = part["e"].tolist(), places(examples)
    assert [e.row for e in part.examples] == [examples[i].row for i in at]
    assert part["s"].tolist() == [s for i in at for s in where[i][0]]
    assert part["c"].tolist() == [c for i in at for c in where[i][1]]
    assert len(part["c"]) == len(part.targets)
    assert len(part["s"]) == len(part.lengths)
    return at


@settings(max_examples=80, deadline=None)
@given(forests(), st.data())
def test_select_carries_the_numbers_of_the_examples_it_takes(examples: list[Example], data: Any) -> None:
    at = data.draw(st.lists(st.integers(0, len(examples) - 1), min_size=1, max_size=6))
    part = numbered(examples).select(at)
    assert check_part(part, examples) == at


@settings(max_examples=80, deadline=None)
@given(forests(), LAYOUTS, st.integers(1, 60))
def test_micro_batches_split_the_batch_and_keep_to_the_budget(
    examples: list[Example], layout: Layout, budget: int
) -> None:
    parts = numbered(examples, layout).micro_batches(budget)
    at = [check_part(p, examples) for p in parts]
    assert sorted(i for part in at for i in part) == list(range(len(examples)))
    for part in parts:
        costs = []
        for e in part.examples:
            lengths = [len(c.tokens) for c in e.completions]
            padded = sum(len(e.prompt) + n for n in lengths)
            costs.append(padded if layout.kind == "padded" else len(e.prompt) + sum(lengths))
        assert sum(costs) <= budget or len(part) == 1
        assert [part.cost(i) for i in range(len(part))] == costs
    assert all(p.layout == layout for p in parts)


def test_a_batch_that_fits_the_budget_is_one_micro_batch_and_the_longest_trees_come_first_else() -> None:
    batch = numbered([B, A, B])
    assert batch.micro_batches(14) == [batch]
    assert [p["e"].tolist() for p in batch.micro_batches(10)] == [[0, 1], [2]]
    assert [p["e"].tolist() for p in batch.micro_batches(1)] == [[1], [0], [2]]


@settings(max_examples=60, deadline=None)
@given(forests(), st.integers(1, 7), st.integers(0, 2**31))
def test_minibatches_split_the_batch_into_nearly_equal_parts(examples: list[Example], n: int, seed: int) -> None:
    parts = [p for p, _ in numbered(examples).minibatches(n, torch.Generator().manual_seed(seed))]
    at = [check_part(p, examples) for p in parts]
    assert sorted(i for part in at for i in part) == list(range(len(examples)))
    sizes = [len(p) for p in parts]
    assert len(parts) == min(n, len(examples))
    assert max(sizes) - min(sizes) <= 1


def test_minibatches_are_a_function_of_the_generator_and_differ_from_seed_to_seed() -> None:
    examples = [example([i + 1], [2]) for i in range(20)]

    def order(seed: int) -> list[int]:
        return [
            i
            for p, _ in numbered(examples).minibatches(4, torch.Generator().manual_seed(seed))
            for i in p["e"].tolist()
        ]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != list(range(20))
    one = numbered(examples)
    assert list(one.minibatches(1, torch.Generator())) == [(one, 1.0)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(2, 7), st.integers(2, 4), st.integers(0, 2**31))
def test_ranks_together_have_the_minibatches_that_one_has(total: int, n: int, world: int, seed: int) -> None:
    examples = [example([i + 1], [2]) for i in range(total)]

    def parts(rank: int, of: int) -> list[list[int]]:
        batch = numbered(examples).select(range(rank, total, of))
        made = batch.minibatches(n, torch.Generator().manual_seed(seed), rank, of, total) if len(batch) else []
        return [part["e"].tolist() if weight else [] for part, weight in made]

    alone = parts(0, 1)
    shared = [found for rank in range(world) if (found := parts(rank, world))]
    assert [sorted(i for found in shared for i in found[k]) for k in range(len(alone))] == [sorted(p) for p in alone]


# ------------------------------------------------------------------------------------------- numbers and terms


@pytest.mark.parametrize(("extent", "size"), [("per_example", 2), ("per_completion", 3), ("per_token", 6)])
def test_attach_takes_numbers_of_the_right_size_alone(extent: str, size: int) -> None:
    batch = batch_of([A, B], Layout())
    assert batch.attach(**{extent: {"x": torch.zeros(size)}})["x"].shape == (size,)
    for wrong in (size - 1, size + 1):
        with pytest.raises(ValueError, match=f"{extent} number 'x' must have {size} entries, got {wrong}"):
            batch.attach(**{extent: {"x": torch.zeros(wrong)}})


def test_attach_keeps_what_was_there_and_replaces_what_is_given_again() -> None:
    batch = batch_of([A, B], Layout()).attach(per_example={"a": torch.tensor([1, 2]), "b": torch.tensor([3, 4])})
    again = batch.attach(per_example={"b": torch.tensor([5, 6])}, per_token={"c": torch.zeros(6)})
    assert again["a"].tolist() == [1, 2]
    assert again["b"].tolist() == [5, 6]
    assert batch["b"].tolist() == [3, 4]
    assert "c" in again
    assert "c" not in batch


def test_a_number_that_is_not_there_is_named_with_those_that_are() -> None:
    batch = batch_of([A, B], Layout())
    with pytest.raises(KeyError, match="the batch has no 'margin'; it has no numbers"):
        batch["margin"]
    batch = batch.attach(per_example={"margin": torch.zeros(2)}, per_token={"old_logps": torch.zeros(6)})
    with pytest.raises(KeyError, match=r"the batch has no 'margins'; it has \['margin', 'old_logps'\]"):
        batch["margins"]
    with pytest.raises(KeyError, match=r"does the method declare uses=\{'reference'\}"):
        _ = batch.reference_logps


def test_a_term_is_counted_over_what_it_names() -> None:
    mask = torch.tensor([True, False, True])
    batch = batch_of([A, B], Layout()).attach(per_completion={"good": mask})
    counted = {name: batch.count(name) for name in ("examples", "completions", "tokens", "good")}
    assert counted == {"examples": 2, "completions": 3, "tokens": 6, "good": 2}
    with pytest.raises(KeyError, match="the batch has no 'bad'"):
        batch.count("bad")


def test_a_metric_is_a_term_that_is_cut_off_from_the_gradient() -> None:
    value = torch.ones(2, requires_grad=True) * 2
    term = metric(value, over="tokens")
    assert not term.value.requires_grad
    assert (term.over, term.coef) == ("tokens", 0.0)
    assert Term(value) == Term(value, "examples", 1.0)
    assert Outputs(value).entropy is None


def test_a_batch_moves_with_its_numbers_and_its_rows() -> None:
    batch = numbered([A, B]).to("meta")
    assert {batch[name].device.type for name in "esc"} == {"meta"}
    assert batch.device.type == batch.targets.device.type == batch.rows.input_ids.device.type == "meta"


def test_lengths_sum_to_the_trained_tokens() -> None:
    batch = batch_of([A, B], Layout())
    assert math.prod(batch.lengths.tolist()) == 2 * 1 * 3
    assert int(batch.lengths.sum()) == len(batch.targets) == batch.cu_seqlens[-1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(12, 40))
def test_a_tree_goes_to_the_fullest_row_with_room(lengths: list[int], capacity: int) -> None:
    used: list[int] = []
    row_of, start_of = [0] * len(lengths), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # by the definition, over all rows
        room = [row for row, n in enumerate(used) if n + lengths[i] <= capacity]
        row = max(room, key=lambda row: used[row], default=len(used))
        used += [0] * (row == len(used))
        row_of[i], start_of[i] = row, used[row]
        used[row] += lengths[i]
    assert packing._best_fit(lengths, capacity) == (row_of, start_of, max(used))
