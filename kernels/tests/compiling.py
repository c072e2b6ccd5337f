"""Compiles every Triton kernel for GPUs that are not here, and counts registers, spills and shared memory.

    python kernels/tests/compiling.py [--only NAME] [--jobs N] [--json FILE]

prints one line a kernel and target, and exits 1 where one does not compile or spills. Needs Triton, and no GPU.
A new kernel is added as a Case to its operation's section below. (Kernels are what they are when they are imported:
this must not run where TRITON_INTERPRET is set.)
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ in ("__main__", "__mp_main__"):  # the command and its workers; tests have a path of their own
    sys.path.insert(0, str(Path(__file__).parents[1]))

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
LOW = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched: `kernel` is "module:name" in alignkit_kernels, `signature` its arguments' types.

    Constexprs are left out of the signature. Pointers are taken as aligned to 16 bytes, as PyTorch's memory is;
    `multiples` names the integers that are usually multiples of 16 (Triton specialises on both, and pipelines only
    then). `targets`: those the case is launched with; leave it out for all.
    """

    name: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    multiples: tuple[str, ...] = ()
    targets: tuple[str, ...] = tuple(TARGETS)


@dataclass(frozen=True)
class Result:
    """registers a thread (vector ones on AMD); spills in bytes a thread (registers on AMD); shared bytes a program."""

    case: str
    target: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    error: str = ""


def each_dtype(name: str, kernel: str, signature: dict[str, str], *args: Any, **more: Any) -> list[Case]:
    """Return the case once for each low precision: "*T" and "T" in the signature stand for it."""
    typed = {t: {k: re.sub(r"\bT\b", t, v) for k, v in signature.items()} for t in LOW}
    return [Case(f"{name} {t}", kernel, typed[t], *args, **more) for t in LOW]


# ---- one section a file of kernels, named like the file; every kernel with the sizes at which it is launched


def sequence_sum() -> list[Case]:
    segments = {"cu_seqlens_ptr": "*i64"}
    return [
        *each_dtype(
            "sequence_sum",
            "sequence_sum:_sequence_sum_kernel",
            {"values_ptr": "*T", **segments, "sums_ptr": "*T"},
            {"MEAN": True, "BLOCK": 1024},
        ),
        *each_dtype(
            "spread",
            "sequence_sum:_spread_kernel",
            {"values_ptr": "*T", "factors_ptr": "*fp64", **segments, "out_ptr": "*T", "stride": "i32"},
            {"SEGMENTS": 2, "MEAN": True, "SCALED": True, "BLOCK": 1024},
        ),
    ]


def gae() -> list[Case]:
    pointers = ("rewards_ptr", "values_ptr", "advantages_ptr", "returns_ptr")
    signature = {**dict.fromkeys(pointers, "*fp32"), "cu_seqlens_ptr": "*i64", "gamma": "fp64", "decay": "fp64"}
    return [Case("gae", "gae:_gae_kernel", signature, {"BLOCK": 1024})]


def policy_loss() -> list[Case]:
    cases = []
    inputs = ("logps", "entropies", "old", "advantages", "reference", "losses", "ratios", "kl", "slopes")
    numbers = ("floor", "ceiling", "kl_coef", "entropy_coef")
    borders = {"cu_seqlens_ptr": "*i64", "mask_ptr": "*u8"}
    forward = {f"{name}_ptr": "*fp32" for name in inputs} | borders | {"clipped_ptr": "*u8"}
    forward |= dict.fromkeys(numbers, "fp64")
    backward = {f"{name}_ptr": "*fp32" for name in ("upstream", "slopes", "g_logps", "g_entropies")} | borders
    backward |= {"upstream_stride": "i32", "entropy_coef": "fp64"}
    for ratio in ("token", "sequence"):
        flags = {"SEQUENCE": ratio == "sequence", "BLOCK": 512}
        slopes = {"kl_slopes_ptr": "*fp32"} if ratio == "sequence" else {}
        nothing = {} if slopes else {"kl_slopes_ptr": None}
        kernel = "policy_loss:_forward_kernel"
        for kl in (1, 2, 3):
            more = {"PER_TOKEN": True, "KL": kl, "LIMIT": 60.0}
            cases.append(Case(f"policy_loss {ratio} k{kl}", kernel, forward | slopes, flags | nothing | more))
        absent = {"entropies_ptr": None, "reference_ptr": None, "mask_ptr": None, "kl_slopes_ptr": None}
        plain = {k: v for k, v in forward.items() if k not in absent}
        more = {"PER_TOKEN": False, "KL": 3, "LIMIT": 60.0}
        cases.append(Case(f"policy_loss {ratio} plain", kernel, plain, flags | absent | more))
        kernel = "policy_loss:_backward_kernel"
        cases.append(Case(f"policy_loss {ratio} backward", kernel, backward | slopes, flags | nothing))
    return cases


