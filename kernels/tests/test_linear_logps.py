"""linear_logps: the logits of a head, with everything an architecture may do to them, against float64 by hand."""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from alignkit_kernels import linear_logps

# the package's attribute of that name is the function
MODULE = importlib.import_module("alignkit_kernels.linear_logps")
LSE = importlib.import_module("alignkit_kernels.linear_lse")
PLAN = importlib.import_module("alignkit_kernels.linear_plan")
ROWS = importlib.import_module("alignkit_kernels.row_stats")

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


# what needs a gradient, and the budget for kept logits of 5 bytes a column and row (between none and all in float32)
PATHS = {
    "frozen head": (1, ("hidden",), None),
    "kept": (2, ("hidden", "weight", "bias"), None),
    "again": (3, ("hidden", "weight", "bias"), 0),
    "some kept": (3, ("hidden", "weight", "bias"), 0.5),
    "no gradient": (4, (), None),
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let even small tensors be computed in several chunks, and by several programs' steps."""
    few = {1: 2600, 3: 2600, 4: 2600}
    monkeypatch.setattr(PLAN, "CHUNK", {"cpu": few, "cuda": few})
    monkeypatch.setattr(PLAN, "MULTIPLE", 16)
    monkeypatch.setattr(ROWS, "TRITON_BLOCK", 64)


def budget_of(share: float | None, hidden: Tensor, weight: Tensor) -> int | None:
    return None if share is None else int(share * len(hidden) * len(weight) * hidden.element_size())


def results(function: object, leaves: dict[str, Tensor], learns: tuple[str, ...], entropy: bool = True) -> dict:
    """Values, and the gradients of two weighted sums, by name."""
    leaves = {name: leaf.detach().clone().requires_grad_(name in learns) for name, leaf in leaves.items()}
    logps, entropies = function(**leaves)  # type: ignore[operator]
    upstream = torch.randn(len(logps), generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(logps.device)
    loss = (logps.double() * upstream).sum()
    if entropy:
        loss = loss + (entropies.double() * upstream.flip(0)).sum()
    if learns:
        loss.backward()
    gradients = {f"d {name}": leaves[name].grad for name in learns}
    return {"logps": logps.detach(), "entropy": entropies.detach(), **gradients}


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


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 9), st.integers(1, 40), st.integers(1, 900), st.sampled_from([None, 0, 0.3, 0.7]), st.booleans(),
    st.sets(st.sampled_from(["hidden", "weight", "bias"])), st.integers(0, 2**31),
)  # fmt: skip
def test_neither_path_nor_chunk_nor_budget_changes_values_or_gradients(
    n: int, v: int, chunk: int, share: float | None, entropy: bool, learns: set[str], seed: int
) -> None:
    hidden, weight, bias, targets = inputs(n, 5, v, seed=seed)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    budget = budget_of(share, hidden, weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PLAN, "CHUNK", {"cpu": {1: chunk, 3: chunk, 4: chunk}})
        patch.setattr(PLAN, "MULTIPLE", 1)
        got = results(
            lambda hidden, weight, bias: linear_logps(
                hidden, weight, targets, bias, 3.0, 1.2, 0.8, entropy=True, memory_budget=budget
            ),
            leaves,
            tuple(sorted(learns)),
            entropy,
        )
    want = results(
        lambda hidden, weight, bias: reference(hidden, weight, bias, targets, 3.0, 1.2, 0.8),
        leaves,
        tuple(sorted(learns)),
        entropy,
    )
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-10, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("name", PATHS)
def test_the_plan_tells_the_work_and_the_memory_of_every_path(name: str, small_chunks: None) -> None:
    path, learns, share = PATHS[name]
    hidden, weight, bias, targets = inputs(60, 16, 320, torch.float32)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    budget = budget_of(share, hidden, weight)
    plan = linear_logps.plan(60, 16, 320, torch.float32, *(x in learns for x in leaves), "cpu", budget)
    assert plan.path == path
    sizes = []
    honest = MODULE._logits
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(MODULE, "_logits", lambda *rest: sizes.append(honest(*rest).numel()) or honest(*rest))
        results(
            lambda hidden, weight, bias: linear_logps(
                hidden, weight, targets, bias, entropy=True, memory_budget=budget
            ),
            leaves,
            learns,
            entropy=False,
        )
    made_for_the_test = sum(2 * 16 * n for n in sizes)
    assert counter.get_total_flops() - made_for_the_test == pytest.approx(plan.flop_g * 2 * 60 * 16 * 320)
    by_hand = {"frozen head": 2, "kept": 3, "again": 4, "some kept": 4 - plan.kept / 320, "no gradient": 1}
    assert plan.flop_g == pytest.approx(by_hand[name])
    chunk = plan.chunk * (320 if path == 1 else 60)
    assert max(sizes) == (60 * max(plan.kept, plan.chunk) if path != 1 else chunk)
    besides = {1: 4 * 60 * 16, 3: 4 * 60 * 16}.get(path, 0)
    assert plan.peak_bytes == (60 * 320 * 4 if path == 2 else 4 * chunk + 4 * 60 * plan.kept + besides)
    if name == "some kept":
        assert 0 < 60 * plan.kept * 4 <= 0.5 * 60 * 320 * 4


