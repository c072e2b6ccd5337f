"""policy_loss: values and gradients written out token by token in Python's float64, against eager and kernels."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignkit_kernels import policy_loss

relaxed = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
INF, NAN = float("inf"), float("nan")


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])


class Case(NamedTuple):
    lengths: list[int]
    logps: Tensor
    old: Tensor
    advantages: Tensor
    upstream: Tensor
    options: dict[str, Any]  # with reference_logps, entropies and mask


def draw(
    lengths: list[int],
    seed: int,
    *,
    ratio: str = "token",
    kl: str = "k3",
    per_token: bool = True,
    masked: bool = True,
    bare: bool = False,
    wild: bool = False,
) -> Case:
    """Return a case of float32 numbers; wild: one log-ratio in three goes to 100, 1000 or infinity."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def normal(size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, generator=g)

    logps = normal(n) - 3
    old, reference = logps + normal(n, 0.4), logps + normal(n, 0.5)
    if wild:
        extremes = torch.tensor([100.0, -100.0, 1000.0, -1000.0, INF])
        for other in (old, reference):
            chosen = extremes[torch.randint(5, (n,), generator=g)]
            other.copy_(torch.where(torch.rand(n, generator=g) < 1 / 3, -chosen, other))
    advantages = normal(n if per_token else len(lengths)) * (torch.rand(1, generator=g) < 0.9)
    mask = torch.rand(n, generator=g) < 0.7
    options: dict[str, Any] = {"ratio": ratio, "clip": (0.1, 0.3), "mask": mask if masked else None}
    if not bare:
        options |= {"kl": kl, "kl_coef": 0.3, "reference_logps": reference}
        options |= {"entropies": normal(n).abs(), "entropy_coef": 0.05}
    return Case(lengths, logps, old, advantages, normal(n), options)


def saturate(x: float) -> tuple[float, float]:
    """Return the log-ratio that counts, and the factor of its gradient."""
    return min(max(x, -60.0), 60.0), float(abs(x) <= 60)


def by_hand(case: Case) -> dict[str, list[float]]:
    """The definitions and their derivatives, one token after the other, in float64.

    "sizes" are the magnitudes that went into g_logps, which may have cancelled there.
    """
    n, o = len(case.logps), case.options
    logps, old, upstream = (t.tolist() for t in (case.logps, case.old, case.upstream))
    mask = [True] * n if o["mask"] is None else o["mask"].tolist()
    reference = o["reference_logps"].tolist() if "reference_logps" in o else None
    low, high = 1 - o["clip"][0], 1 + o["clip"][1]
    names = ("losses", "clipped", "kl", "g_logps", "g_entropies", "sizes")
    out: dict[str, list[float]] = {name: [0.0] * n for name in names} | {"ratios": [1.0] * n}
    start = 0
    for s, length in enumerate(case.lengths):
        tokens = [t for t in range(start, start + length) if mask[t]]
        start += length
        mean = math.fsum(logps[t] - old[t] for t in tokens) / max(1, len(tokens))
        shared = size = 0.0
        for t in tokens:
            x, passes = saturate(mean if o["ratio"] == "sequence" else logps[t] - old[t])
            r = out["ratios"][t] = math.exp(x)
            a = float(case.advantages[t if len(case.advantages) == n else s])
            out["losses"][t] = -min(r * a, min(max(r, low), high) * a)
            out["clipped"][t] = float((r > high and a > 0) or (r < low and a < 0))
            slope = -a * r * passes * (1 - out["clipped"][t]) * upstream[t]
            if o["ratio"] == "sequence":
                shared += slope / len(tokens)
                size += abs(slope) / len(tokens)
            else:
                out["g_logps"][t] += slope
                out["sizes"][t] += abs(slope)
            if reference is not None:
                r, passes = saturate(logps[t] - reference[t])
                k, dk = {"k1": (r, 1.0), "k2": (r * r / 2, r), "k3": (math.expm1(-r) + r, -math.expm1(-r))}[o["kl"]]
                out["kl"][t] = k
                out["losses"][t] += o["kl_coef"] * k - o["entropy_coef"] * float(o["entropies"][t])
                out["g_logps"][t] += o["kl_coef"] * dk * passes * upstream[t]
                out["sizes"][t] += abs(o["kl_coef"] * dk * passes * upstream[t])
                out["g_entropies"][t] = -o["entropy_coef"] * upstream[t]
        for t in tokens:
            out["g_logps"][t] += shared
            out["sizes"][t] += size
    return out


