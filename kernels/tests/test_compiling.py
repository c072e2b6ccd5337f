"""Every kernel compiles for GPUs that are not here, without spilling; none is forgotten; and spills would be seen."""

from __future__ import annotations

import ast
import fcntl
import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import alignkit_kernels

HERE = Path(__file__).parent
PACKAGE = Path(alignkit_kernels.__file__).parent


def _import_compiling() -> Any:
    sys.path.insert(0, str(HERE))
    try:
        return importlib.import_module("compiling")
    finally:
        sys.path.remove(str(HERE))


compiling = _import_compiling()
CASES = compiling.cases()
EACH = [(case, target) for case in CASES for target in case.targets]


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # the tests' interpreter turns kernels into something that cannot be compiled
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), str(HERE), env.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *map(str, arguments)], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    pytest.importorskip("triton")
    # xdist's workers share the folder above their own: the first one compiles, on all cores, and the others wait
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    file = folder / "compiled.json"
    with (folder / "compiled.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            done = python(HERE / "compiling.py", "--json", file)
            assert file.exists(), done.stderr[-3000:]
    return {(r["case"], r["target"]): r for r in json.loads(file.read_text())}


@pytest.mark.parametrize(("case", "target"), EACH, ids=[f"{case.name}-{target}" for case, target in EACH])
def test_a_kernel_compiles_and_keeps_everything_in_registers(case: Any, target: str, results: dict) -> None:
    result = results[case.name, target]
    assert not result["error"], result["error"]
    assert result["registers"] > 0
    assert result["spills"] == 0


def launched_kernels() -> Iterator[str]:
    """The functions under @jit that are called like `kernel[grid](...)`, or are named `..._kernel`."""
    for file in sorted(PACKAGE.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        launched = {
            n.func.value.id
            for n in nodes
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript) and isinstance(n.func.value, ast.Name)
        }
        module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        for n in nodes:
            if not isinstance(n, ast.FunctionDef) or not any("jit" in ast.unparse(d) for d in n.decorator_list):
                continue
            if n.name in launched or n.name.endswith("_kernel"):
                yield f"{module}:{n.name}"


def test_no_kernel_is_forgotten() -> None:
    kernels = set(launched_kernels())
    assert "sequence_sum:_sequence_sum_kernel" in kernels
    assert kernels - {case.kernel for case in CASES} == set(), "add a Case to compiling.py"
    assert {case.kernel for case in CASES} - kernels == set(), "no such kernel any more"


def test_the_names_of_the_cases_tell_them_apart() -> None:
    each = Counter((case.name, target) for case, target in EACH)
    assert [name for name, count in each.items() if count > 1] == []


SPILLING = """
import triton
import triton.language as tl
from compiling import Case, measure

@triton.jit
def kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x / tl.sum(x))  # all of x is held until its sum is known

case = Case("greedy", "-", {"x_ptr": "*fp32", "out_ptr": "*fp32"}, {"BLOCK": 16384}, num_warps=4)
tight = {"sm_80": {"maxnreg": 32}, "sm_90": {"maxnreg": 32}, "sm_100": {"maxnreg": 32}, "gfx942": {"waves_per_eu": 8}}
for target, options in tight.items():
    print(target, measure(case, kernel, target).spills, measure(case, kernel, target, **options).spills)
"""


def test_spills_are_seen_where_there_are_too_few_registers(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING)
    done = python(script)
    assert done.returncode == 0, done.stderr[-3000:]
    spills = {target: (int(a), int(b)) for target, a, b in map(str.split, done.stdout.splitlines())}
    assert spills.keys() == compiling.TARGETS.keys()
    assert all(with_room == 0 and without > 0 for with_room, without in spills.values()), spills


@pytest.mark.parametrize(("name", "why"), [("_gone_kernel", "AttributeError"), ("BLOCK", "AttributeError")])
def test_a_kernel_that_does_not_compile_is_an_error_in_its_row(name: str, why: str) -> None:
    assert why in compiling.compile_case(compiling.Case("gone", f"sequence_sum:{name}", {}), "sm_90").error


@pytest.mark.parametrize(("more", "code"), [({}, 0), ({"spills": 4}, 1), ({"error": "PTXASError: no"}, 1)])
def test_a_spill_and_an_error_make_the_command_fail(
    more: dict, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["compiling.py"])
    monkeypatch.setattr(compiling, "compile_all", lambda *_: [compiling.Result("a", "sm_90", 32, **more)])
    assert compiling.main() == code
    assert "a " in capsys.readouterr().out


def test_kernels_for_the_interpreter_are_refused() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, HERE / "compiling.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unset it" in done.stderr