def test_without_autograd_the_path_is_the_one_that_keeps_nothing() -> None:
    hidden, weight, _, targets = inputs(4, 3, 5)
    with torch.no_grad():
        assert linear_logps(hidden.requires_grad_(), weight, targets).grad_fn is None


@pytest.mark.parametrize(("vocabulary", "n_tokens"), [(128256, 8192), (128256, 16384), (151936, 8192), (32000, 4096)])
def test_at_real_sizes_only_kept_logits_take_more_than_a_gib(vocabulary: int, n_tokens: int) -> None:
    sizes = (n_tokens, 4096, vocabulary, torch.bfloat16)
    for learns, budget in ((False, None), (True, 0)):
        plan = linear_logps.plan(*sizes, weight_grad=learns, memory_budget=budget)
        assert plan.path == (3 if learns else 1)
        assert plan.peak_bytes < 1 << 30
    assert linear_logps.plan(*sizes, hidden_grad=False).peak_bytes < 1 << 30
    assert linear_logps.plan(*sizes, weight_grad=True, memory_budget=1 << 40).path == 2


@pytest.mark.parametrize("share", [None, 0.5])
def test_a_second_walk_over_the_same_graph_gives_the_same_gradient(share: float | None, small_chunks: None) -> None:
    hidden, weight, _, targets = inputs(40, 8, 100, torch.float32)
    weight.requires_grad_()
    loss = linear_logps(hidden, weight, targets, memory_budget=budget_of(share, hidden, weight)).sum()
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    weight.grad = None
    loss.backward()
    torch.testing.assert_close(weight.grad, first, rtol=1e-5, atol=1e-6)
    assert float(first.abs().max()) > 0.1


@pytest.mark.parametrize(("bias", "softcap", "scale", "temperature"), HEADS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("share", [None, 0.5, 0])
def test_the_gradient_is_that_of_finite_differences(
    entropy: bool, share: float | None, bias: bool, softcap: float | None, scale: float, temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ROWS, "BLOCK_ELEMENTS", 12)
    monkeypatch.setattr(PLAN, "CHUNK", {"cpu": dict.fromkeys((1, 3, 4), 64)})
    monkeypatch.setattr(PLAN, "MULTIPLE", 1)
    hidden, weight, b, targets = inputs(4, 3, 5)
    budget = budget_of(share, hidden, weight)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), *([b.requires_grad_()] if bias else [])]

    def function(h: Tensor, w: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        options = (*(rest or (None,)), softcap, scale, temperature, entropy)
        return linear_logps(h, w, targets, *options, memory_budget=budget)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("entropy", [False, True])
def test_with_the_head_frozen_the_gradient_is_that_of_finite_differences(
    entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PLAN, "CHUNK", {"cpu": dict.fromkeys((1, 3, 4), 64)})
    monkeypatch.setattr(PLAN, "MULTIPLE", 1)
    hidden, weight, bias, targets = inputs(4, 3, 5)
    function = lambda h: linear_logps(h, weight, targets, bias, 2.0, 1.5, 0.8, entropy)  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(),))
    if entropy:
        assert torch.autograd.gradcheck(lambda h: function(h)[1], (hidden,))


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


