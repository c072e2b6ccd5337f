"""preference_loss: every kind against its formula written with the math module, rewards, gradients, hard cases."""

from __future__ import annotations

import importlib
import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignkit_kernels import PreferenceLoss, preference_loss

# the package's attribute of that name is the function
log1mexp = importlib.import_module("alignkit_kernels.preference_loss").log1mexp

PAIRED = ["sigmoid", "robust", "hinge", "cpo", "ipo", "simpo", "orpo"]
REFERENCE_FREE = ["cpo", "simpo", "orpo"]
LENGTHS = [3, 1, 2, 4]
POLICY = [-0.5, -1.0, -0.25, -2.0, -0.125, -0.75, -1.5, -0.5, -0.25, -3.0]
REFERENCE = [-0.75, -0.5, -0.5, -1.0, -0.5, -0.5, -1.0, -1.0, -0.125, -2.0]
BETA, EPS, GAMMA = 0.4, 0.1, 0.3


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])


def tensors(kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    policy = torch.tensor(POLICY, dtype=torch.float64)
    return policy, None if kind in REFERENCE_FREE else torch.tensor(REFERENCE, dtype=torch.float64)


def by_segment(values: list[float]) -> list[list[float]]:
    parts, at = [], 0
    for n in LENGTHS:
        parts.append(values[at : at + n])
        at += n
    return parts


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


def by_hand(kind: str, c: list[float], r: list[float], c_ref: list[float], r_ref: list[float]) -> float:
    """The formula of one pair, from per-token log-probabilities."""
    h_c, h_r = sum(c) - sum(c_ref), sum(r) - sum(r_ref)
    x = BETA * (h_c - h_r)
    if kind == "sigmoid":
        return -(1 - EPS) * math.log(s(x)) - EPS * math.log(s(-x))
    if kind == "robust":
        return (-(1 - EPS) * math.log(s(x)) + EPS * math.log(s(-x))) / (1 - 2 * EPS)
    if kind == "hinge":
        return max(0.0, 1 - x)
    if kind == "cpo":
        x = BETA * (sum(c) - sum(r))
        return -(1 - EPS) * math.log(s(x)) - EPS * math.log(s(-x))
    if kind == "ipo":
        return (h_c / len(c) - h_r / len(r) - 1 / (2 * BETA)) ** 2
    if kind == "simpo":
        return -math.log(s(BETA * (sum(c) / len(c) - sum(r) / len(r)) - GAMMA))
    return -math.log(s(odds(sum(c) / len(c)) - odds(sum(r) / len(r))))


@pytest.mark.parametrize("kind", PAIRED)
def test_the_loss_of_every_pair_is_its_formula(kind: str) -> None:
    policy, reference = tensors(kind)
    out = preference_loss(policy, reference, cu(LENGTHS), kind, beta=BETA, label_smoothing=EPS, gamma=GAMMA)
    p, r = by_segment(POLICY), by_segment(REFERENCE)
    want = [by_hand(kind, p[i], p[i + 1], r[i], r[i + 1]) for i in (0, 2)]
    assert out.losses.tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("kind", PAIRED)
def test_rewards_are_beta_times_the_log_ratio_and_logps_are_plain_sums(kind: str) -> None:
    policy, reference = tensors(kind)
    out = preference_loss(policy.requires_grad_(), reference, cu(LENGTHS), kind, beta=BETA)
    averaged = kind in ("ipo", "simpo", "orpo")
    subtracted = [0.0] * len(POLICY) if reference is None else REFERENCE
    want = [
        BETA * (sum(p) - sum(r)) / (len(p) if averaged else 1)
        for p, r in zip(by_segment(POLICY), by_segment(subtracted), strict=True)
    ]
    assert out.rewards.tolist() == pytest.approx(want, rel=1e-12)
    assert out.logps.tolist() == pytest.approx([sum(p) for p in by_segment(POLICY)], rel=1e-12)
    assert out.losses.requires_grad
    assert not out.rewards.requires_grad
    assert not out.logps.requires_grad
    assert isinstance(out, PreferenceLoss)
    assert out._fields == ("losses", "rewards", "logps")


def test_kto_pushes_desirable_answers_above_the_baseline_and_the_others_below() -> None:
    policy, reference = tensors("kto")
    baseline = torch.tensor([0.25, 0.5, 0.0, 1.0], dtype=torch.float64)
    out = preference_loss(
        policy, reference, cu(LENGTHS), "kto", beta=BETA, baseline=baseline, weights=(4 / 3, 0.7),
        desirable=torch.tensor([True, False, False, True]),
    )  # fmt: skip
    h = [sum(p) - sum(r) for p, r in zip(by_segment(POLICY), by_segment(REFERENCE), strict=True)]
    want = [
        4 / 3 * (1 - s(BETA * (h[0] - 0.25))),
        0.7 * (1 - s(BETA * (0.5 - h[1]))),
        0.7 * (1 - s(BETA * (0.0 - h[2]))),
        4 / 3 * (1 - s(BETA * (h[3] - 1.0))),
    ]
    assert out.losses.tolist() == pytest.approx(want, rel=1e-12)
    assert out.rewards.tolist() == pytest.approx([BETA * x for x in h], rel=1e-12)


def test_kto_gives_its_baseline_no_gradient() -> None:
    policy, reference = tensors("kto")
    baseline = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    desirable = torch.ones(4, dtype=torch.bool)
    out = preference_loss(
        policy.requires_grad_(), reference, cu(LENGTHS), "kto", desirable=desirable, baseline=baseline
    )
    out.losses.sum().backward()
    assert baseline.grad is None
    assert policy.grad.abs().min() > 0


@pytest.mark.parametrize("kind", [*PAIRED, "kto"])
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    policy, reference = tensors(kind)
    more = {}
    if kind == "kto":
        more = {"desirable": torch.tensor([True, False, True, False]), "baseline": torch.full((4,), 0.1).double()}

    def losses(p: torch.Tensor) -> torch.Tensor:
        return preference_loss(
            p, reference, cu(LENGTHS), kind, beta=BETA, label_smoothing=EPS, gamma=GAMMA, **more
        ).losses

    assert torch.autograd.gradcheck(losses, (policy.requires_grad_(),))


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo"])
def test_without_a_reference_the_log_ratio_is_the_log_probability(kind: str) -> None:
    policy, _ = tensors(kind)
    options = {"beta": BETA, "label_smoothing": EPS}
    bare = preference_loss(policy, None, cu(LENGTHS), kind, **options)
    zeros = [[0.0] * n for n in LENGTHS]
    p = by_segment(POLICY)
    want = [by_hand(kind, p[i], p[i + 1], zeros[i], zeros[i + 1]) for i in (0, 2)]
    assert bare.losses.tolist() == pytest.approx(want, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=5),
    st.sampled_from(PAIRED), st.floats(0.01, 5), st.integers(0, 2**31),
)  # fmt: skip
def test_a_pair_never_depends_on_its_neighbours(
    pairs: list[tuple[int, int]], kind: str, beta: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    lengths = [n for pair in pairs for n in pair]
    policy = -torch.rand(sum(lengths), generator=g, dtype=torch.float64) * 3 - 1e-3
    reference = None if kind in REFERENCE_FREE else -torch.rand(sum(lengths), generator=g, dtype=torch.float64) * 3
    together = preference_loss(policy, reference, cu(lengths), kind, beta=beta)
    assert together.losses.shape == (len(pairs),)
    assert together.losses.isfinite().all()
    at = 0
    for i, pair in enumerate(pairs):
        own = slice(at, at + sum(pair))
        at += sum(pair)
        alone = preference_loss(
            policy[own], None if reference is None else reference[own], cu(list(pair)), kind, beta=beta
        )
        assert together.losses[i].item() == pytest.approx(alone.losses.item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "cpo", "simpo"])
