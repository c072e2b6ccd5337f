"""A sharded module in one process: the data types in which weights are gathered, and what waits for the backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from zoo import CPU, examples, fresh

from alignkit.models.packing import batch_of
from alignkit.models.scoring import Scorer
from alignkit.models.sharding import casts, ready, shard
from alignkit.types import Layout


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def error(got: Tensor, exact: Tensor) -> float:
    """The norm of the difference, as a part of the exact one's."""
    return float((got - exact).norm() / exact.norm())


def learned(scorer: Scorer, products: torch.dtype | None = torch.bfloat16) -> tuple[Tensor, dict[str, Tensor], int]:
    """Log-probabilities, gradients, and the bytes of 16-bit weights that wait for the backward."""
    shapes = {tuple(p.shape) for p in scorer.parameters() if p.ndim == 2}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        if t.dtype == torch.bfloat16 and {tuple(t.shape), tuple(t.shape)[::-1]} & shapes:
            kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    batch = batch_of(examples(), Layout("forest", 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", products, enabled=products is not None, cache_enabled=False):
            logps = scorer(batch.rows, batch.targets).logps
        waiting = sum(storage.nbytes() for storage in kept.values())  # FSDP2 frees what it gathered
        logps.sum().backward()
    grads = {n: p.grad for n, p in scorer.named_parameters() if p.grad is not None}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    return logps.detach(), whole, waiting


def test_blocks_are_gathered_in_the_data_type_of_products_and_what_is_outside_as_it_is(mesh: DeviceMesh) -> None:
    plain, sharded = Scorer(fresh("llama")), Scorer(fresh("llama"))
    shard(sharded, mesh, torch.bfloat16)
    ready(sharded, CPU)
    model, seen = sharded.model.model, {}
    of_blocks = ("layers.0.mlp.up_proj", "layers.1.self_attn.q_proj", "layers.1.input_layernorm")
    for name in (*of_blocks, "norm", "embed_tokens"):
        part = model.get_submodule(name)
        part.register_forward_pre_hook(lambda m, _, name=name: seen.update({name: m.weight.dtype}))
    logps, grads, kept = learned(sharded)
    assert seen == dict.fromkeys(of_blocks, torch.bfloat16) | dict.fromkeys(("norm", "embed_tokens"), torch.float32)
    assert {p.dtype for p in sharded.parameters()} == {torch.float32}  # what the optimiser moves
    other, others, copies = learned(plain)
    matrices = sum(p.numel() for n, p in plain.named_parameters() if ".layers." in n and p.ndim == 2)
    assert copies - kept == 2 * matrices  # autocast's, of every matrix of every block
    exact, exacts, _ = learned(Scorer(fresh("llama")), None)
    assert error(logps, exact) < 1.5 * error(other, exact)
    assert grads.keys() == exacts.keys()
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert error(grad, exacts[name]) < 1.5 * error(others[name], exacts[name]), name


def test_without_it_all_weights_are_gathered_as_they_are(mesh: DeviceMesh) -> None:
    plain, sharded = Scorer(fresh("llama")), Scorer(fresh("llama"))
    shard(sharded, mesh)
    ready(sharded, CPU)
    batch = batch_of(examples(), Layout("forest", 64))
    torch.testing.assert_close(
        sharded(batch.rows, batch.targets).logps, plain(batch.rows, batch.targets).logps, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", ["gpt 2", "llama", "mixtral", "phi, a bias on its head"])
@pytest.mark.parametrize("mixed", [torch.bfloat16, None])
def test_every_kind_of_block_is_scored_and_learned(name: str, mixed: torch.dtype | None, mesh: DeviceMesh) -> None:
    """Also norms that torch cannot compute in two data types on a CPU, and routers."""
    sharded = Scorer(fresh(name))
    assert casts(sharded, "cpu") is (name == "llama")
    shard(sharded, mesh, mixed)
    ready(sharded, CPU)
    (logps, grads, _), (want, wanted, _) = learned(sharded, mixed), learned(Scorer(fresh(name)), mixed)
    tolerance = 0.05 if name == "llama" and mixed else 1e-5
    assert error(logps, want) < tolerance
    assert all(error(grads[n], wanted[n]) < 20 * tolerance for n in wanted)


def test_on_a_gpu_layer_norms_are_gathered_in_16_bits_too() -> None:
    assert casts(Scorer(fresh("phi, a bias on its head")), "cuda")
    assert not casts(Scorer(fresh("mixtral")), "cuda")
