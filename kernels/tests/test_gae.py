"""gae: the textbook recurrence, token by token in float64, against the doubling scan and the kernel."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignkit_kernels import gae

LENGTHS = st.lists(st.integers(0, 40), max_size=5)
DISCOUNTS = st.sampled_from([0.0, 0.5, 0.95, 1.0])
relaxed = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])


def by_recurrence(
    rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, lam: float, round_to: Callable[[float], float]
) -> tuple[list[float], list[float]]:
    """The definition, in Python's float64; round_to is applied to every result on the way."""
    advantages, returns = [0.0] * len(values), [0.0] * len(values)
    end = len(values)
    for length in reversed(lengths):
        following, behind = 0.0, 0.0
        for t in reversed(range(end - length, end)):
            r, v = float(rewards[t]), float(values[t])
            delta = round_to(round_to(r + round_to(gamma * following)) - v)
            behind = round_to(delta + round_to(gamma * lam * behind))
            advantages[t], returns[t], following = behind, round_to(behind + v), v
        end -= length
    return advantages, returns


def exactly(x: float) -> float:
    return x


def draw(n: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g, dtype=dtype), 3 * torch.randn(n, generator=g, dtype=dtype)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let short sequences span several of the kernel's blocks."""
    monkeypatch.setattr(importlib.import_module("alignkit_kernels.gae"), "BLOCK", 16)


@pytest.fixture(params=["eager", "triton"])
def each_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("ALIGNKIT_KERNELS", request.param)