def errors_stay_within_twice_eagers(
    name: str, n: int, h: int, v: int, dtype: torch.dtype, softcap: float | None, device: torch.device, seeds: int
) -> None:
    path, learns, share = PATHS[name]
    found: dict[str, list[list[Tensor]]] = {}
    for seed in range(seeds):
        hidden, weight, bias, targets = (x.to(device) for x in inputs(n, h, v, dtype, seed))
        leaves = {"hidden": hidden, "weight": weight, "bias": bias}
        budget = budget_of(share, hidden, weight)
        assert linear_logps.plan(n, h, v, dtype, *(x in learns for x in leaves), "cpu", budget).path == path

        def plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return reference(hidden, weight, bias, targets, softcap, 1.2, 0.9)  # noqa: B023

        def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return linear_logps(hidden, weight, targets, bias, softcap, 1.2, 0.9, entropy=True, memory_budget=budget)  # noqa: B023

        # with a frozen head the two gradients are made in different places
        for entropy in (True, False) if path == 1 else (True,):
            exact = results(plain, {k: x.double() for k, x in leaves.items()}, learns, entropy)
            eager, got = results(plain, leaves, learns, entropy), results(ours, leaves, learns, entropy)
            assert [x.dtype for x in got.values()] == [torch.float32] * 2 + [dtype] * len(learns)
            for key, truth in exact.items():
                errors = [got[key] - truth, eager[key] - truth, truth]
                found.setdefault(f"{key}, entropy {entropy}", []).append(errors)
    tiny = torch.finfo(torch.float32).eps
    for key, parts in found.items():
        mine, theirs, truth = (rms(torch.cat([p[i].flatten() for p in parts])) for i in range(3))
        assert mine <= 2 * theirs + tiny * truth, key


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("n", "h", "v"), [(1, 96, 301), (63, 96, 301), (341, 64, 129)])
def test_the_error_in_low_precision_is_at_most_twice_that_of_eager_pytorch(
    n: int, h: int, v: int, softcap: float | None, dtype: torch.dtype, name: str, small_chunks: None
) -> None:
    seeds = 24 if n == 1 else 2  # one token alone may be right by luck
    errors_stay_within_twice_eagers(name, n, h, v, dtype, softcap, torch.device("cpu"), seeds)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("n", "h", "v", "dtype", "softcap"),
    [
        (1, 96, 301, torch.float32, 5.0),
        (63, 96, 301, torch.bfloat16, None),
        (35, 96, 301, torch.float16, 5.0),
        (150, 48, 61, torch.float16, None),
        (21, 96, 301, torch.float32, None),
    ],
)
def test_the_kernels_err_at_most_twice_as_much_as_eager_pytorch(
    n: int, h: int, v: int, dtype: torch.dtype, softcap: float | None, name: str, device: torch.device,
    small_chunks: None, triton_path: None, poisoned: None,
) -> None:  # fmt: skip
    errors_stay_within_twice_eagers(name, n, h, v, dtype, softcap, device, 10 if n == 1 else 1)


