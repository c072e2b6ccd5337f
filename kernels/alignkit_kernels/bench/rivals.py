"""Other implementations, each optional: an adapter for a case, or the reason why it does not take part."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alignkit_kernels.bench.cases import VECTORS, Case, Contender, Inputs
from alignkit_kernels.bench.contenders import BETA, eager

TRL_CHUNK = 32768  # of the vocabulary, as its trainers pass it
APPROXIMATE = frozenset({"cut-cross-entropy"})  # drops small gradients: shown, without a bar


class Refused(Exception):
    """A rival does not take part; the message is the reason."""


def rivals(case: Case, uncompiled: str | None = None) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the adapters by name, and the reasons of the rivals that do not take part.

    uncompiled: the reason of torch.compile, None when it takes part.
    """
    found: dict[str, Contender] = {}
    reasons: dict[str, str] = {}
    adapters = _ADAPTERS["path" if case.path else case.name] if case.path or case.name in _ADAPTERS else {}
    for name, adapter in {"torch.compile": _compiled(uncompiled), **adapters}.items():
        try:
            found[name] = adapter(case)
        except Refused as reason:
            reasons[name] = str(reason)
    return found, reasons


def need(module: str, name: str) -> Any:
    """Import a rival's function. Raises Refused when it is not installed or broken."""
    package = module.split(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        missing = error.name or package
        raise Refused("not installed" if missing == package else f"needs '{missing}', not installed") from error
    except Exception as error:  # the import of a third-party module may fail in any way
        raise Refused(f"cannot be imported: {type(error).__name__}: {error}".split("\n")[0]) from error


def _compiled(uncompiled: str | None) -> Callable[[Case], Contender]:
    def adapter(case: Case) -> Contender:
        if case.name in VECTORS:
            raise Refused("left out of the ragged operations: compiling takes longer than the rest of them")
        if uncompiled:
            raise Refused(uncompiled)
        torch.compiler.reset()  # each shape gets its own static graph, the fastest
        made: Contender = torch.compile(eager(case), dynamic=False)
        return made

    return adapter


def _trl_chunked(case: Case) -> Contender:
    function = need("trl.kernels", "ChunkedLogProbFunction")

    def contender(x: Inputs) -> Tensor:
        out: Tensor = function.apply(x["hidden"], x["weight"], None, x["targets"], 1.0, TRL_CHUNK, None, 1.0, ())[0]
        return out

    return contender


def _trl_selective(case: Case) -> Contender:
    function = need("trl.trainer.utils", "selective_log_softmax")
    if case.device.type == "cpu" and case.dtype != torch.float32:
        raise Refused("processes rows one by one in low precision on a CPU")
    return lambda x: function(x["logits"], x["targets"])


def _liger_scaled(case: Case) -> Contender:
    function = need("liger_kernel.ops.fused_linear_scaled_cross_entropy", "LigerFusedLinearScaledCrossEntropyFunction")
    return lambda x: -function.apply(x["hidden"], x["weight"], x["targets"], 1.0, -100, 1, False)


def _liger_dpo(case: Case) -> Contender:
    cls = need("liger_kernel.chunked_loss", "LigerFusedLinearDPOLoss")
    loss = cls(beta=BETA, compiled=case.device.type == "cuda")
    s, t = case.sizes["S"], case.sizes["T"]

    def contender(x: Inputs) -> Tensor:
        hidden, reference = (x[k].view(s, t, -1) for k in ("hidden", "reference"))
        out: Tensor = loss(x["weight"], hidden, x["targets"].view(s, t), None, reference, x["weight"])[0]
        return out

    return contender


def _cut(case: Case) -> Contender:
    function = need("cut_cross_entropy", "linear_cross_entropy")
    if case.device.type == "cpu":
        raise Refused("needs a GPU")
    return lambda x: -function(x["hidden"], x["weight"], x["targets"], reduction="none")


_ADAPTERS: dict[str, dict[str, Callable[[Case], Contender]]] = {
    "path": {"trl": _trl_chunked, "liger": _liger_scaled, "cut-cross-entropy": _cut},
    "linear_dpo": {"liger": _liger_dpo},
    "selective_logps": {"trl": _trl_selective},
}
