"""Which examples a step reads, and which are held out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.data.stream import Stream, chunks, hold_out, seeded
from alignkit.errors import DataError
from alignkit.types import Completion, Example


def made(prompts: list[int]) -> list[Example]:
    """Examples numbered by row, their prompts by what is given."""
    answer = (Completion(torch.tensor([1], dtype=torch.int32)),)
    return [Example(torch.tensor([p], dtype=torch.int32), answer, row=i) for i, p in enumerate(prompts)]


def rows(stream: Stream, steps: range) -> list[int]:
    return [e.row for step in steps for e in stream[step]]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.integers(0, 3))
def test_every_example_is_read_once_an_epoch_except_a_tail_that_is_too_small(
    n: int, batch_size: int, min_batch: int, seed: int, epoch: int
) -> None:
    tail = n % batch_size
    kept = n if tail == 0 or tail >= min_batch else n - tail
    if kept == 0:
        with pytest.raises(DataError, match=f"{n} usable rows are too few: a step needs at least {min_batch}"):
            Stream(made([0] * n), batch_size, seed, min_batch)
        return
    stream = Stream(made([0] * n), batch_size, seed, min_batch)
    per_epoch = stream.steps_per_epoch
    assert per_epoch == math.ceil(kept / batch_size)
    read = rows(stream, range(epoch * per_epoch, (epoch + 1) * per_epoch))
    assert len(read) == len(set(read)) == kept
    sizes = [len(stream[epoch * per_epoch + i]) for i in range(per_epoch)]
    assert sizes[:-1] == [batch_size] * (per_epoch - 1)
    assert sizes[-1] == (batch_size if kept % batch_size == 0 else tail)


def test_the_order_is_a_function_of_the_seed_and_the_step_alone() -> None:
    examples = made(list(range(20)))
    forwards, backwards = Stream(examples, 4, seed=7), Stream(examples, 4, seed=7)
    forward = [rows(forwards, range(i, i + 1)) for i in range(15)]
    torch.manual_seed(123)  # what else is drawn does not matter, nor where one starts to read
    assert [rows(backwards, range(i, i + 1)) for i in reversed(range(15))] == forward[::-1]


def test_another_seed_and_another_epoch_give_another_order() -> None:
    examples = made(list(range(20)))
    first = rows(Stream(examples, 4, seed=0), range(5))
    assert rows(Stream(examples, 4, seed=1), range(5)) != first
    assert rows(Stream(examples, 4, seed=0), range(5, 10)) != first
    assert first != sorted(first)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "want"), [(1.0, None, 4), (2.0, None, 8), (0.5, None, 2), (0.01, None, 1), (3.0, 5, 5)]
)
def test_epochs_make_steps_and_max_steps_wins(epochs: float, max_steps: int | None, want: int) -> None:
    assert Stream(made([0] * 14), 4, seed=0).total_steps(epochs, max_steps) == want


def test_a_fraction_of_an_epoch_that_rounds_badly_makes_no_step_too_many() -> None:
    stream = Stream(made([0] * 10), 1, seed=0)
    assert stream.total_steps(0.1 + 0.2, None) == 3  # 0.1 + 0.2 is a little more than 0.3


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 25), st.integers(1, 8), st.integers(1, 8))
def test_chunks_keep_every_example_in_order_and_leave_no_small_one_behind(n: int, size: int, least: int) -> None:
    examples = made([0] * n)
    parts = chunks(examples, size, least)
    assert [e.row for p in parts for e in p] == list(range(n))
    if len(parts) > 1:
        assert len(parts[-1]) >= min(least, size)
        assert all(len(p) == size for p in parts[:-1])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_no_prompt_is_ever_on_both_sides_of_a_hold_out(prompts: list[int], fraction: float, seed: int) -> None:
    examples, different = made(prompts), len(set(prompts))
    wanted = max(1, round(fraction * different))
    if wanted >= different:
        with pytest.raises(DataError, match=f"of {different} different prompts leaves no prompt to train on"):
            hold_out(examples, fraction, seed)
        return
    train, held = hold_out(examples, fraction, seed)
    assert not {int(e.prompt) for e in train} & {int(e.prompt) for e in held}
    assert len({int(e.prompt) for e in held}) == wanted
    assert sorted(e.row for e in [*train, *held]) == list(range(len(prompts)))
    for side in (train, held):
        assert [e.row for e in side] == sorted(e.row for e in side)
    again = hold_out(examples, fraction, seed)
    assert [e.row for e in again[1]] == [e.row for e in held]


def test_holding_out_nothing_trains_on_everything_and_seeds_choose_what_is_held() -> None:
    examples = made(list(range(40)))
    assert hold_out(examples, 0.0, 0) == (examples, [])
    chosen = {tuple(e.row for e in hold_out(examples, 0.2, seed)[1]) for seed in range(5)}
    assert len(chosen) == 5


def test_what_is_held_out_does_not_depend_on_the_order_of_the_rows() -> None:
    prompts = list(range(30))
    held = {int(e.prompt) for e in hold_out(made(prompts), 0.3, 5)[1]}
    assert {int(e.prompt) for e in hold_out(made(prompts[::-1]), 0.3, 5)[1]} == held


def test_each_use_of_the_seed_draws_its_own_numbers() -> None:
    drawn = {
        tuple(torch.randperm(50, generator=seeded(seed, purpose, number)).tolist())
        for seed in range(3)
        for purpose in range(4)
        for number in range(3)
    }
    assert len(drawn) == 3 * 4 * 3
    first, second = seeded(1, 2, 3), seeded(1, 2, 3)
    assert torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=second))


def test_a_huge_seed_is_as_good_as_a_small_one() -> None:
    assert len(Stream(made([0] * 4), 2, seed=2**62)[0]) == 2
