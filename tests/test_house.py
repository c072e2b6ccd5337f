"""The rules of the house: budgets of length, nothing that runs strangers' code, public names, docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import alignkit
import alignkit_kernels

ROOT = Path(__file__).resolve().parents[1]
CORE = sorted((ROOT / "alignkit").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "alignkit_kernels").rglob("*.py"))
PLUGINS = sorted(p for ending in ("*.py", "*/*.py") for p in (ROOT / "plugins").glob(f"alignkit-*/alignkit_{ending}"))
SOURCES = [*CORE, *KERNELS, *PLUGINS]

# budgets that are exceeded on purpose: "file" or "file::function" -> (lines allowed, why)
EXCEPTIONS: dict[str, tuple[int, str]] = {
    "alignkit/config.py": (450, "a line for every setting of a run, and the functions that split and read them"),
    "alignkit/method.py": (300, "the contract of a method, which its authors read as one page"),
    "alignkit/types.py": (395, "the batch, its rows, columns and terms are one contract"),
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of a file with its name, its class in front."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    yield inner, child
                yield from walk(child, f"{inner}.")
            else:
                yield from walk(child, prefix)

    return walk(tree_of(path), "")


def allowed(what: str, budget: int) -> int:
    return EXCEPTIONS.get(what, (budget, ""))[0]


# ------------------------------------------------------------------------------------------------------ budgets


def test_there_are_files_to_judge() -> None:
    assert len(CORE) > 20
    assert len(KERNELS) >= 5
    assert len(PLUGINS) >= 7


@pytest.mark.parametrize(
    ("paths", "budget"),
    [(PLUGINS, 150), (KERNELS, 300), (CORE, 250)],
    ids=["plugins", "kernels", "core"],
)
def test_files_keep_to_their_budget_of_lines(paths: list[Path], budget: int) -> None:
    lengths = {name_of(p): len(p.read_text(encoding="utf-8").splitlines()) for p in paths}
    assert {n: length for n, length in lengths.items() if length > allowed(n, budget)} == {}


def test_no_function_is_longer_than_fifty_lines() -> None:
    too_long = {}
    for path in SOURCES:
        for name, node in functions(path):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            length = (node.end_lineno or first) - first + 1
            if length > allowed(f"{name_of(path)}::{name}", 50):
                too_long[f"{name_of(path)}::{name}"] = length
    assert too_long == {}


def test_every_exception_is_still_needed_and_says_why() -> None:
    for what, (_, why) in EXCEPTIONS.items():
        path, _, function = what.partition("::")
        assert why, what
        assert (ROOT / path).is_file(), what
        assert not function or function in dict(functions(ROOT / path)), what


# ----------------------------------------------------------------------------------------------------- security

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    ("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("yaml", "load_all"),
    ("numpy", "load"), ("np", "load"), ("os", "system"), ("os", "popen"),
}  # fmt: skip


def dangers(tree: ast.Module) -> list[str]:
    """What in a file could run code that came with data: line and construct."""
    found = []
    for node in ast.walk(tree):
        what = None
        if isinstance(node, ast.Import):
            what = next((a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES), None)
        elif isinstance(node, ast.ImportFrom):
            module, names = (node.module or "").split(".")[0], {a.name for a in node.names}
            if module in FORBIDDEN_MODULES or any((module, n) in FORBIDDEN_CALLS for n in names):
                what = f"from {node.module} import {', '.join(sorted(names))}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in FORBIDDEN_CALLS:
                what = f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_NAMES:
                what = node.func.id
            given = {k.arg: k.value for k in node.keywords}
            for keyword, bad in (("weights_only", False), ("shell", True), ("allow_pickle", True)):
                value = given.get(keyword)
                if isinstance(value, ast.Constant) and value.value is bad:
                    what = f"{keyword}={bad}"
            loader = given.get("Loader")
            if isinstance(loader, ast.Attribute) and "Safe" not in loader.attr:
                what = f"Loader={loader.attr}"
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            what = node.id
        if what:
            found.append(f"{getattr(node, 'lineno', 0)}: {what}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_unpickles_evaluates_or_loads_unsafely(path: Path) -> None:
    assert dangers(tree_of(path)) == []


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle", "import dill as d", "from pickle import loads", "from torch import load", "eval('1')",
        "exec('1')", "f = eval", "torch.load(p)", "yaml.load(t)", "yaml.load(t, Loader=yaml.Loader)",
        "read = torch.load", "load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "__import__('os')",
        "def f():\n    from cloudpickle import loads", "subprocess.run(c, shell=True)", "os.system(c)",
    ],
)  # fmt: skip
def test_the_search_for_dangers_finds_them(bad: str) -> None:
    assert dangers(ast.parse(bad))


@pytest.mark.parametrize(
    "good",
    ["model.eval()", "self.evaluate(0)", "yaml.safe_load(t)", "load_file(p)", "re.compile('x')", "json.load(f)"],
)
def test_the_search_for_dangers_lets_harmless_code_be(good: str) -> None:
    assert dangers(ast.parse(good)) == []


# ------------------------------------------------------------------------------------------------- public names


@pytest.mark.parametrize("package", [alignkit, alignkit_kernels], ids=["alignkit", "kernels"])
def test_every_public_name_resolves_is_sorted_and_has_a_docstring(package: ModuleType) -> None:
    assert list(package.__all__) == sorted(package.__all__, key=lambda n: (n[0].islower(), n))
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name


def test_the_lazy_names_are_those_that_type_checkers_see() -> None:
    block = next(n for n in tree_of(ROOT / "alignkit/__init__.py").body if isinstance(n, ast.If))
    seen = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert sorted(seen) == sorted(alignkit.__all__)
    for name, module in seen.items():
        assert getattr(importlib.import_module(str(module)), name) is getattr(alignkit, name)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'alignkit' has no attribute 'Trainer'"):
        _ = alignkit.Trainer


def test_every_public_module_class_and_function_has_a_docstring() -> None:
    missing = []
    for path in SOURCES:
        if not ast.get_docstring(tree_of(path)):
            missing.append(name_of(path))
        for node in ast.walk(tree_of(path)):
            bodies = [node] if isinstance(node, ast.Module | ast.ClassDef) else []
            for body in bodies:
                if isinstance(body, ast.ClassDef) and body.name.startswith("_"):
                    continue
                for child in body.body:
                    named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                    if named and not child.name.startswith("_") and not ast.get_docstring(child):
                        missing.append(f"{name_of(path)}::{child.name}")
    assert missing == []


# ------------------------------------------------------------------------------------------------ light imports


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    ran = python("-c", "import alignkit, json, sys; print(json.dumps(sorted(sys.modules)))")
    assert ran.returncode == 0, ran.stderr
    loaded = set(json.loads(ran.stdout))
    assert "alignkit" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "pydantic", "peft", "accelerate", "datasets"}


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["cache", "--help"]], ids=" ".join)
def test_the_command_line_answers_for_help_without_torch(arguments: list[str]) -> None:
    ran = python("-X", "importtime", "-m", "alignkit", *arguments)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "Usage: alignkit" in ran.stdout
    imported = {line.rsplit("|", 1)[1].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}
    assert "alignkit.cli" in imported or "typer" in imported
    assert not imported & {"torch", "transformers", "numpy", "datasets", "peft", "accelerate"}


def test_the_list_of_methods_is_known_without_importing_a_plugin() -> None:
    code = "import sys; from alignkit import registry; print(registry.names(), 'alignkit_dpo' in sys.modules)"
    ran = python("-c", code)
    assert ran.returncode == 0, ran.stderr
    assert "'dpo'" in ran.stdout
    assert ran.stdout.strip().endswith("False")


# ------------------------------------------------------------------------------------------------------- traces


def texts() -> Iterator[Path]:
    skipped = {".git", "__pycache__", ".venv", "node_modules", ".mypy_cache", ".ruff_cache", ".pytest_cache",
               ".hypothesis", ".import_linter_cache", "runs", "build", "dist"}  # fmt: skip
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in skipped and not f.endswith(".egg-info")]
        for file in files:
            if file.endswith((".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".cfg", ".sh")):
                yield Path(folder) / file


def test_no_file_mentions_the_home_folder_of_whoever_wrote_it() -> None:
    home = re.compile(r"(?<![\w.])/(?:home|Users|root)/\w+|[A-Z]:\\\\?Users")
    mine = Path(__file__).resolve()
    found = [
        f"{name_of(path)}:{number}"
        for path in texts()
        if path != mine
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if home.search(line)
    ]
    assert found == []


# -------------------------------------------------------------------------------------------- names of methods

# texts of the core that name a method: file -> the text, or its beginning where it ends with "..."
EXAMPLES = "\b\nExamples:\n  alignkit ..."
NAMING = {
    "alignkit/cli/commands/best_of_n.py": {EXAMPLES},
    "alignkit/cli/commands/chat.py": {EXAMPLES},
    "alignkit/cli/commands/convert.py": {EXAMPLES},
    "alignkit/cli/commands/health.py": {EXAMPLES},
    "alignkit/cli/commands/init.py": {EXAMPLES},
    "alignkit/cli/commands/inspect.py": {"DPO's beta, for the margin"},  # the margin is DPO's by definition
    "alignkit/cli/commands/methods.py": {"no method is installed; try: pip install alignkit-dpo"},
    "alignkit/cli/commands/push.py": {EXAMPLES},
    "alignkit/cli/commands/report.py": {EXAMPLES},
    "alignkit/cli/commands/run.py": {EXAMPLES},
    "alignkit/config.py": {" must contain settings such as 'method: dpo', found "},
    "alignkit/demo/recipes.py": {
        "pip install alignkit-dpo alignkit-reward",
        "the demo needs a method that can fine-tune its base; try: pip install alignkit-sft",
    },
    "alignkit/insight/doctor/plugins.py": {"pip install alignkit-dpo"},
    "alignkit/insight/health/watch.py": {"give the folder of a run, such as runs/dpo-001"},
}
ROLES = {"reward"}  # names of a method that are also the name of a role, which the core may name


@cache
def first_party() -> frozenset[str]:
    """The names of all first-party methods."""
    projects = [tomllib.loads(p.read_text(encoding="utf-8")) for p in (ROOT / "plugins").glob("*/pyproject.toml")]
    return frozenset(name for p in projects for name in p["project"]["entry-points"]["alignkit"])


def asks_for_method(node: ast.AST) -> bool:
    """Whether code compares a method's name, or gets a method by its name."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
    else:
        sides = [node.subject] if isinstance(node, ast.Match) else []
    by_name = any(re.search(r"(^|\.)method$|\.name$", ast.unparse(side)) for side in sides)
    return by_name or (isinstance(node, ast.Call) and ast.unparse(node.func) in ("registry.get", "get"))