def preference_loss() -> list[Case]:
    signature = {
        "policy_ptr": "*T", "reference_ptr": "*T", "cu_seqlens_ptr": "*i64", "desirable_ptr": "*i1",
        "baseline_ptr": "*fp32", "losses_ptr": "*T", "rewards_ptr": "*T", "logps_ptr": "*T", "slopes_ptr": "*fp64",
        **dict.fromkeys(("beta", "label_smoothing", "offset", "weight_desirable", "weight_undesirable"), "fp64"),
    }  # fmt: skip
    found = []
    for kind in ("sigmoid", "robust", "hinge", "cpo", "ipo", "simpo", "orpo", "kto"):
        averaged, free = kind in ("ipo", "simpo", "orpo"), kind in ("cpo", "simpo", "orpo")
        found += each_dtype(
            f"preference_loss {kind}",
            "preference_loss:_preference_loss_kernel",
            signature,
            {"KIND": kind, "MEAN": averaged, "REFERENCE": not free, "EPS": 2.0**-23, "BLOCK": 1024},
        )[:: 1 if kind == "orpo" else len(LOW)]
    return found


def row_stats() -> list[Case]:
    signature = {
        "logits_ptr": "*T", "out_ptr": "*T", "targets_ptr": "*i64",
        **dict.fromkeys(("top_ptr", "total_ptr", "hit_ptr", "moment_ptr", "g_ptr", "g_entropy_ptr"), "*fp32"),
        **dict.fromkeys(("logits_stride", "out_stride", "n_columns", "first"), "i32"),
        **dict.fromkeys(("scale", "softcap", "inverse_temperature"), "fp32"),
    }  # fmt: skip
    no_entropy = {"moment_ptr": None, "g_entropy_ptr": None}
    ways = {
        "fold": {**no_entropy, "g_ptr": None, "SOFTCAP": False, "FOLD": True, "FIRST": False, "GRAD": False},
        "fold capped, entropy": {
            "g_ptr": None, "g_entropy_ptr": None, "SOFTCAP": True, "FOLD": True, "FIRST": False, "GRAD": False,
        },
        "grad": {**no_entropy, "SOFTCAP": False, "FOLD": False, "FIRST": True, "GRAD": True},
        "grad capped, entropy": {"SOFTCAP": True, "FOLD": False, "FIRST": True, "GRAD": True},
        "fold, grad": {**no_entropy, "g_ptr": None, "SOFTCAP": False, "FOLD": True, "FIRST": True, "GRAD": True},
        "fold, grad capped, entropy": {
            "g_ptr": None, "g_entropy_ptr": None, "SOFTCAP": True, "FOLD": True, "FIRST": True, "GRAD": True,
        },
    }  # fmt: skip
    found = []
    for name, constants in ways.items():
        given = {k: v for k, v in signature.items() if k not in constants}
        block, warps = ({"BLOCK": 2048}, 4) if constants["SOFTCAP"] else ({"BLOCK": 4096}, 8)
        found += each_dtype(
            f"rows {name}", "row_stats:_rows_kernel", given, {**constants, **block},
            num_warps=warps, multiples=("logits_stride", "out_stride", "n_columns", "first"),
        )  # fmt: skip
        # a vocabulary such as 50257
        odd = {**constants, **block}
        found += each_dtype(f"rows {name}, odd", "row_stats:_rows_kernel", given, odd, num_warps=warps)
    return found


def linear_lse() -> list[Case]:
    signature = {
        "hidden_ptr": "*T", "weight_ptr": "*T", "bias_ptr": "*T", "targets_ptr": "*i64",
        **dict.fromkeys(("hit_ptr", "top_ptr", "total_ptr", "moment_ptr"), "*fp32"),
        **dict.fromkeys(("N", "V", "H", "hidden_stride", "weight_stride", "tiles"), "i32"),
        **dict.fromkeys(("scale", "softcap", "inverse_temperature"), "fp32"),
    }  # fmt: skip
    before_hopper, others = ("sm_80",), ("sm_90", "sm_100", "gfx942")
    ways = {
        "": {"bias_ptr": None, "moment_ptr": None, "SOFTCAP": False, "WHOLE": True},
        " bias, capped, entropy, ragged": {"SOFTCAP": True, "WHOLE": False},
    }
    found = []
    for name, constants in ways.items():
        given = {k: v for k, v in signature.items() if k not in constants}
        for columns, targets in ((64, before_hopper), (128, others)):
            found += each_dtype(
                f"lse{name}", "linear_lse:_lse_kernel", given,
                {**constants, "ROWS": 128, "COLUMNS": columns, "DEPTH": 64}, num_warps=8, num_stages=3,
                multiples=("N", "V", "H", "hidden_stride", "weight_stride"), targets=targets,
            )[1:]  # fmt: skip
    return found


