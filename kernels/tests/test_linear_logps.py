"""linear_logps: the logits of a head, with everything an architecture may do to them, against float64 by hand."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignkit_kernels import linear_logps

# the package's attribute of that name is the function
MODULE = importlib.import_module("alignkit_kernels.linear_logps")
SELECTIVE = importlib.import_module("alignkit_kernels.selective_logps")

# bias, softcap, scale, temperature
HEADS = [
    (False, None, 1.0, 1.0),
    (True, None, 1.0, 1.0),
    (False, 3.0, 1.0, 1.0),
    (False, None, 0.25, 1.0),
    (False, None, 1.0, 0.6),
    (True, 2.0, 1.5, 0.8),
]


def inputs(n: int, h: int, v: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64)
    weight = torch.randn(v, h, generator=g, dtype=torch.float64) / math.sqrt(h) * 2
    bias = torch.randn(v, generator=g, dtype=torch.float64)
    targets = torch.randint(0, v, (n,), generator=g)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None, scale: float, t: float
) -> tuple[Tensor, Tensor]:
    """softcap(scale * (h W' + b)) / temperature by plain PyTorch, in the precision of what is given."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = (z / t).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def test_a_head_of_one_hidden_unit_is_right_by_hand() -> None:
    hidden = torch.tensor([[2.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    bias = torch.tensor([0.0, 1.0], dtype=torch.float64)
    target = torch.tensor([0])
    # logits 2 and 1; scaled by 3: 6 and 3; capped at 4: 4 tanh(1.5) and 4 tanh(0.75); divided by 0.5
    difference = (4 * math.tanh(1.5) - 4 * math.tanh(0.75)) / 0.5
    got = linear_logps(hidden, weight, target, bias, softcap=4.0, scale=3.0, temperature=0.5)
    assert got.item() == pytest.approx(-math.log1p(math.exp(-difference)), abs=1e-14)


@pytest.mark.parametrize(("bias", "softcap", "scale", "temperature"), HEADS)
@pytest.mark.parametrize(("n", "h", "v"), [(1, 96, 101), (63, 96, 257), (341, 17, 33), (0, 8, 11)])
@pytest.mark.parametrize("grad", [False, True])
def test_values_equal_float64_logits_put_through_log_softmax(
    n: int, h: int, v: int, grad: bool, bias: bool, softcap: float | None, scale: float, temperature: float
) -> None:
    hidden, weight, b, targets = inputs(n, h, v)
    want, want_entropy = reference(hidden, weight, b if bias else None, targets, softcap, scale, temperature)
    hidden.requires_grad_(grad)
    options = {"bias": b if bias else None, "softcap": softcap, "scale": scale, "temperature": temperature}
    got, entropy = linear_logps(hidden, weight, targets, entropy=True, **options)
    assert got.requires_grad == entropy.requires_grad == grad
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-11)
    torch.testing.assert_close(entropy.detach(), want_entropy, rtol=0, atol=1e-11)
    torch.testing.assert_close(linear_logps(hidden, weight, targets, **options).detach(), want, rtol=0, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.integers(1, 12), st.integers(1, 60), st.integers(0, 2**31))
def test_without_a_gradient_the_size_of_a_block_changes_nothing(n: int, v: int, elements: int, seed: int) -> None:
    hidden, weight, bias, targets = inputs(n, 5, v, seed=seed)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(MODULE, "NO_GRAD_ELEMENTS", elements)
        got, entropy = linear_logps(hidden, weight, targets, bias, entropy=True)
    want, want_entropy = reference(hidden, weight, bias, targets, None, 1.0, 1.0)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    torch.testing.assert_close(entropy, want_entropy, rtol=0, atol=1e-11)


def test_without_a_gradient_no_more_logits_exist_at_once_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets = inputs(10, 4, 6)
    sizes = []
    honest = MODULE._logits
    monkeypatch.setattr(MODULE, "_logits", lambda h, *rest: sizes.append(len(h)) or honest(h, *rest))
    monkeypatch.setattr(MODULE, "NO_GRAD_ELEMENTS", 4 * 6)
    linear_logps(hidden, weight, targets)
    assert sizes == [4, 4, 2]
    with torch.no_grad():
        linear_logps(hidden.requires_grad_(), weight, targets)
    assert sizes == [4, 4, 2] * 2


@pytest.mark.parametrize(("bias", "softcap", "scale", "temperature"), HEADS)
@pytest.mark.parametrize("entropy", [False, True])
def test_the_gradient_is_that_of_finite_differences(
    entropy: bool, bias: bool, softcap: float | None, scale: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SELECTIVE, "BLOCK_ELEMENTS", 12)
    hidden, weight, b, targets = inputs(4, 3, 5)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), *([b.requires_grad_()] if bias else [])]

    def function(h: Tensor, w: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return linear_logps(h, w, targets, *(rest or (None,)), softcap, scale, temperature, entropy)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_right_one(frozen: str) -> None:
    hidden, weight, _, targets = inputs(7, 6, 11)
    learned = weight if frozen == "hidden" else hidden
    learned.requires_grad_()
    linear_logps(hidden, weight, targets).sum().backward()
    got = learned.grad.clone()
    learned.grad = None
    reference(hidden, weight, None, targets, None, 1.0, 1.0)[0].sum().backward()
    torch.testing.assert_close(got, learned.grad, rtol=0, atol=1e-12)
    assert (hidden if frozen == "hidden" else weight).grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("n", "h", "v"), [(1, 96, 301), (63, 96, 301), (341, 64, 129)])
def test_the_error_in_low_precision_is_at_most_twice_that_of_eager_pytorch(
    n: int, h: int, v: int, softcap: float | None, dtype: torch.dtype
) -> None:
    names = ("logps", "entropy", "hidden", "weight", "bias")
    errors: dict[str, list[Tensor]] = {f"{name} {whose}": [] for name in names for whose in ("ours", "eager", "exact")}
    for seed in range(24 if n == 1 else 2):  # one token alone may be right by luck
        hidden, weight, bias, targets = inputs(n, h, v, dtype, seed)
        upstream = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

        def both_ways(function: object, as_type: torch.dtype) -> list[Tensor]:
            leaves = [x.to(as_type, copy=True).requires_grad_() for x in (hidden, weight, bias)]  # noqa: B023
            logps, entropy = function(*leaves)  # type: ignore[operator]
            (logps.double() * upstream + entropy.double() * upstream.flip(0)).sum().backward()  # noqa: B023
            return [logps.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)]

        plain = lambda h, w, b: reference(h, w, b, targets, softcap, 1.2, 0.9)  # noqa: B023, E731
        exact, eager = both_ways(plain, torch.float64), both_ways(plain, dtype)
        ours = both_ways(lambda h, w, b: linear_logps(h, w, targets, b, softcap, 1.2, 0.9, True), dtype)  # noqa: B023
        assert [x.dtype for x in ours] == [torch.float32] * 2 + [dtype] * 3
        for name, mine, theirs, truth in zip(names, ours, eager, exact, strict=True):
            errors[f"{name} ours"].append((mine - truth).flatten())
            errors[f"{name} eager"].append((theirs - truth).flatten())
            errors[f"{name} exact"].append(truth.flatten())
    tiny = torch.finfo(torch.float32).eps
    for name in names:
        mine, theirs, truth = (rms(torch.cat(errors[f"{name} {whose}"])) for whose in ("ours", "eager", "exact"))
        assert mine <= 2 * theirs + tiny * truth, name


def test_the_gradient_through_a_cap_is_right_where_bf16_can_no_longer_tell_tanh_from_one() -> None:
    # logits 12 and 6, a cap of 4: tanh(3) = 0.9951, and the next number below 1 in bf16 is 0.9961
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[12.0], [6.0]], dtype=torch.bfloat16, requires_grad=True)
    linear_logps(hidden, weight, torch.tensor([0]), softcap=4.0).sum().backward()
    p = 1 / (1 + math.exp(4 * math.tanh(1.5) - 4 * math.tanh(3.0)))
    slopes = [1 - math.tanh(3.0) ** 2, 1 - math.tanh(1.5) ** 2]
    by_hand = [(1 - p) * slopes[0], -(1 - p) * slopes[1]]
    assert weight.grad.flatten().tolist() == pytest.approx(by_hand, rel=0.03)
    assert hidden.grad.item() == pytest.approx(12 * by_hand[0] + 6 * by_hand[1], rel=0.03)