@pytest.mark.parametrize(("h", "softcap"), [(96, None), (64, 5.0), (80, None)])
def test_the_fused_product_errs_at_most_twice_as_much_as_eager_pytorch(
    h: int, softcap: float | None, device: torch.device, triton_path: None, poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls = []
    honest = MODULE.fold_product
    monkeypatch.setattr(MODULE, "fold_product", lambda *given_: calls.append(honest(*given_)))
    monkeypatch.setattr(LSE, "PROGRAMS", 3)  # two or three parts of several tiles each
    for n in (1, 63, 130):
        errors_stay_within_twice_eagers("no gradient", n, h, 777, torch.float16, softcap, device, 10 if n == 1 else 1)
    assert len(calls) == 10 + 1 + 1


def test_the_fused_product_is_left_out_where_it_would_not_pay_or_not_fit(
    device: torch.device, triton_path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = torch.empty(8, 96, dtype=torch.float16, device=device)
    assert LSE.fuses(like, like)
    for hidden, weight in (
        (like.float(), like.float()), (like[:, :17], like[:, :17]), (like.new_empty(8, 97)[:, :96], like),
        (like, like.new_empty(8, 97)[:, :96]), (like[:0], like),
    ):  # fmt: skip
        assert not LSE.fuses(hidden, weight)
    monkeypatch.setattr(LSE, "LARGEST_HIDDEN", 95)
    assert not LSE.fuses(like, like)


@pytest.mark.parametrize("learns", [(), ("hidden",), ("hidden", "weight", "bias")])
def test_autocast_is_the_same_as_inputs_in_that_type(learns: tuple[str, ...]) -> None:
    hidden, weight, bias, targets = inputs(20, 16, 50, torch.float32)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    ours = lambda hidden, weight, bias: linear_logps(hidden, weight, targets, bias, entropy=True)  # noqa: E731
    low = results(ours, {k: x.bfloat16() for k, x in leaves.items()}, learns)
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(ours, leaves, learns)
        exact = linear_logps(hidden.double(), weight.double(), targets, bias.double())
    for key in low:
        assert torch.equal(low[key].float(), cast[key].float()), key
    torch.testing.assert_close(
        exact, reference(hidden.double(), weight.double(), bias.double(), targets, None, 1, 1)[0]
    )


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
    with pytest.raises(ValueError, match=r"expected hidden \[N, H\] and weight \[V, H\], got \[3, 4\] and \[7, 5\]"):
        linear_logps(torch.zeros(3, 4), torch.zeros(7, 5), targets)
    with pytest.raises(ValueError, match=r"got \[1, 3, 4\] and \[7, 4\]"):
        linear_logps(torch.zeros(1, 3, 4), torch.zeros(7, 4), targets)
    with pytest.raises(ValueError, match=r"expected one target per row of hidden, got \[3\] for \[2, 4\]"):
        linear_logps(torch.zeros(2, 4), torch.zeros(7, 4), targets)
    with pytest.raises(ValueError, match=r"temperature must be above 0, got 0"):
        linear_logps(torch.zeros(3, 4), torch.zeros(7, 4), targets, temperature=0)
    with pytest.raises(ValueError, match=r"expected a bias of \[7\], got \[6\]"):
        linear_logps(torch.zeros(3, 4), torch.zeros(7, 4), targets, torch.zeros(6))
    with pytest.raises(ValueError, match=r"softcap must be above 0 or None, got 0"):
        linear_logps(torch.zeros(3, 4), torch.zeros(7, 4), targets, softcap=0)
    with pytest.raises(ValueError, match=r"differ in type: torch.float32, torch.bfloat16"):
        linear_logps(torch.zeros(3, 4), torch.zeros(7, 4, dtype=torch.bfloat16), targets)


@pytest.mark.parametrize("wrong", [-100, 7])
def test_a_target_outside_the_vocabulary_is_refused(wrong: int) -> None:
    targets = torch.tensor([0, wrong, 1])
    with pytest.raises(ValueError, match=rf"targets must be 0 to 6, got {min(wrong, 0)} to {max(wrong, 1)}"):
        linear_logps(torch.zeros(3, 4), torch.zeros(7, 4), targets)


@pytest.mark.parametrize("budget", [-1, math.inf, math.nan])
def test_a_budget_that_is_none_is_refused_and_a_float_is_not(budget: float) -> None:
    hidden, weight, _, targets = inputs(6, 4, 300, torch.float32)
    weight.requires_grad_()
    with pytest.raises(ValueError, match="memory_budget must be in bytes, 0 or more"):
        linear_logps(hidden, weight, targets, memory_budget=budget)
    linear_logps(hidden, weight, targets, memory_budget=4e3).sum().backward()


def test_a_budget_just_short_of_the_logits_keeps_nearly_all_of_them() -> None:
    sizes = (1024, 2048, 128000, torch.bfloat16)
    whole = linear_logps.plan(*sizes, weight_grad=True, memory_budget=1024 * 128000 * 2)
    short = linear_logps.plan(*sizes, weight_grad=True, memory_budget=1024 * 128000 * 2 - 1)
    assert (whole.path, short.path) == (2, 3)
    assert short.kept == 128000 - PLAN.MULTIPLE
    assert short.flop_g < 3.01
    none = linear_logps.plan(*sizes, weight_grad=True, memory_budget=0)
    assert none.chunk * 1024 * 2 <= whole.peak_bytes / 3.9


@pytest.mark.parametrize("share", [None, 0])
def test_targets_changed_before_the_backward_are_noticed(share: float | None) -> None:
    hidden, weight, _, targets = inputs(6, 4, 9, torch.float32)
    for leaf in (hidden.clone().requires_grad_(), weight.clone().requires_grad_()):
        given_ = targets.clone()
        pair = (leaf, weight) if leaf.shape == hidden.shape else (hidden, leaf)
        loss = linear_logps(*pair, given_, memory_budget=share).sum()
        given_.zero_()
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()


def test_with_the_head_frozen_one_tensor_of_hiddens_size_waits_for_the_backward() -> None:
    hidden, weight, _, targets = inputs(6, 4, 9, torch.float32)
    for entropy, others in ((False, 0), (True, 2)):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            linear_logps(hidden.requires_grad_(), weight, targets, entropy=entropy)
        assert len(kept) == 2 + others  # the gradient and the targets


def test_types_and_numbers_that_make_no_sense_are_named() -> None:
    hidden, weight, _, targets = inputs(3, 4, 7, torch.float32)
    with pytest.raises(ValueError, match=r"expected float32, .* got torch.int64"):
        linear_logps(hidden.long(), weight.long(), targets)
    with pytest.raises(ValueError, match=r"expected targets of int64 \(or int32\), got torch.float32"):
        linear_logps(hidden, weight, targets.float())
    with pytest.raises(ValueError, match=r"weight is on 'meta', but hidden is on 'cpu'"):
        linear_logps(hidden, weight.to("meta"), targets)
    with pytest.raises(ValueError, match=r"must be numbers, which get no gradient; got a tensor"):
        linear_logps(hidden, weight, targets, temperature=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"scale must be finite, got nan"):
        linear_logps(hidden, weight, targets, scale=math.nan)
    with pytest.raises(ValueError, match=r"sizes must be 0 or more, .* got -5 tokens"):
        linear_logps.plan(-5, 4, 7, torch.float32)
    torch.testing.assert_close(linear_logps(hidden, weight, targets.int()), linear_logps(hidden, weight, targets))


def test_a_backward_inside_autocast_is_as_exact_as_outside() -> None:
    hidden, weight, _, targets = inputs(40, 64, 90, torch.float32)
    found = []
    for cast in (False, True):
        leaf = hidden.clone().requires_grad_()
        loss = linear_logps(leaf, weight.clone().requires_grad_(), targets, memory_budget=0).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss.backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_the_function_is_copied_as_a_function_and_says_its_name() -> None:
    assert linear_logps.__reduce__() == linear_logps.__name__ == "linear_logps"
    assert copy.deepcopy(linear_logps) is linear_logps
    assert repr(linear_logps) == "<function linear_logps>"