def test_three_tokens_and_their_neighbour_are_right_by_hand(each_path: None, device: torch.device) -> None:
    # from the end: delta 1.5; 2 + 0.5 * 1.5 - 1 = 1.75, A = 1.75 + 0.25 * 1.5; delta 1, A = 1 + 0.25 * 2.125
    rewards = torch.tensor([1.0, 2.0, 3.0, 8.0], device=device)
    values = torch.tensor([0.5, 1.0, 1.5, 6.0], device=device)
    advantages, returns = gae(rewards, values, torch.tensor([0, 3, 3, 4], device=device), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [1.53125, 2.125, 1.5, 2.0]
    assert returns.tolist() == [2.03125, 3.125, 3.0, 8.0]


def test_without_discount_the_returns_are_the_rewards_to_come(each_path: None, device: torch.device) -> None:
    rewards, values = (t.to(device) for t in draw(7, 0))
    cu = torch.tensor([0, 3, 7], device=device)
    _, returns = gae(rewards, values, cu, gamma=1.0, lam=1.0)
    want = [float(rewards[t : 3 if t < 3 else 7].double().sum()) for t in range(7)]
    assert returns.tolist() == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_lam_0_is_the_one_step_difference(each_path: None, device: torch.device) -> None:
    rewards, values = (t.to(device) for t in draw(4, 1))
    advantages, _ = gae(rewards, values, torch.tensor([0, 4], device=device), gamma=0.9, lam=0.0)
    following = torch.cat([values[1:].double(), torch.zeros(1, device=device)])
    assert advantages.tolist() == pytest.approx((rewards + 0.9 * following - values).tolist(), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, DISCOUNTS, DISCOUNTS, st.integers(0, 2**31))
def test_eager_follows_the_recurrence(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    rewards, values = draw(sum(lengths), seed, torch.float64)
    advantages, returns = gae(rewards, values, borders(lengths), gamma, lam)
    want = by_recurrence(rewards, values, lengths, gamma, lam, exactly)
    assert advantages.dtype == torch.float64
    assert advantages.tolist() == pytest.approx(want[0], rel=1e-11, abs=1e-11)
    assert returns.tolist() == pytest.approx(want[1], rel=1e-11, abs=1e-11)


@relaxed
@given(LENGTHS, DISCOUNTS, DISCOUNTS, st.integers(0, 2**31))
def test_the_kernel_follows_the_recurrence_and_rounds_once(
    triton_path: None,
    poisoned: None,
    small_blocks: None,
    device: torch.device,
    lengths: list[int],
    gamma: float,
    lam: float,
    seed: int,
) -> None:
    rewards, values = draw(sum(lengths), seed)
    got = gae(rewards.to(device), values.to(device), borders(lengths).to(device), gamma, lam)
    want = by_recurrence(rewards, values, lengths, gamma, lam, exactly)
    for one, by_hand in zip(got, want, strict=True):
        assert one.dtype == torch.float32
        assert one.tolist() == pytest.approx(by_hand, rel=6e-8, abs=1e-12)


def test_sequences_longer_than_a_block_are_as_exact_as_float32_can_be(
    triton_path: None, poisoned: None, device: torch.device
) -> None:
    lengths = [1, 63, 0, 1500, 341]
    rewards, values = draw(sum(lengths), 5)
    got = gae(rewards.to(device), values.to(device), borders(lengths).to(device), 0.9999, 0.999)
    want = by_recurrence(rewards, values, lengths, 0.9999, 0.999, exactly)
    low = by_recurrence(rewards, values, lengths, 0.9999, 0.999, lambda x: float(torch.tensor(x)))
    for one, by_hand, plain in zip(got, want, low, strict=True):
        exact = torch.tensor(by_hand, dtype=torch.float64)
        error = (one.cpu().double() - exact).abs().max()
        assert error <= 2 * (torch.tensor(plain).double() - exact).abs().max()
        assert one.tolist() == pytest.approx(by_hand, rel=6e-8, abs=1e-12)


def test_no_tokens_and_no_completions_are_fine(each_path: None, device: torch.device) -> None:
    nothing = torch.zeros(0, device=device)
    for cu in ([0], [0, 0, 0]):
        advantages, returns = gae(nothing, nothing, torch.tensor(cu, device=device))
        assert advantages.shape == returns.shape == (0,)


def test_strided_and_low_precision_inputs_are_read_rightly(each_path: None, device: torch.device) -> None:
    pairs = torch.tensor([[1.0, 0.5], [2.0, 1.0], [3.0, 1.5]], device=device, dtype=torch.bfloat16)
    strided_cu = torch.tensor([[0, 9], [3, 9]], device=device)[:, 0]
    advantages, _ = gae(pairs[:, 0], pairs[:, 1], strided_cu, gamma=0.5, lam=0.5)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == [1.53125, 2.125, 1.5]


def test_a_completion_that_is_not_finite_leaves_its_neighbours_alone(each_path: None, device: torch.device) -> None:
    rewards, values = (t.to(device) for t in draw(9, 2))
    rewards[4], values[5] = float("inf"), float("nan")
    cu = torch.tensor([0, 3, 6, 9], device=device)
    advantages, returns = gae(rewards, values, cu)
    whole = torch.isfinite(advantages) & torch.isfinite(returns)
    assert whole.tolist() == [True] * 3 + [False] * 3 + [True] * 3


def test_nothing_has_a_gradient(each_path: None, device: torch.device) -> None:
    rewards, values = (t.to(device).requires_grad_() for t in draw(5, 3))
    advantages, returns = gae(rewards, values, torch.tensor([0, 5], device=device))
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_the_same_input_gives_the_same_bits(each_path: None, device: torch.device) -> None:
    rewards, values = (t.to(device) for t in draw(300, 4))
    cu = torch.tensor([0, 250, 300], device=device)
    assert all(map(torch.equal, gae(rewards, values, cu), gae(rewards, values, cu)))


def test_shapes_borders_and_discounts_that_do_not_fit_are_named() -> None:
    three, cu = torch.zeros(3), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"rewards and values of one shape \[C\], got \[2\] and \[3\]"):
        gae(torch.zeros(2), three, cu)
    with pytest.raises(ValueError, match=r"got \[1, 3\] and \[1, 3\]"):
        gae(three[None], three[None], cu)
    with pytest.raises(ValueError, match=r"cu_seqlens must ascend from 0 to 3, got \[0, 2\]"):
        gae(three, three, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"gamma and lam must lie in \[0, 1\], got 1.5 and 0.95"):
        gae(three, three, cu, gamma=1.5)
    with pytest.raises(ValueError, match=r"got 1.0 and nan"):
        gae(three, three, cu, lam=float("nan"))