def computed(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """What policy_loss and its backward make of the case."""
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    for name in ("reference_logps", "entropies"):
        if name in given:
            given[name] = given[name].to(dtype, copy=True)
    if "entropies" in given:
        given["entropies"].requires_grad_()
    logps = case.logps.to(device, dtype, copy=True).requires_grad_()
    old, advantages, cu = case.old.to(device, dtype), case.advantages.to(device, dtype), borders(case.lengths)
    out = policy_loss(logps, old, advantages, cu.to(device), **given)
    assert out.losses.dtype == out.ratios.dtype == out.kl.dtype == dtype
    assert out.clipped.dtype == torch.bool
    assert not out.ratios.requires_grad
    assert not out.kl.requires_grad
    out.losses.backward(case.upstream.to(device, dtype))
    assert logps.grad is not None
    entropies = given.get("entropies")
    got = out._asdict() | {"g_logps": logps.grad}
    return got | ({} if entropies is None else {"g_entropies": entropies.grad})


def assert_equal(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Everything is rounded once, the slopes from which g_logps is made once more."""
    want = by_hand(case)
    eps = 2e-12 if dtype == torch.float64 else 7e-8
    for name, got in computed(case, dtype, device).items():
        sizes = want["sizes"] if name == "g_logps" else [0.0] * len(want[name])
        for one, exact, size in zip(got.tolist(), want[name], sizes, strict=True):
            assert one == pytest.approx(exact, rel=eps, abs=2 * eps * size + 1e-12), name


def kinds(test: Any) -> Any:
    """Run the test for every ratio and KL."""
    test = pytest.mark.parametrize("ratio", ["token", "sequence"])(test)
    return pytest.mark.parametrize("kl", ["k1", "k2", "k3"])(test)


LENGTHS, SEEDS = st.lists(st.integers(0, 40), max_size=5), st.integers(0, 2**31)
FLAGS = st.fixed_dictionaries(dict.fromkeys(["per_token", "masked", "bare", "wild"], st.booleans()))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let short completions span several blocks, and several programs."""
    monkeypatch.setattr(importlib.import_module("alignkit_kernels.policy_loss"), "BLOCK", 16)


@pytest.fixture(params=["eager", "triton"])
def each_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("ALIGNKIT_KERNELS", request.param)


@kinds
@relaxed
@given(LENGTHS, SEEDS, FLAGS)
def test_eager_values_and_gradients_are_those_by_hand(
    ratio: str, kl: str, lengths: list[int], seed: int, flags: dict[str, bool]
) -> None:
    assert_equal(draw(lengths, seed, ratio=ratio, kl=kl, **flags), torch.float64, torch.device("cpu"))


@kinds
@relaxed
@given(LENGTHS, SEEDS, FLAGS)
def test_the_kernels_values_and_gradients_are_those_by_hand(
    triton_path: None,
    poisoned: None,
    small_blocks: None,
    device: torch.device,
    ratio: str,
    kl: str,
    lengths: list[int],
    seed: int,
    flags: dict[str, bool],
) -> None:
    assert_equal(draw(lengths, seed, ratio=ratio, kl=kl, **flags), torch.float32, device)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("lengths", [[1, 63, 0, 341], [1300]])
def test_awkward_lengths_at_the_kernels_own_block(
    triton_path: None, poisoned: None, device: torch.device, ratio: str, lengths: list[int]
) -> None:
    assert_equal(draw(lengths, 7, ratio=ratio, per_token=False), torch.float32, device)


@kinds
def test_the_gradient_is_that_of_finite_differences(ratio: str, kl: str) -> None:
    case = draw([1, 4, 0, 5], 11, ratio=ratio, kl=kl)
    options = {k: v.double() if k == "reference_logps" else v for k, v in case.options.items()}
    edges = policy_loss(case.logps, case.old, case.advantages, borders(case.lengths), **case.options).ratios
    assert min(float((edges - edge).abs().min()) for edge in (0.9, 1.3)) > 1e-4  # away from the kinks

    def losses(logps: Tensor, entropies: Tensor) -> Tensor:
        given = options | {"entropies": entropies}
        return policy_loss(logps, case.old.double(), case.advantages.double(), borders(case.lengths), **given).losses

    inputs = (case.logps.double().requires_grad_(), case.options["entropies"].double().requires_grad_())
    assert torch.autograd.gradcheck(losses, inputs)


@kinds
def test_the_kernels_error_is_at_most_twice_that_of_float32(
    triton_path: None, poisoned: None, device: torch.device, ratio: str, kl: str
) -> None:
    case = draw([200, 141], 3, ratio=ratio, kl=kl, masked=False)
    want, got = by_hand(case), computed(case, torch.float32, device)
    o, logps = case.options, case.logps.clone().requires_grad_()
    x = logps - case.old
    if ratio == "sequence":
        x = torch.cat([part.mean().expand(len(part)) for part in x.split(case.lengths)])
    r, q = x.exp(), logps - o["reference_logps"]
    surrogate = torch.minimum(r * case.advantages, r.clamp(0.9, 1.3) * case.advantages)
    k = {"k1": q, "k2": q * q / 2, "k3": torch.exp(-q) - 1 + q}[kl]
    losses = -surrogate + o["kl_coef"] * k - o["entropy_coef"] * o["entropies"]
    losses.backward(case.upstream)
    assert logps.grad is not None
    plain = {"losses": losses.detach(), "ratios": r.detach(), "kl": k.detach(), "g_logps": logps.grad}
    for name, low in plain.items():
        exact = torch.tensor(want[name], dtype=torch.float64)
        error, allowed = (float((t.detach().cpu().double() - exact).abs().max()) for t in (got[name], low))
        assert error <= 2 * allowed, name


def test_the_token_ratio_is_the_textbook_objective_of_ppo(each_path: None, device: torch.device) -> None:
    # ratios 1.5, 1.5, 0.5, 0.5, 1.1; A 2, -2, 2, -2, 2; clipped to 0.8 to 1.2
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], device=device)
    a = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0], device=device)
    logps = ratios.log().requires_grad_()
    out = policy_loss(logps, torch.zeros_like(ratios), a, torch.tensor([0, 5], device=device))
    assert out.losses.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6, -2.2])
    assert out.clipped.tolist() == [True, False, False, True, False]
    assert out.ratios.tolist() == pytest.approx(ratios.tolist())
    assert out.kl.tolist() == [0.0] * 5
    out.losses.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0, -2.2])


