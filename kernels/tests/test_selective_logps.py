"""selective_logps: values against float64, gradients against finite differences, errors against eager PyTorch."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import alignkit_kernels
from alignkit_kernels import selective_logps

# the package's attribute of that name is the function
MODULE = importlib.import_module("alignkit_kernels.selective_logps")
ROWS = importlib.import_module("alignkit_kernels.row_stats")
TRANSFORM = importlib.import_module("alignkit_kernels.transform")
accumulator, row_blocks = TRANSFORM.accumulator, ROWS.row_blocks

SHAPES = [(1, 7), (63, 101), (341, 33), (5, 1), (64, 512)]


def inputs(n: int, v: int, dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 3.0) -> tuple:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=g, dtype=torch.float64) * spread
    return logits.to(dtype), torch.randint(0, v, (n,), generator=g)


def reference(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies in float64 by plain PyTorch."""
    logp = (logits.double() / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def eager(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same in the logits' own precision."""
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def gradient(function: object, logits: Tensor, targets: Tensor, weights: Tensor, entropy: bool) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    logps, entropies = function(leaf, targets)  # type: ignore[operator]
    loss = (logps.double() * weights).sum()
    if entropy:
        loss = loss + (entropies.double() * weights.flip(0)).sum()
    loss.backward()
    return leaf.grad.double()


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def test_every_public_name_of_the_package_is_there() -> None:
    assert selective_logps is MODULE.selective_logps
    assert all(callable(getattr(alignkit_kernels, name)) for name in alignkit_kernels.__all__)


def test_two_logits_give_the_logistic_function_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]], dtype=torch.float64)
    logps, entropy = selective_logps(logits, torch.tensor([0, 1]), entropy=True)
    assert logps.tolist() == pytest.approx([math.log(0.75), math.log(0.5)], abs=1e-15)
    by_hand = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy.tolist() == pytest.approx([by_hand, math.log(2)], abs=1e-15)


def test_the_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[2 * math.log(3.0), 0.0]], dtype=torch.float64)
    assert float(selective_logps(logits, torch.tensor([0]), temperature=2.0)) == pytest.approx(
        math.log(0.75), abs=1e-15
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize(("n", "v"), SHAPES)
def test_values_equal_a_float64_log_softmax(n: int, v: int, temperature: float) -> None:
    logits, targets = inputs(n, v)
    want, want_entropy = reference(logits, targets, temperature)
    got, entropy = selective_logps(logits, targets, temperature, entropy=True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, want_entropy, rtol=0, atol=1e-12)
    torch.testing.assert_close(selective_logps(logits, targets, temperature), want, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 12), st.integers(1, 40), st.sampled_from([0.3, 1.0, 4.0]), st.integers(1, 200), st.integers(0, 2**31)
)
def test_neither_shape_nor_block_size_changes_values_or_gradients(
    n: int, v: int, temperature: float, block: int, seed: int
) -> None:
    logits, targets = inputs(n, v, seed=seed)
    weights = torch.randn(n, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ROWS, "BLOCK_ELEMENTS", block)
        ours = gradient(lambda z, t: selective_logps(z, t, temperature, True), logits, targets, weights, True)
        got, entropy = selective_logps(logits, targets, temperature, True)
    theirs = gradient(lambda z, t: reference(z, t, temperature), logits, targets, weights, True)
    want, want_entropy = reference(logits, targets, temperature)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    torch.testing.assert_close(entropy, want_entropy, rtol=0, atol=1e-11)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("block", [1, 12, 1 << 20])
def test_the_gradient_is_that_of_finite_differences(entropy: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ROWS, "BLOCK_ELEMENTS", block)
    logits, targets = inputs(5, 6)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: selective_logps(z, targets, 0.7, entropy), (logits,))


def test_the_entropy_alone_has_a_gradient_too() -> None:
    logits, targets = inputs(4, 5)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: selective_logps(z, targets, 1.3, True)[1], (logits,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "v"), [(1, 101), (63, 777), (341, 129)])
