"""sequence_sum: sums and means of ragged sequences, an empty one among them, and their gradients."""

from __future__ import annotations

import importlib
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignkit_kernels import sequence_sum

# the package's attribute of that name is the function
spread = importlib.import_module("alignkit_kernels.sequence_sum").spread


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
    with pytest.raises(ValueError, match=r"expected values \[C\] and cu_seqlens \[S \+ 1\], got \[2, 3\] and \[2\]"):
        sequence_sum(torch.zeros(2, 3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"got \[2\] and \[0\]"):
        sequence_sum(torch.zeros(2), torch.tensor([], dtype=torch.int64))


# ---- the Triton kernels, against float64 sums by hand

kernel = pytest.mark.usefixtures("triton_path", "poisoned")
AWKWARD = [1, 63, 0, 341, 2049, 0]  # the fifth takes three blocks
LOW = [torch.float32, torch.bfloat16, torch.float16]


def by_hand(values: torch.Tensor, cu: torch.Tensor, mean: bool) -> torch.Tensor:
    each = [math.fsum(values[a:b].tolist()) / (max(1, b - a) if mean else 1) for a, b in pairwise(cu.tolist())]
    return torch.tensor(each, dtype=torch.float64)


def spread_by_hand(values: list[float], lengths: list[int], mean: bool) -> torch.Tensor:
    each = [v / (n if mean else 1) for v, n in zip(values, lengths, strict=True) for _ in range(n)]
    return torch.tensor(each, dtype=torch.float64)


def assert_rounded(got: torch.Tensor, want: torch.Tensor) -> None:
    """One rounding of the exact result to the type, with a unit in the last place for a tie."""
    assert got.isfinite().all()
    torch.testing.assert_close(got.double().cpu(), want, rtol=torch.finfo(got.dtype).eps, atol=1e-30)


@kernel
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", LOW)
def test_the_kernel_sums_segments_of_awkward_lengths_and_spreads_their_gradients(
    dtype: torch.dtype, mean: bool, device: torch.device
) -> None:
    g, cu = torch.Generator().manual_seed(0), borders(AWKWARD)
    values = torch.randn(sum(AWKWARD), generator=g).to(device, dtype).requires_grad_()
    upstream = torch.randn(len(AWKWARD), generator=g).to(device, dtype)
    got = sequence_sum(values, cu.to(device), mean)
    assert got.dtype == dtype
    assert "SequenceSum" in got.grad_fn.name()
    assert_rounded(got.detach(), by_hand(values.detach(), cu, mean))
    got.backward(upstream)
    assert values.grad.dtype == dtype
    assert_rounded(values.grad, spread_by_hand(upstream.tolist(), AWKWARD, mean))


@kernel
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.booleans(), st.integers(0, 2**31))
def test_the_kernel_sums_every_segment_alone(device: torch.device, lengths: list[int], mean: bool, seed: int) -> None:
    g, cu = torch.Generator().manual_seed(seed), borders(lengths)
    values = torch.randn(sum(lengths), generator=g).to(device).requires_grad_()
    upstream = torch.randn(len(lengths), generator=g)
    got = sequence_sum(values, cu.to(device), mean)
    # of numbers that cancel: against the largest, not against what is left
    torch.testing.assert_close(got.detach().double().cpu(), by_hand(values.detach(), cu, mean), rtol=1.2e-7, atol=1e-12)
    got.backward(upstream.to(device))
    assert_rounded(values.grad, spread_by_hand(upstream.tolist(), lengths, mean))


