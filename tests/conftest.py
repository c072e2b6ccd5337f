"""Shared fixtures: a tiny Llama on disk with its tokenizer, settings of a short run, rows, the command line."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import write_chatml, write_tiny
from scripts import SCRIPTS


@pytest.fixture(autouse=True)
def _own_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the import path: a reward's module is also searched in the working folder, which differs in each test."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """Restore what a test, a command or a run that was ended has set of alignkit's logger."""
    logger = logging.getLogger("alignkit")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return str(folder)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama whose tokenizer has a ChatML template."""
    folder = tmp_path_factory.mktemp("chatml")
    write_chatml(folder)
    return str(folder)


@pytest.fixture(scope="session")
def chat_tokenizer(chat_model: str) -> Any:
    """The tokenizer of `chat_model`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chat_model)


@pytest.fixture
def settings(tiny: str, tmp_path: Path) -> dict[str, Any]:
    """Settings of a short run in its own folder."""
    return {
        "model": tiny,
        "output": tmp_path / "runs",
        "cache_file": tmp_path / "cache.sqlite",
        "batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "device": "cpu",
    }


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSONL and return the path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(path)

    return write


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Any, str, str]]:
    """Run `alignkit ARGUMENTS` in its own folder and with its own cache; return exit code, stdout and stderr."""
    from alignkit import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache.sqlite"))

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["alignkit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Import a script as a module, with a command line for its main()."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str, *arguments: object) -> Any:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        return importlib.import_module(name)

    yield load
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == SCRIPTS:
            del sys.modules[name]