def test_the_error_in_low_precision_is_at_most_twice_that_of_eager_pytorch(n: int, v: int, dtype: torch.dtype) -> None:
    logits, targets = inputs(n, v, dtype)
    weights = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = reference(logits, targets, 0.8)
    got = selective_logps(logits, targets, 0.8, entropy=True)
    theirs = eager(logits, targets, 0.8)
    tiny = torch.finfo(torch.float32).eps
    for ours, other, exact in zip(got, theirs, want, strict=True):
        assert ours.dtype == torch.float32
        assert rms(ours - exact) <= 2 * rms(other - exact) + tiny * rms(exact)
    exact_gradient = gradient(lambda z, t: reference(z, t, 0.8), logits.double(), targets, weights, True)
    ours_gradient = gradient(lambda z, t: selective_logps(z, t, 0.8, True), logits, targets, weights, True)
    eager_gradient = gradient(lambda z, t: eager(z, t, 0.8), logits, targets, weights, True)
    assert rms(ours_gradient - exact_gradient) <= 2 * rms(eager_gradient - exact_gradient) + tiny * rms(exact_gradient)


def test_large_logits_neither_overflow_nor_lose_the_answer() -> None:
    logits = torch.tensor([[6e4, 0.0, -6e4], [3e4, 3e4, -3e4]], dtype=torch.float16, requires_grad=True)
    logps, entropy = selective_logps(logits, torch.tensor([0, 1]), entropy=True)
    assert logps.tolist() == pytest.approx([0.0, -math.log(2)], abs=1e-6)
    assert entropy.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-2)
    (logps.sum() + entropy.sum()).backward()
    assert logits.grad.isfinite().all()


def test_a_token_that_is_ruled_out_by_minus_infinity_spoils_nothing() -> None:
    logits = torch.tensor([[math.log(3.0), -math.inf, 0.0]], dtype=torch.float64, requires_grad=True)
    logps, entropy = selective_logps(logits, torch.tensor([0]), entropy=True)
    assert logps.item() == pytest.approx(math.log(0.75), abs=1e-12)
    assert entropy.item() == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-12)
    (logps + entropy).sum().backward()
    # d logp_0 = onehot - p; dH/dz = -p (log p + H)
    h = entropy.item()
    by_hand = [0.25 - 0.75 * (math.log(0.75) + h), 0.0, -0.25 - 0.25 * (math.log(0.25) + h)]
    assert logits.grad[0].tolist() == pytest.approx(by_hand, abs=1e-12)


def test_no_tokens_give_no_values_and_an_empty_gradient() -> None:
    logits = torch.zeros(0, 9, requires_grad=True)
    logps, entropy = selective_logps(logits, torch.zeros(0, dtype=torch.int64), entropy=True)
    assert logps.shape == entropy.shape == (0,)
    (logps.sum() + entropy.sum()).backward()
    assert logits.grad.shape == (0, 9)


@pytest.mark.parametrize("overwrite", [False, True])
def test_non_contiguous_logits_give_the_same_values_and_gradient(overwrite: bool) -> None:
    logits, targets = inputs(6, 10)
    want = gradient(lambda z, t: reference(z, t), logits, targets, torch.ones(6), False)
    for strided in (logits.t().contiguous().t(), torch.cat([logits, logits], 1)[:, :10]):
        assert not strided.is_contiguous()
        leaf = strided.detach().requires_grad_()
        logps = selective_logps(leaf.view_as(leaf), targets, overwrite=overwrite)
        torch.testing.assert_close(logps, reference(logits, targets)[0], rtol=0, atol=1e-12)
        logps.sum().backward()
        torch.testing.assert_close(leaf.grad, want, rtol=0, atol=1e-12)