@pytest.mark.parametrize("far", [1e4, -1e4])
def test_a_far_margin_gives_a_finite_loss_and_gradient(kind: str, far: float) -> None:
    policy = torch.tensor([-1.0 + min(far, 0), -1.0 - max(far, 0)], requires_grad=True)
    out = preference_loss(policy, None, torch.tensor([0, 1, 2]), kind, beta=1.0)
    assert out.losses.item() == pytest.approx(0.0 if far > 0 else 1e4, rel=1e-6, abs=1e-6)
    out.losses.sum().backward()
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("certain", ["chosen", "rejected", "both"])
def test_an_answer_of_probability_one_gives_orpo_a_finite_loss_and_gradient(certain: str, dtype: torch.dtype) -> None:
    c, r = {"chosen": (0.0, -1.0), "rejected": (-1.0, 0.0), "both": (0.0, 0.0)}[certain]
    policy = torch.tensor([c, c, r, r], dtype=dtype, requires_grad=True)
    loss = preference_loss(policy, None, torch.tensor([0, 2, 4]), "orpo").losses
    loss.sum().backward()
    assert loss.isfinite().all()
    assert policy.grad.isfinite().all()
    # the rejected one being certain must cost more than the chosen one being so
    assert (loss.item() > 1) == (certain == "rejected")


