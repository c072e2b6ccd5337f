"""preference_loss: every kind against its formula written with the math module, rewards, gradients, hard cases."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
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
    with pytest.raises(ValueError, match=r"unknown kind 'dpo'; there are sigmoid, .*kto"):
        preference_loss(one, one, borders, "dpo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'sigmoid' wants pairs, got 3 completions"):
        preference_loss(one, one, borders)
    for kind in REFERENCE_FREE:
        with pytest.raises(ValueError, match=f"'{kind}' has no reference: pass reference_logps=None"):
            preference_loss(one, one, borders, kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'kto' needs desirable"):
        preference_loss(one, one, borders, "kto", baseline=one)
    with pytest.raises(ValueError, match="'kto' needs desirable"):
        preference_loss(one, one, borders, "kto", desirable=one)
    with pytest.raises(ValueError, match="policy_logps and reference_logps differ in shape"):
        preference_loss(one, torch.zeros(1), borders, "kto", desirable=one, baseline=one)
    with pytest.raises(ValueError, match=r"'kto' needs desirable and baseline of \[3\], got \[3\] and \[1\]"):
        preference_loss(one, one, borders, "kto", desirable=one, baseline=torch.zeros(1))