def test_an_expanded_upstream_gradient_and_strided_targets_are_read_rightly() -> None:
    logits, targets = inputs(4, 5)
    strided = torch.stack([targets, targets], 1)[:, 0]
    assert not strided.is_contiguous()
    ours = gradient(lambda z, t: (selective_logps(z, t), None), logits, strided, torch.ones(1).expand(4), False)
    theirs = gradient(lambda z, t: reference(z, t), logits, targets, torch.ones(4), False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entropy", [False, True])
def test_the_logits_are_left_as_they_were_unless_it_is_told_otherwise(dtype: torch.dtype, entropy: bool) -> None:
    logits, targets = inputs(5, 8, dtype)
    before = logits.clone()
    logits.requires_grad_()
    out = selective_logps(logits, targets, 0.5, entropy)
    (sum(o.sum() for o in out) if entropy else out.sum()).backward()
    assert torch.equal(logits.detach(), before)
    assert logits.grad.data_ptr() != logits.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_reuses_the_logits_memory_when_it_may(dtype: torch.dtype) -> None:
    logits, targets = inputs(5, 8, dtype)
    leaf = logits.clone().requires_grad_()
    logits = leaf * 1.0
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    selective_logps(logits, targets, overwrite=True).sum().backward()
    assert seen == [logits.data_ptr()]
    want = gradient(lambda z, t: reference(z, t), leaf.detach().double(), targets, torch.ones(5), False)
    torch.testing.assert_close(leaf.grad.double(), want, rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_a_second_backward_over_overwritten_logits_is_an_error_and_never_a_wrong_gradient() -> None:
    leaf = torch.randn(3, 4, requires_grad=True)
    loss = selective_logps(leaf * 1.0, torch.tensor([0, 1, 2]), overwrite=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_the_same_input_gives_the_same_bits() -> None:
    logits, targets = inputs(341, 257, torch.float32)
    weights = torch.randn(341, dtype=torch.float64)
    a, b = (selective_logps(logits, targets, 0.9, True) for _ in range(2))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    first, second = (
        gradient(lambda z, t: selective_logps(z, t, 0.9, True), logits, targets, weights, True) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected logits \[N, V\] and targets \[N\], got \[3, 4\] and \[2\]"):
        selective_logps(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \[2, 3, 4\] and \[2\]"):
        selective_logps(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_above_zero_is_refused_with_its_value(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be above 0, got {temperature}"):
        selective_logps(torch.zeros(1, 2), torch.tensor([0]), temperature)


def test_sums_over_the_vocabulary_are_made_in_float32_or_better() -> None:
    assert accumulator(torch.bfloat16) == accumulator(torch.float16) == accumulator(torch.float32) == torch.float32
    assert accumulator(torch.float64) == torch.float64


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 2000))
def test_row_blocks_cover_every_row_once_in_order(n_rows: int, n_columns: int, elements: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ROWS, "BLOCK_ELEMENTS", elements)
        blocks = row_blocks(n_rows, n_columns)
    assert [i for b in blocks for i in range(b.start, b.stop)] == list(range(n_rows))
    assert all((b.stop - b.start) * n_columns <= max(elements, n_columns) for b in blocks)


@pytest.mark.parametrize("entropy", [False, True])
def test_cap_and_scale_come_before_the_temperature_in_values_and_gradient(entropy: bool) -> None:
    logits, targets = inputs(5, 6)

    def capped(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return reference(2.0 * torch.tanh(0.5 * z / 2.0), t, 0.7)

    ours = lambda z, t: selective_logps(z, t, 0.7, True, softcap=2.0, scale=0.5)  # noqa: E731
    torch.testing.assert_close(ours(logits, targets), capped(logits, targets), rtol=0, atol=1e-12)
    weights = torch.randn(5, dtype=torch.float64)
    got = gradient(ours, logits, targets, weights, entropy)
    torch.testing.assert_close(got, gradient(capped, logits, targets, weights, entropy), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="softcap must be above 0 or None, got 0"):
        selective_logps(logits, targets, softcap=0.0)


# ---------------------------------------------------------------------------------------------------- the Triton kernel


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    ("n", "v", "dtype", "softcap"),
    [
        (1, 101, torch.float32, None),
        (33, 333, torch.float32, 4.0),
        (21, 333, torch.bfloat16, None),
        (21, 333, torch.float16, 4.0),
        (130, 48, torch.float16, None),
    ],
)
def test_the_kernel_errs_at_most_twice_as_much_as_eager_pytorch(
    n: int, v: int, dtype: torch.dtype, softcap: float | None, entropy: bool, device: torch.device,
    triton_path: None, poisoned: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ROWS, "TRITON_BLOCK", 128)

    def transformed(z: Tensor) -> Tensor:
        return 1.3 * z if softcap is None else softcap * torch.tanh(1.3 * z / softcap)

    logits, targets = (x.to(device) for x in inputs(n, v, dtype))
    wide = torch.cat([logits, logits], 1)[:, :v]  # rows with a stride of their own
    weights = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    exact = lambda z, t: reference(transformed(z.double()), t, 0.8)  # noqa: E731
    theirs = lambda z, t: eager(transformed(z), t, 0.8)  # noqa: E731
    tiny = torch.finfo(torch.float32).eps
    for given_ in (logits, wide, logits.t().contiguous().t()):
        ours = lambda z, t: selective_logps(z, t, 0.8, True, softcap=softcap, scale=1.3)  # noqa: E731
        for mine, other, truth in zip(
            ours(given_, targets), theirs(logits, targets), exact(logits, targets), strict=True
        ):
            assert rms(mine - truth) <= 2 * rms(other - truth) + 2 * tiny * rms(truth)
        want = gradient(exact, logits.double(), targets, weights, entropy)
        mine, other = (gradient(f, x, targets, weights, entropy) for f, x in ((ours, given_), (theirs, logits)))
        assert rms(mine - want) <= 2 * rms(other - want) + 2 * tiny * rms(want)


def test_the_kernel_stands_ruled_out_and_huge_logits_and_an_empty_batch(
    device: torch.device, triton_path: None, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ROWS, "TRITON_BLOCK", 16)
    logits = torch.full((3, 40), -math.inf, device=device)
    logits[0, 20], logits[0, 30] = math.log(3.0), 0.0  # nothing but -inf in the first block
    logits[1, 5] = 6e4
    logits[1, 6] = -6e4
    logits[2, :] = 3e4
    targets = torch.tensor([20, 5, 7], device=device)
    leaf = logits.clone().requires_grad_()
    logps, entropy = selective_logps(leaf, targets, entropy=True)
    assert logps.tolist() == pytest.approx([math.log(0.75), 0.0, -math.log(40)], abs=1e-6)
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy.tolist() == pytest.approx([h, 0.0, math.log(40)], abs=1e-5)
    (logps + entropy).sum().backward()
    by_hand = {20: 0.25 - 0.75 * (math.log(0.75) + h), 30: -0.25 - 0.25 * (math.log(0.25) + h)}
    assert leaf.grad[0].tolist() == pytest.approx([by_hand.get(i, 0.0) for i in range(40)], abs=1e-6)
    assert leaf.grad.isfinite().all()
    empty = torch.zeros(0, 9, device=device, requires_grad=True)
    selective_logps(empty, targets[:0]).sum().backward()
    assert empty.grad.shape == (0, 9)


def test_the_kernel_writes_over_the_logits_only_when_it_may_and_autograd_notices(
    device: torch.device, triton_path: None, poisoned: None
) -> None:
    logits, targets = (x.to(device) for x in inputs(5, 8, torch.float32))
    want = gradient(lambda z, t: reference(z, t), logits.double(), targets, torch.ones(5, device=device), False)
    for overwrite in (False, True):
        leaf = logits.clone().requires_grad_()
        middle = leaf * 1.0
        loss = selective_logps(middle, targets, overwrite=overwrite).sum()
        loss.backward(retain_graph=True)
        torch.testing.assert_close(leaf.grad.double(), want, rtol=0, atol=1e-6)
        assert torch.equal(middle.detach(), logits) == (not overwrite)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_a_target_that_the_kernel_does_not_find_shows_as_nan(device: torch.device, triton_path: None) -> None:
    stats = ROWS.RowStats(
        torch.zeros(2, 5, device=device), torch.tensor([4, 1], device=device), 5, TRANSFORM.Transform(), False
    )
    stats.fold(torch.zeros(2, 4, device=device))
    assert stats.logps().isnan().tolist() == [True, False]