def texts_of(node: ast.AST) -> list[ast.Constant]:
    return [n for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def named_methods(tree: ast.Module) -> dict[str, set[str]]:
    """Texts in the code with a first-party method's name as a word -> these names; docstrings may name them.

    A method with the name of a role counts only where a method's name is compared with it.
    """
    bodies = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = {id(n.body[0].value) for n in bodies if n.body and isinstance(n.body[0], ast.Expr)}
    compared = {id(text) for n in ast.walk(tree) if asks_for_method(n) for text in texts_of(n)}
    found = {}
    for text in texts_of(tree):
        names = first_party() if id(text) in compared else first_party() - ROLES
        words = {w.lower() for w in re.findall(r"\w+", str(text.value))} & names
        if words and id(text) not in docstrings:
            found[str(text.value)] = words
    return found


def exempt(text: str, entries: set[str]) -> str | None:
    """The entry of NAMING that allows a text."""
    starts = (e for e in entries if e.endswith("...") and text.startswith(e.removesuffix("...")))
    return text if text in entries else next(starts, None)


def test_the_core_names_no_method() -> None:
    found = {name_of(p): named_methods(tree_of(p)) for p in CORE}
    assert [(f, text) for f, texts in found.items() for text in texts if not exempt(text, NAMING.get(f, set()))] == []
    needed = {f: {exempt(text, NAMING[f]) for text in found[f]} for f in NAMING}
    assert needed == NAMING  # each exception is still needed


def test_an_exempted_text_exempts_no_other_text_of_its_file() -> None:
    for entries in NAMING.values():
        assert not exempt("dpo", entries)
        assert not exempt("reward", entries)


@pytest.mark.parametrize(
    "code",
    [
        'x = "dpo"', 'if method == "ppo": pass', 'f"try SimPO, {x}"', 'd = {"kto": 1}', 'if method == "reward": pass',
        'if cls.name in ("policy", "reward"): pass', 'registry.get("reward")', 'match method:\n    case "reward": pass',
    ],
)  # fmt: skip
def test_the_search_for_names_of_methods_finds_them(code: str) -> None:
    assert named_methods(ast.parse(code))
    assert not named_methods(ast.parse('"""As in DPO."""\ndef f():\n    """PPO\'s."""\n    return "dpop", "rewards"'))
    assert not named_methods(ast.parse('if "reward" in cls.uses and role == "reward": pass'))


# ---------------------------------------------------------------------------------------- who imports whom


def test_plugins_import_public_names_only_and_never_each_other() -> None:
    # import-linter reads packages, and a plugin is a single module
    foreign = {}
    for path in PLUGINS:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                taken = [a.name for a in node.names if a.name.startswith("alignkit")]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("alignkit"):
                public = {"alignkit": alignkit.__all__, "alignkit_kernels": alignkit_kernels.__all__}
                if (node.module or "").split(".")[0] == path.parent.name:  # a plugin that is a package
                    continue
                taken = [a.name for a in node.names if a.name not in public.get(node.module or "", ())]
            else:
                continue
            if taken:
                foreign[name_of(path)] = taken
    assert foreign == {}


# -------------------------------------------------------------------------------------- the page to read first


def test_the_page_to_read_first_names_files_and_functions_that_exist() -> None:
    """`folder/file.py` `function` (and `another`): the file is there, under alignkit/ or the root, and defines them."""
    page = (ROOT / "docs/life-of-a-step.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 80

    def found(file: str) -> Path:
        return next(p for p in (ROOT / "alignkit" / file, ROOT / file) if p.is_file())

    for file in re.findall(r"`([\w/-]+\.py)`", page):
        assert found(file)
    named = re.findall(r"`([\w/-]+\.py)` `(\w+)`(?: and `(\w+)`)?", page)
    assert len(named) > 30
    for file, *names in named:
        nodes = ast.walk(tree_of(found(file)))
        defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert {name for name in names if name} <= defined, (file, names)


def test_the_folder_of_the_kernels_is_no_package_for_other_libraries(tmp_path: Path) -> None:
    """transformers and bitsandbytes look for the package `kernels` of the hub; the editable install must not be it."""
    ask = "import alignkit, importlib.util as u; print(alignkit.__file__, u.find_spec('kernels'))"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    told = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
    ).stdout
    assert str(ROOT / "alignkit") in told, told
    assert str(ROOT / "kernels") not in told