@kernel
@pytest.mark.parametrize("mean", [False, True])
def test_the_kernel_reads_strided_values_borders_and_gradients(mean: bool, device: torch.device) -> None:
    lengths = [2, 1, 3, 2]
    rows = torch.randn(8, 2).to(device).requires_grad_()
    cu = torch.stack([borders(lengths), borders(lengths) + 9], dim=1)[:, 0].to(device)
    got = sequence_sum(rows[:, 0], cu, mean)
    assert_rounded(got.detach(), by_hand(rows[:, 0].detach(), cu, mean))
    got[0::2].sum().backward()  # a gradient of no stride
    want = spread_by_hand([1.0, 0.0, 1.0, 0.0], lengths, mean)
    assert_rounded(rows.grad[:, 0], want)
    assert rows.grad[:, 1].tolist() == [0.0] * 8
    rows.grad = None
    steps = torch.tensor([[5.0, 1.0], [6.0, 2.0], [7.0, 3.0], [8.0, 4.0]]).to(device)
    sequence_sum(rows[:, 0], cu, mean).backward(steps[:, 0])
    assert_rounded(rows.grad[:, 0], spread_by_hand([5.0, 6.0, 7.0, 8.0], lengths, mean))


@kernel
def test_the_kernel_gives_nothing_for_nothing(device: torch.device) -> None:
    nothing = torch.zeros(0, device=device, requires_grad=True)
    assert sequence_sum(nothing, torch.tensor([0], device=device)).shape == (0,)
    empty = sequence_sum(nothing, torch.tensor([0, 0, 0], device=device), mean=True)
    assert empty.tolist() == [0.0, 0.0]
    empty.sum().backward()
    assert nothing.grad.shape == (0,)


@kernel
def test_the_kernel_lets_what_is_not_finite_stay_in_its_segment(device: torch.device) -> None:
    values = torch.tensor([1.0, float("nan"), 2.0, float("-inf"), 3.0], device=device)
    got = sequence_sum(values, torch.tensor([0, 1, 2, 3, 4, 5], device=device)).tolist()
    assert [got[0], got[2], got[3], got[4]] == [1.0, 2.0, float("-inf"), 3.0]
    assert math.isnan(got[1])


@kernel
def test_the_kernel_loses_nothing_of_a_long_segment_in_float32(device: torch.device) -> None:
    values = torch.full((5000,), 0.1, device=device)
    values[0], values[4999] = 3e7, -3e7  # float32 would not feel a single 0.1 beside it
    exact = math.fsum(values.tolist())
    assert float(sequence_sum(values, torch.tensor([0, 5000], device=device))) == pytest.approx(exact, rel=6e-8)


@kernel
def test_the_kernel_takes_float64_to_plain_pytorch(device: torch.device) -> None:
    values = torch.ones(3, dtype=torch.float64, device=device, requires_grad=True)
    assert "SequenceSum" not in sequence_sum(values, torch.tensor([0, 3], device=device)).grad_fn.name()


@kernel
def test_the_kernels_give_the_same_bits_twice(device: torch.device) -> None:
    values, cu = torch.randn(1000).to(device), torch.tensor([0, 10, 500, 1000], device=device)
    assert torch.equal(sequence_sum(values, cu), sequence_sum(values, cu))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("path", ["eager", "triton"])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("per", [1, 2])
def test_a_value_is_spread_over_its_segments_and_multiplied_by_their_factors(
    per: int, mean: bool, path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("ALIGNKIT_KERNELS", path)
    lengths, factors = [3, 1, 0, 1030], [0.1, -2.0, 3.0, 0.7]
    values = [1.5, -2.5, 3.5, 4.5][: 4 // per]
    got = spread(
        torch.tensor(values, device=device), borders(lengths).to(device), sum(lengths), mean,
        torch.tensor(factors, dtype=torch.float64, device=device),
    )  # fmt: skip
    assert got.dtype == torch.float32
    assert_rounded(got, spread_by_hand([values[i // per] * factors[i] for i in range(4)], lengths, mean))
    if per == 1:
        plain = spread(torch.tensor(values, device=device), borders(lengths).to(device), sum(lengths), mean)
        assert_rounded(plain, spread_by_hand(values, lengths, mean))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mean", [False, True])
def test_nothing_waits_for_the_gpu(mean: bool) -> None:
    values, cu = torch.randn(9, device="cuda", requires_grad=True), torch.tensor([0, 4, 9], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sequence_sum(values, cu, mean).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
