"""sequence_sum: sums and means of ragged sequences, an empty one among them, and their gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit_kernels import sequence_sum


def borders(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])


def test_sums_and_means_of_three_sequences_are_right_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 10.0])
    cu = torch.tensor([0, 3, 3, 4])
    assert sequence_sum(values, cu).tolist() == [7.0, 0.0, 10.0]
    assert sequence_sum(values, cu, mean=True).tolist() == pytest.approx([7 / 3, 0.0, 10.0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=8), st.booleans(), st.integers(0, 2**31))
def test_every_segment_is_summed_alone_and_its_gradient_spread_over_it(
    lengths: list[int], mean: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), generator=g, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(len(lengths), generator=g, dtype=torch.float64)
    got = sequence_sum(values, borders(lengths), mean)
    parts = values.detach().split(lengths) if lengths else []
    want = [sum(p.tolist()) / (len(p) if mean and len(p) else 1) for p in parts]
    assert got.tolist() == pytest.approx(want, abs=1e-12)
    (got * upstream).sum().backward()
    each = [u / (n if mean else 1) for u, n in zip(upstream.tolist(), lengths, strict=True) for _ in range(n)]
    grad = values.grad if values.grad is not None else torch.zeros(0)
    assert grad.tolist() == pytest.approx(each, abs=1e-12)


@pytest.mark.parametrize("mean", [False, True])
def test_the_gradient_is_that_of_finite_differences(mean: bool) -> None:
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 1, 1, 6, 9])
    assert torch.autograd.gradcheck(lambda v: sequence_sum(v, cu, mean), (values,))


def test_expanded_and_strided_gradients_are_read_rightly() -> None:
    values = torch.arange(6.0, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 2, 3, 6])
    sequence_sum(values, cu).sum().backward()
    assert values.grad.tolist() == [1.0] * 6
    values.grad = None
    sequence_sum(values, cu)[0::2].sum().backward()
    assert values.grad.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]


def test_values_that_are_not_contiguous_give_the_same_sums() -> None:
    values = torch.tensor([[1.0, 9.0], [2.0, 9.0], [3.0, 9.0]])[:, 0]
    assert not values.is_contiguous()
    assert sequence_sum(values, torch.tensor([0, 1, 3])).tolist() == [1.0, 5.0]


def test_no_sequences_and_sequences_of_nothing_are_fine() -> None:
    nothing = torch.zeros(0, requires_grad=True)
    assert sequence_sum(nothing, torch.tensor([0])).shape == (0,)
    empty = sequence_sum(nothing, torch.tensor([0, 0, 0]), mean=True)
    assert empty.tolist() == [0.0, 0.0]
    empty.sum().backward()


def test_a_sequence_that_is_not_finite_leaves_its_neighbours_alone() -> None:
    values = torch.tensor([1.0, float("nan"), 2.0, float("-inf"), 3.0])
    got = sequence_sum(values, torch.tensor([0, 1, 2, 3, 4, 5])).tolist()
    assert [got[0], got[2], got[4]] == [1.0, 2.0, 3.0]
    assert got[1] != got[1]
    assert got[3] == float("-inf")


def test_long_float32_sequences_are_summed_without_losing_the_small_end() -> None:
    values = torch.full((100_000,), 0.1)
    exact = float(values.double().sum())
    got = float(sequence_sum(values, torch.tensor([0, 100_000])))
    eager = float(values.sum())
    assert abs(got - exact) <= max(2 * abs(eager - exact), 1e-6 * exact)


def test_the_same_input_gives_the_same_bits() -> None:
    values, cu = torch.randn(1000), torch.tensor([0, 10, 500, 1000])
    assert torch.equal(sequence_sum(values, cu), sequence_sum(values, cu))


@pytest.mark.parametrize("cu", [[0, 2], [0, 4], [1, 3], [0, 2, 1, 3], [0]])
def test_borders_that_do_not_cover_the_values_are_refused(cu: list[int]) -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens must ascend from 0 to 3, got \["):
        sequence_sum(torch.zeros(3), torch.tensor(cu))


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"wanted values \[C\] and cu_seqlens \[S \+ 1\], got \[2, 3\] and \[2\]"):
        sequence_sum(torch.zeros(2, 3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"got \[2\] and \[0\]"):
        sequence_sum(torch.zeros(2), torch.tensor([], dtype=torch.int64))