def test_clip_higher_moves_the_upper_bound_alone(each_path: None, device: torch.device) -> None:
    logps = torch.tensor([1.25, 1.5, 0.7], device=device).log()
    a, cu = torch.tensor([1.0, 1.0, -1.0], device=device), torch.tensor([0, 3], device=device)
    out = policy_loss(logps, torch.zeros_like(logps), a, cu, clip=(0.2, 0.28))
    assert out.losses.tolist() == pytest.approx([-1.25, -1.28, 0.8])
    assert out.clipped.tolist() == [False, True, True]
    out = policy_loss(logps, torch.zeros_like(logps), a, cu, clip=(1.0, INF))
    assert out.losses.tolist() == pytest.approx([-1.25, -1.5, 0.7])
    assert out.clipped.tolist() == [False, False, False]


def test_the_sequence_ratio_is_gspos_by_hand(each_path: None, device: torch.device) -> None:
    # log-ratios 0.1, 0.3 (mean 0.2) with A = 2: clipped to 1.1; and -0.3, 0, 0.1, 0.1 (mean -0.025) with A = -1
    differences = torch.tensor([0.1, 0.3, -0.3, 0.0, 0.1, 0.1], device=device)
    logps = (differences - 5).requires_grad_()
    cu = torch.tensor([0, 2, 6], device=device)
    a = torch.tensor([2.0, -1.0], device=device)
    out = policy_loss(logps, torch.full_like(differences, -5), a, cu, ratio="sequence", clip=(0.1, 0.1))
    s = math.exp(-0.025)
    assert out.ratios.tolist() == pytest.approx([math.exp(0.2)] * 2 + [s] * 4)
    assert out.clipped.tolist() == [True, True, False, False, False, False]
    objective = (out.losses[:2].mean() + out.losses[2:].mean()) / 2
    assert objective.item() == pytest.approx(-(1.1 * 2 + s * -1) / 2)
    objective.backward()
    assert logps.grad is not None
    # d objective / d logp_t = 1/2 s / 4 for each of the second's tokens
    assert logps.grad.tolist() == pytest.approx([0.0, 0.0] + [s / 8] * 4, rel=1e-6)


