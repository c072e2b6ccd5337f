"""Every example of the README and of the pages runs, on a tiny model and a few rows."""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from alignkit.cli.app import app
from helpers import make_rows

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = {
    "my_rewards": "def right(completions, answer): return [float(a in t) for a, t in zip(answer, completions)]\n",
    "my_judge": "def compare(first, second): return [float(len(a) < len(b)) for a, b in zip(first, second)]\n",
}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every code block that can be run, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```(sh|python|yaml)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: Callable[..., str]
) -> Iterator[SimpleNamespace]:
    """A folder with the model `base` (also `MODEL`), rows, a reward and a judge; and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache.sqlite"))
    for name, text in FUNCTIONS.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("base", "MODEL"):
        shutil.copytree(tiny, tmp_path / name)
    write_rows(make_rows("pairs", 12), "prefs.jsonl")
    write_rows([{"prompt": row["prompt"], "answer": "red"} for row in make_rows("text", 4)], "prompts.jsonl")
    logger = logging.getLogger("alignkit")
    before = logger.handlers[:], logger.level, logger.propagate
    yield SimpleNamespace(folder=tmp_path, runner=CliRunner())
    logger.handlers[:], logger.level, logger.propagate = before


def execute(language: str, text: str, place: SimpleNamespace) -> None:
    if named := re.match(r"# (\S+\.(?:yaml|py))\n", text):
        (place.folder / named[1]).write_text(text)
    elif language == "python":
        exec(compile(text, "example", "exec"), {"__name__": "example"})
    elif language == "sh":
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["alignkit"]:
                result = place.runner.invoke(app, words[1:], catch_exceptions=False)
                assert result.exit_code == 0, (line, result.output)


def test_the_readmes_examples_run(place: SimpleNamespace) -> None:
    found = blocks("README.md")
    assert [language for language, _ in found].count("python") >= 2
    for language, text in found:
        execute(language, text, place)
    runs = {p.name for p in (place.folder / "runs").iterdir() if (p / "model").is_dir()}
    assert runs == {"dpo-001", "dpo-002", "dpo-003", "ipo-001", "simpo-001", "kto-001", "first", "second", "grpo-001"}


def test_the_two_commands_stand_in_the_readme() -> None:
    first = blocks("README.md")[0][1]
    assert first.startswith("pip install -r requirements.txt && alignkit demo")
    assert "\npip install -r requirements-dev.txt && pytest -n 2" in first


def test_the_kernels_example_runs(place: SimpleNamespace) -> None:
    for language, text in blocks("kernels/README.md"):
        execute(language, text, place)


@pytest.mark.parametrize("name", sorted(p.parent.name for p in (ROOT / "plugins").glob("*/README.md")))
def test_the_plugins_example_runs(name: str, place: SimpleNamespace) -> None:
    found = blocks(f"plugins/{name}/README.md")
    assert found
    for language, text in found:
        execute(language, text, place)


def test_the_run_pages_examples_run(place: SimpleNamespace) -> None:
    (place.folder / "config.yaml").write_text("method: dpo\nmodel: MODEL\ndata: prefs.jsonl\nname: mine\n")
    for language, text in blocks("docs/run.md"):
        for finished in place.folder.glob("runs/*/model") if "resume" in text else ():
            shutil.rmtree(finished)  # what is left is a run that was killed
        execute(language, text, place)
