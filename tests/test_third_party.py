"""A third-party method: built, installed with the core in a fresh environment, listed, advised, run, tested."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import make_rows

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs/examples/alignkit-dpop"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Fresh:
    """An environment in which nothing of this checkout can be imported but what was installed from wheels."""

    folder: Path

    def install(self, *sources: Path) -> None:
        """Build a wheel of each source and install them."""
        wheels = self.folder / f"wheels-{sources[0].name}"
        for source in sources:
            build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
            subprocess.run([*build, "--wheel-dir", str(wheels), str(source)], check=True, capture_output=True)
        built = sorted(map(str, wheels.glob("*.whl")))
        assert len(built) == len(sources)
        self.run("python", "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", *built)

    def run(self, program: str, *arguments: str) -> str:
        """Run a program of the environment and return what it printed; its failure fails the test."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))}
        offline = {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
        command = [str(self.folder / "env/bin" / program), *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env={**clean, **offline}, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """Wheels of the core, the kernels and the example, in an environment with symlinks to third-party packages."""
    pytest.importorskip("flit_core")
    pytest.importorskip("hatchling")
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("fresh")
    fresh = Fresh(folder)
    venv.create(folder / "env", symlinks=True)
    ours = re.compile(r"alignkit|_+editable_|__pycache__", re.IGNORECASE)
    (there,) = (folder / "env/lib").glob("python*/site-packages")
    for source in {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}:
        for item in Path(source).iterdir():
            if not ours.match(item.name) and not (there / item.name).exists():
                (there / item.name).symlink_to(item)
    fresh.install(ROOT, ROOT / "kernels", EXAMPLE)
    return fresh


def test_wheels_are_what_is_imported(fresh: Fresh) -> None:
    where = fresh.run(
        "python", "-c", "import alignkit, alignkit_dpop; print(alignkit.__file__, alignkit_dpop.__file__)"
    )
    assert str(ROOT) not in where
    assert where.count(str(fresh.folder)) == 2


def test_it_is_listed(fresh: Fresh) -> None:
    listed = fresh.run("alignkit", "methods")
    assert re.search(r"dpop\s+pairs\s+policy, reference\s+alignkit-dpop\s+0\.1\.0", listed), listed
    assert "alignkit-sft" not in listed
    assert "broken" not in listed
    assert "weight of the penalty" in fresh.run("alignkit", "settings", "dpop")


def test_it_runs(fresh: Fresh, tiny: str) -> None:
    rows = fresh.folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(r) + "\n" for r in make_rows("pairs", 8)))
    settings = ("--batch-size", "4", "--max-steps", "2", "--output", "runs", "--name", "first")
    more = ("--set", "lambda_=5", "--set", "device=cpu", "--set", "cache_file=reference.sqlite")
    fresh.run("alignkit", "run", "dpop", "--model", tiny, "--data", "rows.jsonl", *settings, *more)
    run = fresh.folder / "runs/first"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"loss", "dpop", "rewards/accuracy", "kl"} <= lines[-1].keys()
    assert (run / "model/model.safetensors").is_file()
    assert "lambda_: 5" in (run / "config.yaml").read_text()


def test_it_is_recommended_with_its_own_reason(fresh: Fresh) -> None:
    (fresh.folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in make_rows("pairs", 60)))
    said = fresh.run("alignkit", "recommend", "--data", "pairs.jsonl")
    assert "start with dpop: keeps chosen answers likely" in said


def test_it_runs_in_the_demo(fresh: Fresh) -> None:
    fresh.install(ROOT / "plugins/alignkit-sft")  # the demo fine-tunes its base
    # the whole demo takes two minutes
    few = "world.CREATURES = world.CREATURES[:6]; recipes.base_settings = lambda: {'max_steps': 6}"
    said = fresh.run(
        "python", "-c", f"from alignkit import cli; from alignkit.demo import recipes, world; {few}; cli.main()",
        "demo", "--method", "dpop", "--output", "demos",
    )  # fmt: skip
    assert "after dpop" in said
    assert (fresh.folder / "demos/demo-dpop-001/dpop/model/model.safetensors").is_file()


def test_its_tests_pass(fresh: Fresh) -> None:
    shutil.copy(EXAMPLE / "test_dpop.py", fresh.folder)
    report = fresh.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "test_dpop.py")
    assert re.search(r"\d+ passed", report), report
    assert "failed" not in report


def test_the_guide_shows_the_example_as_it_is() -> None:
    """Every code block of docs/authors.md that names a file is that file, to the letter."""
    guide = (ROOT / "docs/authors.md").read_text()
    blocks = re.findall(r"<!-- (\S+) -->\n```\w*\n(.*?)```\n", guide, re.DOTALL)
    shown = {name for name, _ in blocks}
    dpop = {f"alignkit-dpop/{n}" for n in ("pyproject.toml", "alignkit_dpop.py", "test_dpop.py")}
    remax = {f"alignkit-remax/{n}" for n in ("alignkit_remax.py", "test_remax.py")}
    assert shown == {f"docs/examples/{n}" for n in dpop | remax}
    for name, text in blocks:
        assert text == (ROOT / name).read_text(), f"docs/authors.md shows another {name}; copy the file's text"


def test_the_example_is_short() -> None:
    assert len((EXAMPLE / "alignkit_dpop.py").read_text().splitlines()) < 60