def test_a_sequences_gradient_adds_up_what_comes_to_each_of_its_tokens(each_path: None, device: torch.device) -> None:
    logps = torch.zeros(3, device=device, requires_grad=True)
    a, cu = torch.tensor([1.0, 2.0, 4.0], device=device), torch.tensor([0, 3], device=device)
    out = policy_loss(logps, torch.zeros(3, device=device), a, cu, ratio="sequence")
    out.losses.backward(torch.tensor([1.0, 10.0, 0.0], device=device))
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-21 / 3] * 3)


def test_on_policy_the_ratio_is_1_to_the_bit_and_the_gradient_the_advantage(
    each_path: None, device: torch.device
) -> None:
    logps = torch.randn(50, device=device, requires_grad=True)
    a, cu = torch.randn(50, device=device), torch.tensor([0, 20, 50], device=device)
    out = policy_loss(logps, logps, a, cu, clip=(0.0, 0.0))
    assert out.ratios.tolist() == [1.0] * 50
    assert not bool(out.clipped.any())
    out.losses.sum().backward()
    assert torch.equal(logps.grad, -a)


def test_the_three_kl_estimators_by_hand(each_path: None, device: torch.device) -> None:
    logps = torch.tensor([-1.0, -2.0, -3.0], device=device)
    reference = torch.tensor([-1.5, -2.0, -2.0], device=device)  # r = 0.5, 0, -1
    nothing, cu = torch.zeros(3, device=device), torch.tensor([0, 3], device=device)
    wanted = {
        "k1": [0.5, 0.0, -1.0],
        "k2": [0.125, 0.0, 0.5],
        "k3": [math.exp(-0.5) - 0.5, 0.0, math.e - 2],
    }
    for kl, want in wanted.items():
        out = policy_loss(logps, logps, nothing, cu, reference_logps=reference, kl=kl, kl_coef=2.0)
        assert out.kl.tolist() == pytest.approx(want)
        assert out.losses.tolist() == pytest.approx([2 * k for k in want])
        raw = policy_loss(logps, logps, nothing, cu, reference_logps=reference, kl=kl)
        assert raw.kl.tolist() == pytest.approx(want)
        assert raw.losses.tolist() == [0.0] * 3