@pytest.mark.parametrize("x", [-1e-3, -0.1, -0.5, -math.log(2), -0.8, -5.0, -30.0, -300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_is_exact_near_zero_and_far_from_it(x: float, dtype: torch.dtype) -> None:
    given_ = torch.tensor(x, dtype=dtype, requires_grad=True)
    x = given_.item()  # as rounded to the type
    want = math.log(-math.expm1(x)) if x > -0.7 else math.log1p(-math.exp(x))
    got = log1mexp(given_)
    rel = 1e-6 if dtype == torch.float32 else 1e-13
    assert got.item() == pytest.approx(want, rel=rel, abs=1e-44)
    got.backward()
    # d/dx log(1 - e^x) = -e^x / (1 - e^x) = 1 / expm1(-x) with the sign turned
    slope = -1 / math.expm1(-x)
    assert given_.grad.item() == pytest.approx(slope, rel=10 * rel, abs=1e-44)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_of_zero_is_that_of_the_largest_number_below_it(dtype: torch.dtype) -> None:
    zero = torch.zeros((), dtype=dtype, requires_grad=True)
    got = log1mexp(zero)
    assert got.item() == pytest.approx(math.log(torch.finfo(dtype).eps), rel=1e-6)
    got.backward()
    assert zero.grad.isfinite()


def test_no_pairs_give_no_losses() -> None:
    out = preference_loss(torch.zeros(0), torch.zeros(0), torch.tensor([0]))
    assert [len(x) for x in out] == [0, 0, 0]


def test_the_same_input_gives_the_same_bits() -> None:
    lengths = [7, 5] * 50
    policy, reference = -torch.rand(600), -torch.rand(600)
    runs = []
    for _ in range(2):
        leaf = policy.clone().requires_grad_()
        out = preference_loss(leaf, reference, cu(lengths))
        out.losses.sum().backward()
        runs.append([out.losses, out.rewards, out.logps, leaf.grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_wrong_calls_say_what_is_wrong() -> None:
    one, borders = torch.zeros(3), torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"unknown kind 'dpo'; choose from sigmoid, .*kto"):
        preference_loss(one, one, borders, "dpo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'sigmoid' needs pairs, got 3 completions"):
        preference_loss(one, one, borders)
    for kind in REFERENCE_FREE:
        with pytest.raises(ValueError, match=f"'{kind}' does not use a reference: pass reference_logps=None"):
            preference_loss(one, one, borders, kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'kto' needs desirable"):
        preference_loss(one, one, borders, "kto", baseline=one)
    with pytest.raises(ValueError, match="'kto' needs desirable"):
        preference_loss(one, one, borders, "kto", desirable=one)
    with pytest.raises(ValueError, match="policy_logps and reference_logps differ in shape"):
        preference_loss(one, torch.zeros(1), borders, "kto", desirable=one, baseline=one)
    with pytest.raises(ValueError, match=r"'kto' needs desirable and baseline of \[3\], got \[3\] and \[1\]"):
        preference_loss(one, one, borders, "kto", desirable=one, baseline=torch.zeros(1))


# ---- the Triton kernel, against float64

kernel = pytest.mark.usefixtures("triton_path", "poisoned")
KINDS = [*PAIRED, "kto"]
ULP = 2.0**-23  # of float32, relative


def run(
    kind: str, policy: torch.Tensor, reference: torch.Tensor | None, borders: torch.Tensor, upstream: torch.Tensor,
    kto: dict[str, torch.Tensor], **options: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Everything that comes out, forward and backward."""
    policy = policy.detach().clone().requires_grad_()
    reference = None if reference is None or kind in REFERENCE_FREE else reference.detach().clone().requires_grad_()
    kto = {k: v if v.dtype == torch.bool else v.to(policy.dtype) for k, v in kto.items()} if kind == "kto" else {}
    out = preference_loss(policy, reference, borders, kind, **kto, **options)
    assert not out.rewards.requires_grad
    assert not out.logps.requires_grad
    assert kernel_ran(out) == (policy.dtype != torch.float64 and os.environ.get("ALIGNKIT_KERNELS") != "eager")
    out.losses.backward(upstream[: len(out.losses)].to(out.losses.dtype))
    return {
        "losses": out.losses.detach(), "rewards": out.rewards, "logps": out.logps, "policy's": policy.grad,
        "reference's": torch.zeros(1) if reference is None else reference.grad,
    }  # fmt: skip


def kernel_ran(out: PreferenceLoss) -> bool:
    return "_PreferenceLoss" in out.losses.grad_fn.name()


def assert_as_good_as_eager(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> None:
    """At most twice the error that plain float32 PyTorch has, and a unit in the last place."""
    kind, *tensors, kto = args
    got = run(*args, **options)
    policy, reference, borders, upstream = (None if t is None else t.cpu() for t in tensors)
    kto = to(kto, torch.device("cpu"))
    wide = [None if t is None else t.double() for t in (policy, reference)]
    want = run(kind, *wide, borders, upstream.double(), kto, **options)
    with monkeypatch.context() as m:
        m.setenv("ALIGNKIT_KERNELS", "eager")
        eager = run(kind, policy, reference, borders, upstream, kto, **options)
    tiny = 1e-14 if kind == "kto" else 1e-44  # autograd's s (1 - s) is not exact in float64 either where s is near 1
    for name, exact in want.items():
        assert got[name].dtype == eager[name].dtype
        assert exact.isfinite().all()
        error, allowed = (got[name].cpu() - exact).abs(), 2 * (eager[name] - exact).abs() + ULP * exact.abs() + tiny
        assert bool((error <= allowed).all()), f"{name}: {got[name]}, eager {eager[name]}, exact {exact}"


def draw(lengths: list[int], seed: int, scale: float, device: torch.device) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    # no mean so near 0 that float32's log1mexp and float64's clamp it differently
    policy, reference = (-torch.rand(sum(lengths), generator=g) * scale - 1e-3 for _ in range(2))
    kto = {
        "desirable": torch.rand(len(lengths), generator=g) < 0.5, "baseline": torch.rand(len(lengths), generator=g)
    }  # fmt: skip
    upstream = torch.randn(len(lengths), generator=g).to(device)
    return policy.to(device), reference.to(device), cu(lengths).to(device), upstream, to(kto, device)


def to(given_: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {k: v.to(device) for k, v in given_.items()}


@kernel
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3), st.sampled_from(KINDS),
    st.floats(0.01, 5), st.floats(0, 0.4), st.floats(-1, 2), st.sampled_from([0.1, 3.0, 30.0]), st.integers(0, 2**31),
)  # fmt: skip
def test_the_kernel_is_as_exact_as_eager_float32(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, pairs: list[tuple[int, int]], kind: str, beta: float,
    eps: float, gamma: float, scale: float, seed: int,
) -> None:  # fmt: skip
    given_ = draw([n for pair in pairs for n in pair], seed, scale, device)
    options = {"beta": beta, "label_smoothing": eps, "gamma": gamma, "weights": (4 / 3, 0.7)}
    assert_as_good_as_eager(monkeypatch, kind, *given_, **options)


@kernel
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_takes_completions_of_awkward_lengths(
    kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_ = draw([1, 63, 341, 2049], 1, 0.5, device)  # the last takes three blocks
    assert_as_good_as_eager(
        monkeypatch, kind, *given_, beta=BETA, label_smoothing=EPS, gamma=GAMMA, weights=(4 / 3, 0.7)
    )


@kernel
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "orpo"])
def test_the_kernel_takes_empty_completions_for_0(
    kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_ = draw([0, 2, 3, 0, 0, 0], 2, 1.0, device)
    assert_as_good_as_eager(monkeypatch, kind, *given_, beta=BETA, label_smoothing=EPS, gamma=GAMMA)


@kernel
@pytest.mark.parametrize("kind", PAIRED)
def test_without_a_reference_the_kernel_takes_the_log_probability(
    kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, _, *more = draw([3, 1, 2, 4], 3, 2.0, device)
    assert_as_good_as_eager(monkeypatch, kind, policy, None, *more, beta=BETA, label_smoothing=EPS, gamma=GAMMA)


def gradients(policy: torch.Tensor, lengths: list[int], kind: str, **options: Any) -> tuple[list, list]:
    policy = policy.clone().requires_grad_()
    out = preference_loss(policy, None, cu(lengths).to(policy.device), kind, **options)
    assert kernel_ran(out)
    out.losses.sum().backward()
    return out.losses.tolist(), policy.grad.tolist()


@kernel
def test_the_kernel_bends_the_hinge_where_eager_does(device: torch.device) -> None:
    # margins of just below, at, and above 1, and a tie
    policy = torch.tensor([-1.0, -2.99, -1.0, -3.0, -1.0, -4.0, -2.0, -2.0], device=device)
    losses, grads = gradients(policy, [1] * 8, "hinge", beta=0.5)
    assert losses == pytest.approx([0.005, 0.0, 0.0, 1.0], rel=1e-4)
    assert grads == [-0.5, 0.5, 0.0, 0.0, 0.0, 0.0, -0.5, 0.5]


@kernel
@pytest.mark.parametrize(("kind", "tie"), [("sigmoid", math.log(2)), ("ipo", 25.0), ("orpo", math.log(2))])
def test_a_tie_costs_the_kernel_what_it_should(kind: str, tie: float, device: torch.device) -> None:
    losses, grads = gradients(torch.full((4,), -0.75, device=device), [2, 2], kind)
    assert losses == pytest.approx([tie], rel=1e-7)
    assert grads[0] == grads[1] == -grads[2] == -grads[3] < 0


@kernel
@pytest.mark.parametrize("kind", ["sigmoid", "robust", "cpo", "simpo"])
@pytest.mark.parametrize("margin", [1e-6, 0.5, 20.0, 50.0, 80.0, 1e4])
def test_the_kernel_keeps_all_digits_of_a_far_margin(kind: str, margin: float, device: torch.device) -> None:
    for sign in (1, -1):
        c, r = (-1.0, -1.0 - margin) if sign > 0 else (-1.0 - margin, -1.0)
        policy = torch.tensor([c, r], device=device)
        x = policy[0].item() - policy[1].item()
        losses, grads = gradients(policy, [1, 1], kind, beta=1.0)
        want = math.log1p(math.exp(-abs(x))) + max(-x, 0.0)
        slope = -math.exp(min(-x, 0.0)) / (1 + math.exp(-abs(x)))
        assert losses == pytest.approx([want], rel=ULP, abs=1e-44)
        assert grads == pytest.approx([slope, -slope], rel=ULP, abs=1e-44)


@kernel
@pytest.mark.parametrize("margin", [1e-6, 0.5, 20.0, 50.0, -50.0, -0.5])
def test_the_kernel_keeps_all_digits_of_a_far_margin_of_kto(margin: float, device: torch.device) -> None:
    policy = torch.tensor([-60.0, -60.0], device=device)
    baseline = torch.tensor([-60.0 - margin, -60.0 + margin], device=device)
    flags = {"desirable": torch.tensor([True, False], device=device), "baseline": baseline, "weights": (1.0, 2.0)}
    losses, grads = gradients(policy, [1, 1], "kto", beta=1.0, **flags)
    x = [-60.0 - baseline[0].item(), baseline[1].item() + 60.0]
    assert losses == pytest.approx([s(-x[0]), 2 * s(-x[1])], rel=2 * ULP)
    assert grads == pytest.approx([-s(x[0]) * s(-x[0]), 2 * s(x[1]) * s(-x[1])], rel=2 * ULP)


def log_odds(mean: float) -> tuple[float, float]:
    """Log-odds of e^mean and their derivative, the probability clamped as float32's log1mexp does it."""
    below = min(mean, -ULP)
    return mean - math.log(-math.expm1(below)), -1 / math.expm1(below) if mean <= -ULP else 1.0


@kernel
@pytest.mark.parametrize("c", [0.0, -(2.0**-26), -(2.0**-23), -(2.0**-20), -1e-3, -0.7, -40.0, -2e4])
@pytest.mark.parametrize("r", [0.0, -(2.0**-22), -1.0])
def test_the_kernel_gives_orpo_finite_odds_up_to_certainty(c: float, r: float, device: torch.device) -> None:
    policy = torch.tensor([c, c, r, 0.0, r], device=device)
    losses, grads = gradients(policy, [2, 3], "orpo")
    chosen, rejected = policy[:2].tolist(), policy[2:].tolist()
    (o_c, slope_c), (o_r, slope_r) = log_odds(sum(chosen) / 2), log_odds(sum(rejected) / 3)
    x = o_c - o_r
    want = math.log1p(math.exp(-abs(x))) + max(-x, 0.0)
    slope = -math.exp(min(-x, 0.0)) / (1 + math.exp(-abs(x)))
    # what is left of 1 - e^m in float64 beside the clamp has 9 digits
    assert losses == pytest.approx([want], rel=2 * ULP, abs=1e-44)
    assert grads == pytest.approx([slope * slope_c / 2] * 2 + [-slope * slope_r / 3] * 3, rel=2 * ULP, abs=1e-44)


@kernel
def test_the_kernel_loses_nothing_of_a_long_completion_in_float32(device: torch.device) -> None:
    policy, reference = torch.full((5001,), -0.1, device=device), torch.full((5001,), -0.3, device=device)
    policy[0], policy[4999] = 3e7, -3e7  # float32 would not feel a single 0.1 beside it
    out = preference_loss(policy, reference, torch.tensor([0, 5000, 5001], device=device), beta=1.0)
    p, r = policy.tolist(), reference.tolist()
    assert out.logps.tolist() == pytest.approx([math.fsum(p[:5000]), p[5000]], rel=ULP)
    assert out.rewards.tolist() == pytest.approx(
        [math.fsum(p[:5000]) - math.fsum(r[:5000]), p[5000] - r[5000]], rel=ULP
    )


@kernel
def test_the_kernel_takes_an_empty_answer_of_orpo_for_a_certain_one(device: torch.device) -> None:
    losses, grads = gradients(torch.tensor([-1.0, -0.5], device=device), [0, 2], "orpo")
    x = log_odds(0.0)[0] - log_odds(-0.75)[0]
    assert losses == pytest.approx([math.log1p(math.exp(-x))], rel=2 * ULP)
    slope = log_odds(-0.75)[1] / (1 + math.exp(x))
    assert grads == pytest.approx([slope / 2] * 2, rel=2 * ULP)


@kernel
def test_the_kernel_reads_desirable_of_any_type_and_strided_inputs(device: torch.device) -> None:
    policy, reference = (torch.tensor(x, device=device) for x in (POLICY, REFERENCE))
    rows = torch.stack([policy, reference, reference], dim=1).requires_grad_()
    borders = torch.stack([cu(LENGTHS)] * 2, dim=1)[:, 0].to(device)
    baseline = torch.tensor([0.25, 0.5, 0.0, 1.0]).repeat_interleave(2)[::2].to(device)
    h = [sum(p) - sum(r) for p, r in zip(by_segment(POLICY), by_segment(REFERENCE), strict=True)]
    z, flags, weights = [0.25, 0.5, 0.0, 1.0], [True, False, False, True], (4 / 3, 0.7)
    shift = [1 if flag else -1 for flag in flags]
    want = [weights[b < 0] * s(-BETA * b * (a - d)) for a, b, d in zip(h, shift, z, strict=True)]
    slopes = [-BETA * b * w * (1 - w / weights[b < 0]) for b, w in zip(shift, want, strict=True)]
    for dtype in (torch.bool, torch.float32, torch.int64):
        rows.grad = None
        desirable = torch.tensor(flags).repeat_interleave(2)[::2].to(device, dtype)
        out = preference_loss(
            rows[:, 0], rows[:, 1], borders, "kto", beta=BETA, desirable=desirable, baseline=baseline, weights=weights
        )
        assert kernel_ran(out)
        assert out.losses.tolist() == pytest.approx(want, rel=2 * ULP)
        assert out.rewards.tolist() == pytest.approx([BETA * x for x in h], rel=2 * ULP)
        out.losses[::2].sum().backward()  # a gradient of stride 0 behind the slice
        each = [
            slope if i % 2 == 0 else 0.0
            for i, (slope, n) in enumerate(zip(slopes, LENGTHS, strict=True))
            for _ in range(n)
        ]
        assert rows.grad[:, 0].tolist() == pytest.approx(each, rel=2 * ULP)
        assert rows.grad[:, 1].tolist() == pytest.approx([-x for x in each], rel=2 * ULP)


@kernel
def test_the_reference_alone_may_want_a_gradient(device: torch.device) -> None:
    policy, reference = (torch.tensor(x, device=device) for x in (POLICY, REFERENCE))
    out = preference_loss(policy, reference.requires_grad_(), cu(LENGTHS).to(device), "hinge", beta=0.25)
    out.losses.sum().backward()
    assert policy.grad is None
    assert reference.grad.tolist() == [0.25] * 3 + [-0.25] + [0.25] * 2 + [-0.25] * 4


@kernel
@pytest.mark.parametrize("kind", PAIRED)
def test_what_is_not_finite_stays_in_its_pair(kind: str, device: torch.device) -> None:
    nan, inf = math.nan, math.inf
    policy = torch.tensor([-1.0, -2.0, nan, -1.0, -1.0, -inf, -2.0, -1.0], device=device)
    losses, grads = gradients(policy, [1] * 8, kind, beta=1.0)
    alone = [gradients(policy[i : i + 2], [1, 1], kind, beta=1.0) for i in (0, 6)]
    assert [losses[0], losses[3]] == [loss[0] for loss, _ in alone]
    assert grads[:2] + grads[6:] == [g for _, each in alone for g in each]
    assert all(map(math.isfinite, [losses[0], losses[3], *grads[:2], *grads[6:]]))
    assert math.isnan(losses[1])  # and no kind hides it


@kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_the_kernel_reads_and_returns_low_precision(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    policy, reference = (torch.tensor(x, device=device) for x in (POLICY, REFERENCE))  # all are exact in 8 bits
    low = policy.to(dtype).requires_grad_()
    out = preference_loss(low, reference.to(dtype), cu(LENGTHS).to(device), kind, beta=BETA)
    assert {t.dtype for t in out} == {dtype}
    out.losses.sum().backward()
    wide = policy.double().requires_grad_()
    exact = preference_loss(wide, reference.double(), cu(LENGTHS).to(device), kind, beta=BETA)
    exact.losses.sum().backward()
    for got, want in [*zip(out, exact, strict=True), (low.grad, wide.grad)]:
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=0.0)
    mixed = preference_loss(policy.to(dtype), reference, cu(LENGTHS).to(device), kind, beta=BETA)
    assert [t.dtype for t in mixed] == [torch.float32, torch.float32, dtype]


@kernel
def test_float64_anywhere_is_computed_by_plain_pytorch(device: torch.device) -> None:
    policy, reference = (torch.tensor(x, device=device, requires_grad=True) for x in (POLICY, REFERENCE))
    out = preference_loss(policy, reference.double(), cu(LENGTHS).to(device))
    assert not kernel_ran(out)
    assert out.losses.dtype == torch.float64


@kernel
def test_the_kernel_gives_nothing_for_nothing_and_the_same_bits_twice(device: torch.device) -> None:
    nothing = torch.zeros(0, device=device, requires_grad=True)
    assert [len(x) for x in preference_loss(nothing, None, torch.tensor([0], device=device))] == [0, 0, 0]
    empty = preference_loss(nothing, None, torch.tensor([0, 0, 0], device=device), beta=1.0)
    assert empty.losses.tolist() == pytest.approx([math.log(2)])
    empty.losses.sum().backward()
    policy = -torch.rand(60).to(device)
    assert gradients(policy, [7, 5] * 5, "sigmoid") == gradients(policy, [7, 5] * 5, "sigmoid")


@kernel
def test_wrong_calls_are_refused_before_the_kernel() -> None:
    test_wrong_calls_say_what_is_wrong()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_gpu(kind: str) -> None:
    policy, reference, borders, upstream, kto = draw([3, 1, 2, 4], 4, 1.0, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(kind, policy, reference, borders, upstream, kto)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("kind", "numbers", "said"),
    [
        ("sigmoid", {"beta": -1.0}, "beta must be 0 or more, got -1.0"),
        ("ipo", {"beta": 0.0}, "beta must be above 0, got 0.0"),
        ("sigmoid", {"label_smoothing": -0.1}, "label_smoothing from 0 to below 1"),
        ("robust", {"label_smoothing": 0.5}, "'robust' needs label_smoothing .* got 0.5"),
    ],
)
def test_numbers_that_turn_a_loss_over_are_refused(kind: Any, numbers: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        preference_loss(torch.zeros(2), None, torch.tensor([0, 1, 2]), kind, **numbers)
