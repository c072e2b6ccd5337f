"""`alignkit doctor`: every trouble that it knows is planted and found, nothing private is shown, nothing ends it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doctors import facts, isolate, one, troubles

from alignkit.insight.doctor import diagnosis, examine, versions
from alignkit.insight.doctor.disks import disks
from alignkit.insight.doctor.plugins import plugins
from alignkit.insight.doctor.probe import Fact, Trouble, private, run

OPTIONAL = ("bitsandbytes", "triton")
DISKS = partial(disks, Path("runs"))
TITLES = ["versions", "devices", "kernels", "attention", "plugins", "disks"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(tmp_path, monkeypatch)


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No disk is full."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))


# -------------------------------------------------------------------------------------------------------- guards


def test_a_probe_that_fails_keeps_what_it_had_found() -> None:
    for error in (RuntimeError("a\nb"), SystemExit(3), type("Panic", (BaseException,), {})("rust")):

        def probe(error: BaseException = error) -> Iterator[Fact | Trouble]:
            yield Fact("first", "found")
            raise error

        part = run("a part", probe)
        assert part.facts == (Fact("first", "found"),)
        assert part.severity == "warn"
        assert type(error).__name__ in part.troubles[0].what
        assert "\n" not in part.troubles[0].what


def test_ctrl_c_ends_it() -> None:
    def probe() -> Iterator[Fact | Trouble]:
        raise KeyboardInterrupt
        yield Fact("never", "")

    with pytest.raises(KeyboardInterrupt):
        run("a part", probe)


def test_every_probe_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> Iterator[Fact | Trouble]:
        raise OSError("gone")
        yield Fact("never", "")

    monkeypatch.setattr(diagnosis, "probes", lambda runs: dict.fromkeys(TITLES, probe))
    found = examine()
    assert found.healthy  # a part that could not be examined is no problem
    assert found.text().count("the rest could not be examined: OSError: gone") == 6
    assert found.text().endswith("6 warnings")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/there/alice/x", "~/x"),
        ("/there/alice", "~"),
        ("in '/there/alice/a b': no", "in '~/a b': no"),
        ("/there/alice2/x", "/there/alice2/x"),
        ("/data/alice/x", "/data/USER/x"),
        ("malice and alice", "malice and alice"),
        ("/data/alice-runs/x", "/data/USER-runs/x"),
        ("/there/alice-runs/x", "/there/USER-runs/x"),
        ("alice_runs/x, 5 GiB free", "USER_runs/x, 5 GiB free"),
        ("/data/my.alice/x", "/data/my.USER/x"),
        ("/data/malice/alicea", "/data/malice/alicea"),
        ("C:\\data\\alice-runs", "C:\\data\\USER-runs"),
        ("cannot write /there/alice.", "cannot write /there/USER."),
    ],
)
def test_neither_home_nor_user_is_shown(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/there/alice")
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    assert private(text) == shown


def test_a_home_that_is_the_root_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr("getpass.getuser", lambda: "nobody")
    assert private("/usr/lib") == "/usr/lib"


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 1234"), OSError("no"), ImportError("no pwd")])
def test_the_home_of_a_user_without_an_entry_is_not_shown(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> str:
        raise error

    monkeypatch.setenv("HOME", "/there/alice")
    monkeypatch.setattr("getpass.getuser", refused)
    assert private("/there/alice/x and /data/alice-runs") == "~/x and /data/USER-runs"


def test_the_name_of_a_user_without_a_home_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", refused)
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    assert private("/data/alice/x") == "/data/USER/x"


@pytest.mark.parametrize("name", ["root", "user", "data"])
def test_a_name_of_nobody_is_let_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", f"/there/{name}")
    monkeypatch.setattr("getpass.getuser", lambda: name)
    assert private(f"/there/{name}/x and /disk/{name}/{name}-x") == f"~/x and /disk/{name}/{name}-x"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://alice:s3cret@host/x", "https://***@host/x"),
        ("see 'https://s3cret@host:80'", "see 'https://***@host:80'"),
        ("https://host/x@v1", "https://host/x@v1"),
        ("https://host:80/x", "https://host:80/x"),
        ("warn: x @ y", "warn: x @ y"),
    ],
)
def test_no_credentials_of_addresses_are_shown(text: str, shown: str) -> None:
    assert private(text) == shown


# ------------------------------------------------------------------------------------------------------ versions

BROKEN = "raise RuntimeError('oh')\n"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, owner: str, group: str, name: str, *needs: str) -> None:
    module, info = f"of_{owner.replace('-', '_')}", folder / f"{owner.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(BROKEN)
    about = [f"Name: {owner}", "Version: 1.0", *(f"Requires-Dist: {text}" for text in needs)]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *about, ""]))
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
    monkeypatch.syspath_prepend(folder)


def test_here_everything_is_as_it_should_be() -> None:
    assert troubles(versions.versions) == []
    assert facts(versions.versions)["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("name", "version", "severity", "message", "remedy"),
    [
        ("torch", "2.9.1", "problem", "torch is 2.9.1, and alignkit needs >=2.10", "'torch>=2.10'"),
        (
            "transformers",
            "5.2.0",
            "problem",
            "transformers is 5.2.0, and alignkit needs >=5.3",
            "pip install 'transformers>=5.3'",
        ),
        ("peft", None, "problem", "peft is not installed, and alignkit needs >=0.18", "pip install 'peft>=0.18'"),
        ("alignkit-kernels", "0.3.0", "problem", "alignkit-kernels is 0.3.0", "'alignkit-kernels<0.2,>=0.1'"),
        ("bitsandbytes", "0.44", "warn", "bitsandbytes is 0.44", "'bitsandbytes>=0.50'"),
    ],
)
def test_versions_that_do_not_fit(
    name: str, version: str | None, severity: str, message: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = versions.installed
    monkeypatch.setattr(versions, "installed", lambda owner: version if owner == name else original(owner))
    found = next(t for t in troubles(versions.versions) if t.what.startswith(name))
    assert found.severity == severity
    assert message in found.what
    assert remedy in found.remedy


def test_what_is_not_needed_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    original = versions.installed
    monkeypatch.setattr(
        versions, "installed", lambda name: None if name in ("bitsandbytes", "triton") else original(name)
    )
    assert troubles(versions.versions) == []
    assert "only `reference: int8`, `quantize: nf4` needs it" in facts(versions.versions)["bitsandbytes"]


def test_what_plugins_require(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ("pydantic<1", "torch>=2.10", "no-such; extra == 'all'", "peft; python_version < '3'")
    install(tmp_path / "site", monkeypatch, "odd-one", "alignkit.rewards", "odd", *needs)
    found = one(versions.versions)
    assert "and odd-one needs <1" in found.what
    install(tmp_path / "more", monkeypatch, "odd-two", "alignkit.rewards", "two", "foo >> 3")
    unreadable = troubles(versions.versions)[-1]
    assert unreadable.what == "odd-two requires 'foo >> 3', which cannot be read"
    assert (unreadable.severity, unreadable.remedy) == ("warn", "pip install -U odd-two, or pip uninstall odd-two")


def test_a_plugin_that_an_interrupted_installation_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "odd-one", "alignkit.rewards", "odd")
    (tmp_path / "site" / "odd_one-1.0.dist-info" / "METADATA").unlink()
    assert troubles(versions.versions) == []


def test_alignkit_run_from_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    original = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: None if name == "alignkit" else original(name))
    assert "alignkit is not installed: " in troubles(versions.versions)[0].what


def test_another_triton_than_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def metadata(name: str) -> Any:
        return SimpleNamespace(requires=["triton==3.5.0"]) if name == "torch" else distribution(name)

    monkeypatch.setattr(versions, "distribution", metadata)
    original = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: "3.7.1" if name == "triton" else original(name))
    found = one(versions.versions)
    assert found == ("warn", "triton is 3.7.1, and torch needs ==3.5.0", "pip install 'triton==3.5.0'")


def test_a_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "datasets cannot be imported" in one(versions.versions).what


# ------------------------------------------------------------------------------------------------------- plugins


def test_the_plugins_here_are_sound() -> None:
    found = facts(plugins)
    assert "dpo (alignkit-dpo 0.1.0)" in found["methods"]
    assert found["listeners"] == "health"
    assert troubles(plugins) == []


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("alignkit", "method 'odd' of odd-one cannot be loaded: RuntimeError: oh"),
        ("alignkit.rewards", "reward 'odd' of odd-one cannot be loaded: RuntimeError: oh"),
        ("alignkit.judges", "judge 'odd' of odd-one cannot be loaded: RuntimeError: oh"),
        ("alignkit.listeners", "listener 'odd' of odd-one cannot be loaded: RuntimeError: oh"),
    ],
)
def test_a_broken_plugin(group: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "odd-one", group, "odd")
    found = one(plugins)
    assert found.severity == "problem"
    assert message in found.what
    assert "uninstall" in found.remedy


def test_a_method_that_is_brought_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "zzz-dpo", "alignkit", "dpo")
    found = one(plugins)
    assert all(text in found.what for text in ("'dpo'", "two distributions", "alignkit-dpo and zzz-dpo"))
    assert found.remedy == "pip uninstall zzz-dpo, or alignkit-dpo"


def test_no_method_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.registry.plugins", list)
    assert one(plugins).remedy == "pip install alignkit-dpo"


# --------------------------------------------------------------------------------------------------------- disks


@pytest.mark.parametrize(("free", "severities"), [(6, []), (3, ["warn"]), (0.5, ["problem"])])
def test_disks(free: float, severities: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(free * 2**30)))
    assert sorted({t.severity for t in troubles(DISKS)}) == severities
    assert list(facts(DISKS)) == ["runs", "reference cache", "models of the hub", "temporary files"]


def test_runs_that_are_a_file(tmp_path: Path, roomy: None) -> None:
    (tmp_path / "file").write_text("")
    found = one(partial(disks, tmp_path / "file" / "runs"))
    remedy = "fix its permissions, or choose another `output`"
    assert found == ("problem", f"runs: {tmp_path}/file is not a folder", remedy)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert f"runs: {tmp_path} cannot be written" in [t.what for t in troubles(DISKS)]


def test_a_folder_that_cannot_be_read(tmp_path: Path, roomy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original, folder = Path.stat, tmp_path / "locked"

    def stat(self: Path, **given: Any) -> os.stat_result:
        if folder in self.parents:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, **given)

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(folder / "of" / "cache.sqlite"))
    found = one(DISKS)
    assert found.what.startswith("reference cache cannot be read or written: ")
    assert "Permission denied" in found.what
    assert found.remedy == "fix its permissions, or export ALIGNKIT_CACHE=/another/folder/reference.sqlite"
    assert {"runs", "temporary files"} <= facts(DISKS).keys()


def test_a_user_without_a_home(roomy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> Path:
        if str(self).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return self

    monkeypatch.delenv("ALIGNKIT_CACHE")
    monkeypatch.setattr(Path, "expanduser", refused)
    assert one(DISKS).what.startswith("reference cache cannot be read or written: ")
    assert {"runs", "temporary files"} <= facts(DISKS).keys()


# ------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def call(command: Callable[..., Any]) -> Callable[..., Any]:
    """Run `alignkit doctor ARGUMENTS`."""
    return partial(command, "doctor")


def test_the_command(call: Callable[..., Any], tmp_path: Path, roomy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, err = call("--json", "d.json")
    described = json.loads((tmp_path / "d.json").read_text())
    assert (code, err) == (0 if described["healthy"] else 1, "")
    assert re.findall(r"^(\w[\w ]*): (?:ok|warn|problem)$", out, re.MULTILINE) == TITLES
    assert list(described["parts"]) == TITLES
    assert "  reference cache: ~, 1.02e+03 GiB free\n" in out
    assert str(tmp_path) not in out
    monkeypatch.setattr("alignkit.registry.plugins", list)
    code, out, _ = call("--json", "d.json")
    assert code == 1
    assert "plugins: problem\n" in out
    assert "  problem: no method is installed\n    remedy: pip install alignkit-dpo\n" in out
    trouble = {"severity": "problem", "what": "no method is installed", "remedy": "pip install alignkit-dpo"}
    part = json.loads((tmp_path / "d.json").read_text())["parts"]["plugins"]
    assert (part["severity"], part["troubles"], part["facts"]["methods"]) == ("problem", [trouble], "none")


def test_the_disk_of_the_settings_is_examined(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examined: list[Path] = []

    def probes(runs: Path) -> dict[str, Any]:
        examined.append(runs)
        return {"a part": lambda: iter([Fact("a", "σ")])}

    monkeypatch.setattr(diagnosis, "probes", probes)
    (tmp_path / "c.yaml").write_text("method: dpo\noutput: elsewhere\n")
    assert call("c.yaml")[0] == 0
    assert call()[0] == 0
    assert examined == [Path("elsewhere"), Path("runs")]
    code, _, err = call("none.yaml")
    assert code == 2
    assert "cannot read none.yaml" in err


def test_a_poor_terminal_gets_what_it_can_show() -> None:
    code = (
        "import sys\nfrom alignkit import cli\nfrom alignkit.insight.doctor import diagnosis\n"
        "from alignkit.insight.doctor.probe import Fact\n"
        "diagnosis.probes = lambda runs: {'a part': lambda: iter([Fact('a', chr(963))])}\n"
        "sys.argv = ['alignkit', 'doctor']\ncli.main()\n"
    )
    given = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "a: \\u03c3" in ran.stdout


def test_a_broken_torch_does_not_end_it(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    given = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-m", "alignkit", "doctor"], capture_output=True, text=True, env=given, check=False
    )
    assert ran.returncode == 1
    assert "problem: torch cannot be imported: ImportError: libcudart.so.13" in ran.stdout
    assert "Traceback" not in ran.stdout + ran.stderr
    assert all(f"\n{title}: " in f"\n{ran.stdout}" for title in TITLES)