def test_the_expected_gradient_of_k2_is_the_kls_and_that_of_k1_is_nothing() -> None:
    reference = torch.log_softmax(torch.tensor([0.3, -1.0, 0.5, 0.0], dtype=torch.float64), 0)
    z = torch.tensor([1.0, 0.2, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    divergence = (torch.softmax(z, 0) * (torch.log_softmax(z, 0) - reference)).sum()
    (want,) = torch.autograd.grad(divergence, z)
    expected = {}
    for kl in ("k1", "k2", "k3"):
        logps = torch.log_softmax(z, 0)
        given = {"reference_logps": reference, "kl": kl, "kl_coef": 1.0}
        out = policy_loss(logps, logps, torch.zeros(4), torch.tensor([0, 4]), **given)
        if kl != "k2":  # the values of k1 and k3 are unbiased
            assert (logps.exp() * out.kl).sum().item() == pytest.approx(divergence.item())
        (expected[kl],) = torch.autograd.grad((torch.softmax(z, 0).detach() * out.losses).sum(), z)
    assert expected["k1"].tolist() == pytest.approx([0.0] * 4, abs=1e-12)
    assert expected["k2"].tolist() == pytest.approx(want.tolist())
    assert float((expected["k3"] - want).abs().max()) > 0.01


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_masked_tokens_are_as_if_they_were_not_there(each_path: None, device: torch.device, ratio: str) -> None:
    case = draw([3, 6, 2, 0], 21, ratio=ratio)
    mask = torch.tensor([1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0]).bool()  # the third completion has nothing left
    short = {k: v[mask] if isinstance(v, Tensor) else v for k, v in case.options.items()} | {"mask": None}
    want = by_hand(
        Case([2, 4, 0, 0], case.logps[mask], case.old[mask], case.advantages[mask], case.upstream[mask], short)
    )
    poison = {k: torch.where(mask, v, NAN) for k, v in case.options.items() if k in ("reference_logps", "entropies")}
    tensors = (torch.where(mask, t, NAN) for t in (case.logps, case.old, case.advantages, case.upstream))
    got = computed(Case(case.lengths, *tensors, case.options | poison | {"mask": mask}), torch.float32, device)
    for name, tensor in got.items():
        assert tensor.cpu()[mask].tolist() == pytest.approx(want[name], rel=1e-6, abs=1e-6), name
        assert set(tensor.cpu()[~mask].tolist()) == {1.0 if name == "ratios" else 0.0}, name


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_extreme_log_ratios_stay_finite_and_pass_no_gradient(each_path: None, device: torch.device, ratio: str) -> None:
    far = torch.tensor([200.0, 200.0, 200.0, -200.0, -200.0, INF, -INF, 60.5], device=device)
    a = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 1.0, -1.0, -1.0], device=device)
    logps = torch.zeros(8, device=device, requires_grad=True)
    cu = torch.arange(9, device=device)
    out = policy_loss(logps, -far, a, cu, ratio=ratio, reference_logps=far, kl_coef=0.1)
    (0 * out.losses).sum().backward(retain_graph=True)
    assert logps.grad is not None
    assert logps.grad.tolist() == [0.0] * 8
    out.losses.sum().backward()
    assert logps.grad.tolist() == [0.0] * 8
    assert all(bool(t.isfinite().all()) for t in (out.losses, out.ratios, out.kl))
    assert out.clipped.tolist() == [True, False, False, False, True, True, True, False]
    nan = policy_loss(logps, torch.full_like(far, NAN), a, cu, ratio=ratio)
    assert bool(nan.losses.isnan().all())  # what is not a number is not hidden


def test_strided_and_expanded_gradients_and_inputs_are_read_rightly(each_path: None, device: torch.device) -> None:
    case = draw([2, 4], 9, bare=True, masked=False, ratio="sequence")
    wide = [torch.stack([t, t + 9], 1).to(device)[:, 0] for t in (case.logps, case.old, case.advantages)]
    logps = wide[0].requires_grad_()
    cu = torch.tensor([[0, 7], [2, 7], [6, 7]], device=device)[:, 0]
    mask = torch.ones(6, 2, device=device, dtype=torch.bool)[:, 0]
    strided = torch.tensor([[1.0, 9.0], [2.0, 9.0]], device=device).repeat(3, 1)[:, 0]
    for upstream in (torch.ones(1, device=device).expand(6), strided):
        out = policy_loss(logps, *wide[1:], cu, ratio="sequence", clip=(0.1, 0.3), mask=mask)
        (g,) = torch.autograd.grad(out.losses, logps, upstream)
        want = by_hand(case._replace(upstream=upstream.cpu()))
        assert out.losses.tolist() == pytest.approx(want["losses"], rel=1e-6)
        assert g.tolist() == pytest.approx(want["g_logps"], rel=1e-6, abs=1e-7)


