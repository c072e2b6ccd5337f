"""The engine on a GPU: FlexAttention and the compiled kernels give the CPU's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import alignkit
from alignkit.runs.folder import read_metrics
from helpers import make_rows, write_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.fixture
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama whose heads are wide enough for FlexAttention, with its tokenizer."""
    folder = tmp_path_factory.mktemp("wide")
    write_tiny(folder, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    return str(folder)


def tracks(settings: dict[str, Any], name: str, method: str, **changes: Any) -> tuple[list[float], list[float], Any]:
    more = {"max_steps": 3, "learning_rate": 1e-4, "name": name, "cache_file": settings["output"] / f"{name}.sqlite"}
    result = alignkit.run(method, data=make_rows("pairs", 24), **settings | more | changes)
    lines = [line for line in read_metrics(result.folder) if "loss" in line]
    return [line["loss"] for line in lines], [line["grad_norm"] for line in lines], result


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-3), ("bf16", 5e-2)], ids=["float32", "bfloat16"])
def test_a_dpo_step_with_flex_attention_and_kernels_equals_the_cpus(
    settings: dict[str, Any], lora: dict[str, int] | None, precision: str, allowed: float
) -> None:
    losses, norms, _ = tracks(settings, "cpu", "dpo", lora=lora, precision="fp32")
    got, got_norms, result = tracks(settings, "gpu", "dpo", lora=lora, precision=precision, device="auto")
    assert next(result.model.parameters()).is_cuda
    model = result.model.get_base_model() if hasattr(result.model, "get_base_model") else result.model
    assert model.config._attn_implementation == "flex_attention"
    assert got == pytest.approx(losses, rel=allowed)
    assert got_norms == pytest.approx(norms, rel=4 * allowed)


@pytest.mark.parametrize("method", ["sft", "ipo", "kto", "orpo", "simpo", "cpo"])
def test_every_method_gives_the_cpus_losses(settings: dict[str, Any], method: str) -> None:
    losses, _, _ = tracks(settings, "cpu", method, precision="fp32")
    got, _, _ = tracks(settings, "gpu", method, precision="fp32", device="auto")
    assert got == pytest.approx(losses, rel=1e-3)


def test_the_head_trained_with_and_without_kept_logits_gives_the_same_losses(settings: dict[str, Any]) -> None:
    kept, _, _ = tracks(settings, "kept", "dpo", precision="bf16", device="auto")
    again, _, _ = tracks(settings, "again", "dpo", precision="bf16", device="auto", kept_logits_gib=0)
    assert again == pytest.approx(kept, rel=1e-2)
