"""The cases: operations, shapes, inputs, and floors in FLOP and bytes.

Shape letters: N tokens, H hidden size, V vocabulary, C completion tokens, S completions of T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Contender = Callable[[Inputs], Tensor | tuple[Tensor, ...]]
Shape = tuple[int, int, int]  # N, H, V

GPU_SHAPES: tuple[Shape, ...] = (
    (8192, 2048, 128256),
    (16384, 4096, 128256),
    (8192, 1024, 151936),
    (4096, 4096, 32000),
)
CPU_SHAPES: tuple[Shape, ...] = ((2048, 512, 32000),)
QUICK_SHAPES: tuple[Shape, ...] = ((96, 32, 500),)
Sweep = tuple[tuple[int, ...], int, tuple[int, ...]]  # N, H, V
GPU_SWEEP: Sweep = ((2048, 4096, 8192, 16384, 32768), 2048, (16384, 32768, 65536, 131072, 262144))
CPU_SWEEP: Sweep = ((256, 512, 1024, 2048), 256, (4000, 8000, 16000, 32000))
QUICK_SWEEP: Sweep = ((32, 64), 16, (200, 400))

PATH_PRODUCTS = {1: 2, 2: 3, 3: 4, 4: 1}  # products of the head, 2 N H V FLOP each
VECTORS = {"sequence_sum": 2, "preference_loss": 3, "policy_loss": 5, "gae": 4}  # of C float32, read or written
WANTED = {
    "path1": ("hidden",),
    "path2": ("hidden", "weight"),
    "path3": ("hidden", "weight"),
    "linear_dpo": ("hidden",),
    "selective_logps": ("logits",),
    "sequence_sum": ("values",),
    "preference_loss": ("logps",),
    "policy_loss": ("logps",),
}
PATHS = ("path1", "path2", "path3", "path4")
FOREMOST = (*PATHS, "selective_logps")
NAMES = (*FOREMOST, "linear_dpo", *VECTORS)
SPREAD = 3.0  # standard deviation of the logits, as in models: with 1 nearly all of them would be negligible


@dataclass(frozen=True)
class Case:
    """An operation on a shape. `wanted` names the inputs that get a gradient; without any, no graph is kept."""

    name: str
    sizes: dict[str, int]
    dtype: torch.dtype
    device: torch.device
    wanted: tuple[str, ...]
    flop: float = 0.0
    bytes: float = 0.0

    @property
    def path(self) -> int | None:
        """The path of linear_logps, 1 to 4."""
        return int(self.name[4:]) if self.name in PATHS else None

    @property
    def label(self) -> str:
        """The case and its sizes in a few words."""
        return f"{self.name} {' '.join(f'{k}{v}' for k, v in self.sizes.items())} {str(self.dtype)[6:]}"


def build(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Return the case of that name; an operation uses those of N, H and V that it has."""
    n, h, v = shape
    wanted = WANTED.get(name, ())
    product = 2.0 * n * h * v
    if name in PATHS:
        flop = PATH_PRODUCTS[int(name[4:])] * product
        return Case(name, {"N": n, "H": h, "V": v}, dtype, device, wanted, flop=flop)
    if name == "linear_dpo":
        s = max(2, min(16, n // 32 * 2))
        # a policy with a frozen head, and a reference without gradient
        return Case(name, {"S": s, "T": n // s, "H": h, "V": v}, dtype, device, wanted, flop=3 * product)
    if name == "selective_logps":
        # forward reads the logits; backward reads them and writes their gradient
        return Case(name, {"N": n, "V": v}, dtype, device, wanted, bytes=3.0 * n * v * dtype.itemsize)
    s, longest = (2048, 1023) if device.type == "cuda" else (64, 255) if n >= 256 else (6, 15)
    c = int(_lengths(s, longest).sum())
    sizes = {"C": c, "S": s, "longest": longest}
    return Case(name, sizes, torch.float32, device, wanted, bytes=4.0 * VECTORS[name] * c)


def make(case: Case, seed: int) -> Inputs:
    """Draw the inputs of a case; those of the four paths are the same for the same seed."""
    g = torch.Generator(case.device).manual_seed(seed)
    z = case.sizes

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=g, device=case.device, dtype=torch.float32).to(dtype)

    if case.name in PATHS or case.name == "linear_dpo":
        n = z["N"] if case.path else z["S"] * z["T"]
        inputs = {
            "hidden": normal(n, z["H"], dtype=case.dtype),
            "weight": (normal(z["V"], z["H"]) * (SPREAD / z["H"] ** 0.5)).to(case.dtype),
            "targets": torch.randint(z["V"], (n,), generator=g, device=case.device),
            "upstream": normal(n),
        }
        if not case.path:
            inputs["reference"] = (inputs["hidden"] + 0.1 * normal(n, z["H"])).to(case.dtype)
            inputs["cu_seqlens"] = torch.arange(0, n + 1, z["T"], device=case.device)
            inputs["upstream"] = torch.ones((), device=case.device)
    elif case.name == "selective_logps":
        inputs = {
            "logits": (normal(z["N"], z["V"]) * SPREAD).to(case.dtype),
            "targets": torch.randint(z["V"], (z["N"],), generator=g, device=case.device),
            "upstream": normal(z["N"]),
        }
    else:
        inputs = _ragged(case, normal)
    for name in case.wanted:
        inputs[name].requires_grad_()
    return inputs


def _lengths(s: int, longest: int) -> Tensor:
    return torch.randint(1, longest + 1, (s,), generator=torch.Generator().manual_seed(s))


def _ragged(case: Case, normal: Callable[..., Tensor]) -> Inputs:
    c, s, longest = case.sizes["C"], case.sizes["S"], case.sizes["longest"]
    lengths = _lengths(s, longest)
    borders = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    # the indices of the eager code are prepared here, so that its time does not include them
    steps = torch.arange(longest)
    inside = steps < lengths[:, None]
    shared = {
        "cu_seqlens": borders,
        "segments": torch.repeat_interleave(torch.arange(s), lengths),
        "grid": (borders[:-1, None] + steps).clamp(max=c - 1),
        "inside": inside,
    }
    inputs = {name: t.to(case.device) for name, t in shared.items()}
    outputs = {"sequence_sum": s, "preference_loss": s // 2, "policy_loss": c, "gae": c}[case.name]
    inputs["upstream"] = normal(outputs)
    if case.name == "sequence_sum":
        return {**inputs, "values": normal(c)}
    if case.name == "gae":
        return {**inputs, "rewards": normal(c), "values": normal(c)}
    logps = -normal(c).abs()
    return {**inputs, "logps": logps, "old": logps + 0.2 * normal(c), "advantages": normal(c)}
