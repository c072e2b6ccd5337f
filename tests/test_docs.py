"""The pages say what the code does: generated parts are up to date, examples load, names and links exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from alignkit import data, registry
from alignkit.data import forms
from alignkit.engine import run
from helpers import make_rows

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(p.stem for p in (ROOT / "docs/methods").glob("*.md"))
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "plugins").glob("*/README.md"),
    ROOT / "kernels/README.md",
]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    return module


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def examples(text: str) -> list[list[dict[str, Any]]]:
    """The rows of every jsonl block."""
    blocks = re.findall(r"```jsonl\n(.*?)```", text, re.DOTALL)
    return [[json.loads(line) for line in block.splitlines()] for block in blocks]


def test_generated_parts_are_up_to_date(generate: ModuleType) -> None:
    stale = [p.name for p in generate.pages() if generate.generated(p) != p.read_text(encoding="utf-8")]
    assert stale == [], "run: python docs/generate.py"


def test_every_first_party_method_has_a_page_and_a_row_in_the_readme() -> None:
    distributions = [tomllib.loads(p.read_text()) for p in (ROOT / "plugins").glob("*/pyproject.toml")]
    assert sorted(name for d in distributions for name in d["project"]["entry-points"]["alignkit"]) == METHODS
    readme = (ROOT / "README.md").read_text()
    assert all(f"| [`{name}`](docs/methods/{name}.md) | " in readme for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_is_on_the_methods_page(name: str) -> None:
    assert all(f"| `{field}` | " in page(f"methods/{name}") for field in registry.get(name).Config.model_fields)


@pytest.mark.parametrize("name", METHODS)
def test_rows_on_a_methods_page_are_rows_it_takes(name: str) -> None:
    blocks = examples(page(f"methods/{name}"))
    assert blocks
    assert all(len(data.load(rows, registry.get(name).data)) >= 1 for rows in blocks)


def metrics_of_a_step(name: str, settings: dict[str, Any]) -> dict[str, float]:
    method, given = registry.get(name), settings | {"max_steps": 1}
    if method.data == "prompts":
        short = {"use": "length", "max": 5, "name": "NAME"}
        spec = {"judge": {"bradley_terry": short}} if "judge" in method.uses else {"reward": short}
        given |= {"sampling": {"max_new_tokens": 8}, "health": {"same_reward": None}, **spec}
    return run(name, data=make_rows(method.data, 8), **given).metrics


@pytest.mark.parametrize("name", METHODS)
def test_every_metric_is_named_on_a_page(name: str, settings: dict[str, Any]) -> None:
    text = page(f"methods/{name}") + page("run")
    assert [m for m in metrics_of_a_step(name, settings) if f"`{m}`" not in text] == []


@pytest.mark.parametrize(
    ("name", "first"), [("dpo", 0.6931), ("ipo", 25.0), ("kto", 0.5), ("bco", 0.6931)]
)  # what the pages say of the first step
def test_the_loss_of_the_first_step(name: str, first: float, settings: dict[str, Any]) -> None:
    assert metrics_of_a_step(name, settings)["loss"] == pytest.approx(first, abs=1e-4)


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce", "online_dpo", "ppo", "nash"])
def test_every_field_of_a_completion_is_named(name: str, settings: dict[str, Any]) -> None:
    metrics_of_a_step(name, settings | {"name": "run", "epochs_per_batch": 2})
    lines = (settings["output"] / "run/completions.jsonl").read_text().splitlines()
    table = page("run").split("### completions.jsonl")[1].split("###")[0]
    assert [field for line in lines for field in json.loads(line) if f"`{field}`" not in table] == []


def test_the_forms_on_the_data_page_are_those_that_are_detected() -> None:
    text = page("data")
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\w, ]+) \|$", text, re.MULTILINE))
    sections = re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", text, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in sections] == list(table)
    for name, section in sections:
        for rows in examples(section):
            for kind in table[name].split(", "):
                assert data.load(rows, kind).form == name  # type: ignore[arg-type]


def test_the_forms_on_the_data_page_are_all_and_in_order() -> None:
    names = re.findall(r"^\| `(\w+)` \|", page("data"), re.MULTILINE)
    assert names == list(dict.fromkeys(form.name for form in forms.FORMS))


def test_every_package_and_every_module_of_the_root_stands_once_in_the_table() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.split("## The packages")[1].split("##")[0]
    core = ROOT / "alignkit"
    root = [p.stem for p in core.glob("*.py") if not p.stem.startswith("__")]
    there = root + [f"{p.parent.name}/" for p in core.glob("*/__init__.py")]
    assert sorted(re.findall(r"`(\w+/?)`", table)) == sorted(there)


@pytest.mark.parametrize("package", ["data", "models", "reference", "rewards", "rollout", "runs", "engine"])
def test_every_module_of_a_package_stands_once_in_its_docstring(package: str) -> None:
    folder = ROOT / "alignkit" / package
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    there = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
    assert sorted(re.findall(r"\b\w+\.py\b", text)) == sorted(there)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([\w-]+))?\)", text):
        there = path.parent / target if target else path
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], anchor