def test_non_contiguous_inputs_give_the_same_values_and_gradients() -> None:
    hidden, weight, bias, targets = inputs(6, 8, 9)
    plain = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    want = reference(*plain, targets, None, 1.0, 1.0)[0]
    want.sum().backward()
    strided = [
        hidden.t().contiguous().t().requires_grad_(),
        torch.cat([weight, weight], 1)[:, :8].requires_grad_(),
        torch.stack([bias, bias], 1)[:, 0].requires_grad_(),
    ]
    assert not any(x.is_contiguous() for x in strided)
    got = linear_logps(strided[0], strided[1], torch.stack([targets, targets], 1)[:, 0], strided[2])
    got.sum().backward()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for mine, theirs in zip(strided, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)


def test_no_tokens_give_no_values_and_a_gradient_of_zero() -> None:
    hidden, weight, bias, targets = inputs(0, 4, 7, torch.float32)
    weight.requires_grad_()
    logps, entropy = linear_logps(hidden, weight, targets, bias, entropy=True)
    assert logps.shape == entropy.shape == (0,)
    (logps.sum() + entropy.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(7, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 0.5)])
def test_neither_pass_touches_the_inputs(dtype: torch.dtype, softcap: float | None, scale: float) -> None:
    given_ = inputs(5, 4, 9, dtype)
    before = [x.clone() for x in given_]
    hidden, weight, bias, targets = (x.requires_grad_() if x.is_floating_point() else x for x in given_)
    logps, entropy = linear_logps(hidden, weight, targets, bias, softcap, scale, entropy=True)
    (logps.sum() + entropy.sum()).backward()
    for now, then in zip((hidden, weight, bias, targets), before, strict=True):
        assert torch.equal(now.detach(), then)


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 1.0), (None, 0.5), (3.0, 0.5)])
def test_the_gradient_of_the_logits_lies_in_the_memory_of_the_logits(
    softcap: float | None, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, _, targets = inputs(5, 4, 9, torch.float32)
    honest = MODULE._logits
    seen: dict[str, int] = {}

    def watched(*arguments: object) -> Tensor:
        logits = honest(*arguments)
        seen["logits"] = logits.data_ptr()
        logits.register_hook(lambda g: seen.update(gradient=g.data_ptr()))
        return logits

    monkeypatch.setattr(MODULE, "_logits", watched)
    linear_logps(hidden.requires_grad_(), weight, targets, softcap=softcap, scale=scale).sum().backward()
    assert seen["gradient"] == seen["logits"]


def test_under_autocast_the_losses_stay_float32() -> None:
    hidden, weight, _, targets = inputs(6, 8, 9, torch.float32)
    want = reference(hidden.double(), weight.double(), None, targets, None, 1.0, 1.0)[0]
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logps(hidden, weight, targets)
    got.sum().backward()
    assert got.dtype == hidden.grad.dtype == torch.float32
    torch.testing.assert_close(got.detach().double(), want, rtol=0, atol=0.05)


def test_the_same_input_gives_the_same_bits() -> None:
    hidden, weight, bias, targets = inputs(63, 96, 301, torch.float32)
    results = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        logps, entropy = linear_logps(leaves[0], leaves[1], targets, leaves[2], 4.0, 0.9, entropy=True)
        (logps.sum() + entropy.sum()).backward()
        results.append([logps, entropy, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_shapes_that_do_not_fit_are_named() -> None:
    targets = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"wanted hidden \[N, H\] and weight \[V, H\], got \[3, 4\] and \[7, 5\]"):
        linear_logps(torch.zeros(3, 4), torch.zeros(7, 5), targets)
    with pytest.raises(ValueError, match=r"got \[1, 3, 4\] and \[7, 4\]"):
        linear_logps(torch.zeros(1, 3, 4), torch.zeros(7, 4), targets)
    with pytest.raises(ValueError, match=r"wanted one target a row of hidden, got \[3\] for \[2, 4\]"):
        linear_logps(torch.zeros(2, 4), torch.zeros(7, 4), targets)
    with pytest.raises(ValueError, match=r"temperature must be above 0, got 0"):
        linear_logps(torch.zeros(3, 4), torch.zeros(7, 4), targets, temperature=0)