def test_low_precision_is_read_and_float32_given_back(each_path: None, device: torch.device) -> None:
    logps = torch.tensor([-1.0, -2.0], device=device, dtype=torch.bfloat16, requires_grad=True)
    old = torch.tensor([-1.125, -2.0], device=device, dtype=torch.bfloat16)
    cu = torch.tensor([0, 2], device=device)
    out = policy_loss(logps, old, torch.tensor([3.0], device=device, dtype=torch.float64), cu)
    assert out.losses.dtype == torch.float32
    assert out.losses.tolist() == pytest.approx([-3 * math.exp(0.125), -3.0])
    out.losses.sum().backward()
    assert logps.grad is not None
    assert logps.grad.dtype == torch.bfloat16


def test_old_reference_and_advantages_have_no_gradient(each_path: None, device: torch.device) -> None:
    logps, old, a, reference = (torch.randn(4, device=device, requires_grad=True) for _ in range(4))
    cu = torch.tensor([0, 4], device=device)
    policy_loss(logps, old, a, cu, reference_logps=reference, kl="k2", kl_coef=1.0).losses.sum().backward()
    assert logps.grad is not None
    assert old.grad is None
    assert a.grad is None
    assert reference.grad is None


def test_no_tokens_and_no_completions_are_fine(each_path: None, device: torch.device) -> None:
    nothing = torch.zeros(0, device=device, requires_grad=True)
    for cu in ([0], [0, 0, 0]):
        for ratio in ("token", "sequence"):
            a = torch.zeros(len(cu) - 1, device=device)
            out = policy_loss(nothing, nothing, a, torch.tensor(cu, device=device), ratio=ratio)
            assert [t.shape for t in out] == [(0,)] * 4
            out.losses.sum().backward()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_same_input_gives_the_same_bits(each_path: None, device: torch.device, ratio: str) -> None:
    case = draw([30, 600], 4, ratio=ratio)
    first, second = (computed(case, torch.float32, device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_does_not_fit_is_named() -> None:
    x, cu = torch.zeros(3), torch.tensor([0, 1, 3])

    def refused(match: str, *args: Tensor, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            policy_loss(*(args or (x, x, x, cu)), **options)

    refused(r"ratio must be one of \('token', 'sequence'\) and kl .*, got 'word' and 'k3'", ratio="word")
    refused(r"got 'token' and 'k4'", kl="k4")
    refused(r"clip must be \(low, high\) .*, got \(1.5, 0.2\)", clip=(1.5, 0.2))
    refused(r"got \(0.2, nan\)", clip=(0.2, NAN))
    refused(r"kl_coef is 0.1, but reference_logps is missing", kl_coef=0.1)
    refused(r"entropy_coef is 0.1, but entropies is missing", entropy_coef=0.1)
    refused(r"expected logps \[C\], got \[1, 3\]", x[None], x, x, cu)
    refused(r"expected old_logps of the shape of logps \[3\], got \[2\]", x, x[:2], x, cu)
    refused(r"expected reference_logps of the shape of logps \[3\], got \[2\]", reference_logps=x[:2])
    refused(r"expected mask of the shape of logps \[3\], got \[2\]", mask=torch.ones(2).bool())
    refused(r"expected a bool mask, got torch.float32", mask=torch.ones(3))
    refused(
        r"expected advantages, one per token \[3\] or one per completion \[2\], got \[4\]", x, x, torch.zeros(4), cu
    )
    refused(r"cu_seqlens must ascend from 0 to 3, got \[0, 2\]", x, x, x, torch.tensor([0, 2]))
