"""What only a GPU can show: large shapes, the same bits twice, no waiting for the device, every type compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from alignkit_kernels import gae, linear_logps, policy_loss, preference_loss, selective_logps, sequence_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
GPU = torch.device("cuda")
LOW = [torch.float32, torch.bfloat16, torch.float16]
# what learns, and the budget for kept logits
PATHS = {
    1: (("hidden",), None),
    2: (("hidden", "weight"), 1 << 40),
    3: (("hidden", "weight"), 0),
    4: ((), None),
}


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Let float32 products be float32 on both sides of a comparison."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def head(n: int, h: int, v: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator(GPU).manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, device=GPU)
    weight = torch.randn(v, h, generator=g, device=GPU) * (2 / math.sqrt(h))
    targets = torch.randint(0, v, (n,), generator=g, device=GPU)
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets}


def by_hand(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    z = hidden @ weight.T
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = (z / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def passes(function: Callable[..., tuple[Tensor, Tensor]], given: dict[str, Tensor], learns: tuple[str, ...]) -> list:
    leaves = {k: t.detach().clone().requires_grad_(k in learns) for k, t in given.items()}
    logps, entropy = function(**leaves)
    if learns:
        upstream = torch.linspace(-1, 1, len(logps), device=GPU, dtype=torch.float64)
        ((logps.double() + 0.3 * entropy.double()) * upstream).sum().backward()
    return [logps.detach(), entropy.detach(), *(leaves[k].grad for k in learns)]


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("n", "h", "v"), [(63, 96, 32003), (341, 1000, 5003), (1030, 256, 50257), (1, 2048, 128256)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_every_path_errs_at_most_twice_as_much_as_eager_pytorch(
    path: int, dtype: torch.dtype, n: int, h: int, v: int, softcap: float | None
) -> None:
    learns, budget = PATHS[path]
    given = head(n, h, v, dtype)

    def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logps(
            hidden, weight, targets, softcap=softcap, temperature=0.8, entropy=True, memory_budget=budget
        )

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return by_hand(hidden, weight, targets, softcap, 0.8)

    assert linear_logps.plan(n, h, v, dtype, "hidden" in learns, "weight" in learns, memory_budget=budget).path == path
    exact = passes(plain, {k: t.double() if t.is_floating_point() else t for k, t in given.items()}, learns)
    tiny = torch.finfo(torch.float32).eps
    for mine, theirs, truth in zip(passes(ours, given, learns), passes(plain, given, learns), exact, strict=True):
        assert rms(mine - truth) <= 2 * rms(theirs - truth) + 4 * tiny * rms(truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_more_than_two_to_the_31_logits_are_addressed_rightly(dtype: torch.dtype) -> None:
    n, v = 17000, 131072
    assert n * v > 1 << 31
    logits = torch.empty(n, v, device=GPU, dtype=dtype).normal_(generator=torch.Generator(GPU).manual_seed(0))
    targets = torch.randint(0, v, (n,), device=GPU)
    last = logits[-3:].double()
    want = last.log_softmax(-1).gather(1, targets[-3:, None]).squeeze(1)
    leaf = logits.requires_grad_()
    logps = selective_logps(leaf.view_as(leaf), targets, overwrite=True)
    torch.testing.assert_close(logps[-3:].double().detach(), want, rtol=0, atol=1e-5)
    logps.sum().backward()
    onehot = torch.nn.functional.one_hot(targets[-3:], v)
    torch.testing.assert_close(leaf.grad[-3:].double(), onehot - last.softmax(-1), rtol=2**-7, atol=1e-7)


def test_more_than_two_to_the_31_logits_of_a_head_are_addressed_rightly() -> None:
    given = head(17000, 64, 131072, torch.bfloat16)
    hidden, weight, targets = given["hidden"].requires_grad_(), given["weight"].requires_grad_(), given["targets"]
    want, _ = by_hand(hidden[-3:].detach().double(), weight.detach().double(), targets[-3:])
    for budget in (1 << 40, 0):
        hidden.grad = None
        logps = linear_logps(hidden, weight, targets, memory_budget=budget)
        torch.testing.assert_close(logps[-3:].double().detach(), want, rtol=0, atol=0.05)
        logps[-3:].sum().backward()
        z = hidden[-3:].detach().double() @ weight.detach().double().T
        dz = torch.nn.functional.one_hot(targets[-3:], len(weight)) - z.softmax(-1)
        expected = dz @ weight.detach().double()
        torch.testing.assert_close(hidden.grad[-3:].double(), expected, rtol=0.02, atol=0.02 * float(expected.std()))
    with torch.no_grad():
        alone = linear_logps(hidden, weight, targets)
    torch.testing.assert_close(alone[-3:].double(), want, rtol=0, atol=0.05)


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(GPU)


def work() -> dict[str, Callable[[], list[Tensor]]]:
    """Every operation, forward and backward, on tensors that are there already, the same at every call."""
    torch.manual_seed(0)
    given = head(341, 256, 5003, torch.bfloat16)
    hidden, weight, targets = given["hidden"], given["weight"], given["targets"]
    frozen = weight.clone()
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = (hidden.detach() @ frozen.T).requires_grad_()
    cu = borders([40, 0, 1, 160, 100, 40])
    logps = (-torch.rand(341, device=GPU)).requires_grad_()
    entropies = torch.rand(341, device=GPU).requires_grad_()
    other, rewards = -torch.rand(341, device=GPU), torch.randn(341, device=GPU)
    desirable, baseline = torch.arange(6, device=GPU) % 2 == 0, torch.full((6,), 0.1, device=GPU)
    leaves = (hidden, weight, logits, logps, entropies)

    def run(function: Callable[[], Tensor]) -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        out = function()
        if out.requires_grad:
            out.sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def no_gradient() -> Tensor:
        with torch.no_grad():
            return linear_logps(hidden, weight, targets)

    functions: dict[str, Callable[[], Tensor]] = {
        "path 1": lambda: linear_logps(hidden, frozen, targets),
        "path 1, entropy": lambda: sum(linear_logps(hidden, frozen, targets, entropy=True)),
        "path 2": lambda: linear_logps(hidden, weight, targets),
        "path 3": lambda: linear_logps(hidden, weight, targets, memory_budget=0),
        "path 4": no_gradient,
        "selective_logps": lambda: selective_logps(logits, targets),
        "sequence_sum": lambda: sequence_sum(logps, cu, mean=True),
        "gae": lambda: gae(rewards, other, cu)[0],
        "policy_loss, token": lambda: (
            policy_loss(
                logps, other, rewards, cu, reference_logps=other, kl_coef=0.1, entropies=entropies, entropy_coef=0.1
            ).losses
        ),
        "policy_loss, sequence": lambda: (
            policy_loss(logps, other, rewards[:6], cu, ratio="sequence", mask=rewards > 0).losses
        ),
        "kto": lambda: preference_loss(logps, other, cu, "kto", desirable=desirable, baseline=baseline).losses,
    }
    for kind in ("sigmoid", "robust", "hinge", "ipo"):
        functions[kind] = lambda kind=kind: preference_loss(logps, other, cu, kind, label_smoothing=0.1).losses
    for kind in ("cpo", "simpo", "orpo"):
        functions[kind] = lambda kind=kind: preference_loss(logps, None, cu, kind).losses
    return {name: lambda f=function: run(f) for name, function in functions.items()}


NAMES = [
    "path 1", "path 1, entropy", "path 2", "path 3", "path 4", "selective_logps", "sequence_sum", "gae",
    "policy_loss, token", "policy_loss, sequence", "kto", "sigmoid", "robust", "hinge", "ipo", "cpo", "simpo", "orpo",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_same_input_gives_the_same_bits(name: str) -> None:
    once = work()[name]
    first, second = once(), once()
    assert len(first) >= 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_no_operation_waits_for_the_device(name: str) -> None:
    once = work()[name]
    once()  # compiling and loading may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_agree_with_plain_pytorch_on_the_same_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    got = work()[name]()
    monkeypatch.setenv("ALIGNKIT_KERNELS", "eager")
    want = work()[name]()
    for a, b in zip(got, want, strict=True):
        spread = float(b.double().abs().max())
        torch.testing.assert_close(a.double(), b.double(), rtol=0.02, atol=0.02 * spread)


def test_kernels_run_on_the_tensors_device_and_not_on_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    logits, targets = torch.randn(5, 9, device="cuda:1"), torch.zeros(5, dtype=torch.int64, device="cuda:1")
    want = logits.log_softmax(-1)[:, 0]
    torch.testing.assert_close(selective_logps(logits, targets), want)