SECTIONS: dict[str, Callable[[], list[Case]]] = {
    "sequence_sum": sequence_sum,
    "preference_loss": preference_loss,
    "gae": gae,
    "policy_loss": policy_loss,
    "row_stats": row_stats,
    "linear_lse": linear_lse,
}


def cases() -> list[Case]:
    return [case for section in SECTIONS.values() for case in section()]


# ---- compiling and measuring


def compile_case(case: Case, target: str) -> Result:
    """Compile one case for one target; a failure is a Result with an error."""
    try:
        module, _, name = case.kernel.partition(":")
        fn = getattr(importlib.import_module(f"alignkit_kernels.{module}"), name)
        return measure(case, fn, target)
    except Exception as e:  # whatever the compiler raises: the table shall be whole
        return Result(case.name, target, error=f"{type(e).__name__}: {e}"[-2000:])


def measure(case: Case, fn: Any, target: str, **options: Any) -> Result:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given, wanted = {*case.signature, *case.constexprs}, set(fn.arg_names)
    if given != wanted:
        raise ValueError(f"arguments missing: {sorted(wanted - given)}; unknown: {sorted(given - wanted)}")
    signature = {k: case.signature.get(k, "constexpr") for k in fn.arg_names}
    # a Python float is launched as float32 unless the kernel's own annotation says otherwise
    floats = {p.name: p.annotation_type or "fp32" for p in fn.params if signature[p.name] in ("fp32", "fp64")}
    if wrong := {k: v for k, v in floats.items() if signature[k] != v}:
        raise ValueError(f"launched with other types than the case has: {wrong}")
    aligned = {k for k, v in signature.items() if v.startswith("*")} | {*case.multiples}
    attrs = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(fn.arg_names) if k in aligned}
    source = ASTSource(fn=fn, signature=signature, constexprs=case.constexprs, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **options}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    read = amd_usage if TARGETS[target][0] == "hip" else nvidia_usage
    registers, spills = read(compiled.asm)
    return Result(case.name, target, registers, spills, compiled.metadata.shared)


def nvidia_usage(asm: Any) -> tuple[int, int]:
    """Return registers and bytes of stack: ptxas puts spilled registers there, and Triton nothing else."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(asm["cubin"])
        f.flush()
        told = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True)
    found = re.findall(r"REG:(\d+) STACK:(\d+)", told.stdout)
    if not found:
        raise ValueError(f"no registers in what cuobjdump says: {told.stdout}{told.stderr}")
    return max(int(r) for r, _ in found), max(int(s) for _, s in found)


def amd_usage(asm: Any) -> tuple[int, int]:
    """Return vector registers, and spilled vector and scalar registers."""
    counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s*(\d+)", asm["amdgcn"]))
    return int(counts["vgpr_count"]), int(counts["vgpr_spill_count"]) + int(counts["sgpr_spill_count"])


def compile_all(chosen: list[Case], jobs: int) -> list[Result]:
    work = [(case, target) for case in chosen for target in case.targets]
    if jobs == 1:
        return [compile_case(*each) for each in work]
    results = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_case, *each) for each in work]
        for (case, target), future in zip(work, futures, strict=True):
            try:
                results.append(future.result())
            except BrokenProcessPool:
                lost = "not compiled: the compiler has crashed, on this or on one before it; --jobs 1 shows where"
                results.append(Result(case.name, target, error=lost))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--only", default="", help="only the cases whose name or kernel contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    chosen = [case for case in cases() if args.only in case.name or args.only in case.kernel]
    results = compile_all(chosen, args.jobs)
    print(f"{'kernel':40} {'target':8} {'registers':>9} {'spills':>7} {'shared':>7}")
    for r in results:
        print(f"{r.case:40} {r.target:8} {r.registers:9} {r.spills:7} {r.shared:7}  {r.error.strip()}")
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1))
    return int(any(r.error or r.spills for r in results))


if __name__ == "__main__":
    sys.exit(main())
