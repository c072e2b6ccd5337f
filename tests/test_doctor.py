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
from doctors import NOTHING, facts, fill, one, set_apart, spoil, troubles

from alignkit.insight.doctor import Asked, examine, examined, installed, machine, software, surroundings
from alignkit.insight.doctor.parts import Fact, Trouble, looked, private


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_apart(tmp_path, monkeypatch)


# -------------------------------------------------------------------------------------------------------- guards


def test_a_probe_that_fails_keeps_what_it_had_found() -> None:
    for error in (RuntimeError("a\nb"), SystemExit(3), type("Panic", (BaseException,), {})("rust")):

        def probe(asked: Asked, error: BaseException = error) -> Iterator[Fact | Trouble]:
            yield Fact("first", "found")
            raise error

        part = looked("mine", probe, NOTHING)
        assert part.facts == (Fact("first", "found"),)
        assert part.severity == "warn"
        assert type(error).__name__ in part.troubles[0].what
        assert "\n" not in part.troubles[0].what


def test_ctrl_c_ends_it() -> None:
    def probe(asked: Asked) -> Iterator[Fact | Trouble]:
        raise KeyboardInterrupt
        yield Fact("never", "")

    with pytest.raises(KeyboardInterrupt):
        looked("mine", probe, NOTHING)


def test_every_probe_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(asked: Asked) -> Iterator[Fact | Trouble]:
        raise OSError("gone")
        yield Fact("never", "")

    monkeypatch.setattr(examined, "PROBES", dict.fromkeys(examined.PROBES, probe))
    found = examine()
    assert found.healthy  # what could not be looked at is no problem
    assert found.text().count("could not look any further: OSError: gone") == len(examined.PROBES)
    assert found.text().endswith(f"{len(examined.PROBES)} warnings")


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
        ("https://alice:s3/c@r:et@host", "https://***@host"),
        ("http://:s3cret@host", "http://***@host"),
        ("/here/https:/alice:s3cret@host/x", "/here/https:/***@host/x"),
        ("C:/x@y/z", "C:/x@y/z"),
        ("proxy=alice:s3cret@host:3128", "proxy=***@host:3128"),
        ("https://host/x@v1", "https://host/x@v1"),
        ("https://host:80/x", "https://host:80/x"),
        ("warn: x @ y", "warn: x @ y"),
        ("expected: a@b", "expected: a@b"),
    ],
)
def test_neither_names_nor_passwords_of_addresses_are_shown(text: str, shown: str) -> None:
    assert private(text) == shown


def test_an_address_in_a_variable_that_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "https://alice:s3cret@host/x")
    found = looked("environment", surroundings.environment, NOTHING)
    assert Fact("HF_HOME", "https://***@host/x") in found.facts
    assert "s3cret" not in examine().text()


# ------------------------------------------------------------------------------------------------------ software

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
    assert troubles(software.versions) == []
    assert facts(software.versions)["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("name", "version", "severity", "said", "remedy"),
    [
        ("torch", "2.9.1", "problem", "torch is 2.9.1, and alignkit needs >=2.10 (CVE-2025-32434", "'torch>=2.10'"),
        ("transformers", "5.2.0", "problem", "(CVE-2026-4372)", "pip install 'transformers>=5.3'"),
        ("peft", None, "problem", "peft is not installed, and alignkit needs >=0.18", "pip install 'peft>=0.18'"),
        ("alignkit-kernels", "0.3.0", "problem", "alignkit-kernels is 0.3.0", "'alignkit-kernels<0.2,>=0.1'"),
        ("bitsandbytes", "0.44", "warn", "bitsandbytes is 0.44", "'bitsandbytes>=0.50'"),
    ],
)
def test_versions_that_do_not_fit(
    name: str, version: str | None, severity: str, said: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = software.installed
    monkeypatch.setattr(software, "installed", lambda asked: version if asked == name else true(asked))
    found = next(t for t in troubles(software.versions) if t.what.startswith(name))
    assert found.severity == severity
    assert said in found.what
    assert remedy in found.remedy


def test_what_is_not_needed_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    true = software.installed
    monkeypatch.setattr(software, "installed", lambda name: None if name in ("bitsandbytes", "triton") else true(name))
    assert troubles(software.versions) == []
    assert "only `reference: int8` needs it" in facts(software.versions)["bitsandbytes"]


def test_a_requirement_that_cannot_be_read_is_named_and_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ("foo >> 3", "bar; nothing == '1'", "pydantic<1")
    install(tmp_path / "site", monkeypatch, "odd-one", "alignkit.rewards", "odd", *needs)
    first, second, third = troubles(software.versions)
    assert first.what.startswith("odd-one asks for 'foo >> 3', which cannot be read: ")
    assert (first.severity, first.remedy) == ("warn", "pip install -U odd-one, or pip uninstall odd-one")
    assert second.what.startswith("odd-one asks for 'bar; nothing == '1'', which cannot be read: ")
    assert "and odd-one needs <1" in third.what


def test_a_plugin_that_an_interrupted_installation_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "odd-one", "alignkit.rewards", "odd")
    (tmp_path / "site" / "odd_one-1.0.dist-info" / "METADATA").unlink()
    assert troubles(software.versions) == []


def test_a_version_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    true = software.installed
    monkeypatch.setattr(software, "installed", lambda name: "2.10-my-build" if name == "torch" else true(name))
    found = troubles(software.versions)[0]
    assert found.what == "torch is 2.10-my-build, which is no version: whether alignkit can use it cannot be told"
    assert found.severity == "warn"


def test_a_python_built_from_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.13.1+")
    assert troubles(software.versions) == []
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    assert one(software.versions).what.startswith("Python 3.9.2 is not >=3.1")


def test_alignkit_run_from_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    true = software.installed
    monkeypatch.setattr(software, "installed", lambda name: None if name == "alignkit" else true(name))
    assert "alignkit is not installed: " in troubles(software.versions)[0].what


def test_another_triton_than_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked_for(name: str) -> Any:
        return SimpleNamespace(requires=["triton==3.5.0"]) if name == "torch" else distribution(name)

    monkeypatch.setattr(software, "distribution", asked_for)
    true = software.installed
    monkeypatch.setattr(software, "installed", lambda name: "3.7.1" if name == "triton" else true(name))
    found = one(software.versions)
    assert found == ("warn", "triton is 3.7.1, and this torch was made for ==3.5.0", "pip install 'triton==3.5.0'")


def test_the_libraries_work_here() -> None:
    assert troubles(software.working) == []
    assert facts(software.working)["LoRA"] == "works"


def test_a_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "datasets cannot be imported" in one(software.working).what


def test_adapters_that_an_optional_library_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise ImportError("Found an incompatible version of torchao. Found version 0.4")

    monkeypatch.setattr("peft.get_peft_model", refused)
    found = one(software.working)
    assert found.severity == "problem"
    assert "incompatible version of torchao" in found.what


def test_eight_bits_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.reference.int8.to_int8", lambda model: torch.nn.Sequential(model, torch.nn.Tanh()))
    if software.installed("bitsandbytes"):
        found = one(software.working)
        assert found.severity == "warn"
        assert "off" in found.what
        assert one(software.working, Asked(int8=True)).severity == "problem"
    true = software.installed
    monkeypatch.setattr(software, "installed", lambda name: None if name == "bitsandbytes" else true(name))
    assert troubles(software.working) == []
    assert "bitsandbytes is not installed" in one(software.working, Asked(int8=True)).what


# ------------------------------------------------------------------------------------------------------- plugins


def test_the_plugins_here_are_sound() -> None:
    found = facts(installed.plugins)
    assert "dpo (alignkit-dpo 0.1.0)" in found["methods"]
    assert found["listeners"] == "health"
    assert troubles(installed.plugins) == []


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ("alignkit", "method 'odd' of odd-one cannot be loaded: RuntimeError: oh"),
        ("alignkit.rewards", "reward 'odd' of odd-one cannot be loaded: RuntimeError: oh"),
        ("alignkit.judges", "judge 'odd' of odd-one cannot be loaded: RuntimeError: oh"),
        ("alignkit.listeners", "listener 'odd' of odd-one cannot be loaded: RuntimeError: oh"),
    ],
)
def test_a_broken_plugin(group: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "odd-one", group, "odd")
    found = one(installed.plugins)
    assert found.severity == "problem"
    assert said in found.what
    assert "uninstall" in found.remedy


def test_a_method_that_is_brought_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "zzz-dpo", "alignkit", "dpo")
    found = one(installed.plugins)
    assert "'dpo' is brought by two distributions, alignkit-dpo and zzz-dpo" in found.what
    assert found.remedy == "pip uninstall zzz-dpo, or alignkit-dpo"


def test_no_method_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.registry.plugins", list)
    assert one(installed.plugins).remedy == "pip install alignkit-dpo"


# --------------------------------------------------------------------------------------------------- environment


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "HF_ENDPOINT", "WANDB_API_KEY", "ALIGNKIT_SOMETHING"):
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("HF_HUB_CACHE", "/models")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setenv("MY_SECRET", "hush")
    found = facts(surroundings.environment)
    assert (found["HF_TOKEN"], found["HF_HUB_CACHE"], found["MALLOC_ARENA_MAX"]) == ("set", "/models", "2")
    assert "MY_SECRET" not in found
    assert "hush" not in json.dumps(examine().describe())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TRITON_INTERPRET", "1", "hundreds of times slower"),
        ("CUDA_VISIBLE_DEVICES", "", "hides every GPU"),
        ("CUDA_VISIBLE_DEVICES", "-1", "hides every GPU"),
        ("CUDA_LAUNCH_BLOCKING", "1", "every kernel wait"),
        ("WORLD_SIZE", "2", "one of 2 processes"),
        ("LOCAL_RANK", "0", "ends without MASTER_ADDR"),
        ("RANK", "3", "another than the first process"),
    ],
)
def test_variables_that_do_harm(name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert troubles(surroundings.environment) == []
    monkeypatch.setenv(name, value)
    found = one(surroundings.environment)
    assert found.severity == "warn"
    assert said in found.what
    assert "unset " in found.remedy
    assert name in found.remedy


@pytest.mark.parametrize(
    "given",
    [
        {"TRITON_INTERPRET": "0"},
        {"CUDA_VISIBLE_DEVICES": "1"},
        {"HF_HUB_OFFLINE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"},  # torchrun's, of one process
        {"LOCAL_RANK": "-1"},
    ],
)
def test_harmless_values_are_let_be(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert troubles(surroundings.environment) == []
    assert ("hub" in facts(surroundings.environment)) is ("HF_HUB_OFFLINE" in given)


def test_where_no_gpu_is_none_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert troubles(surroundings.environment) == []
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / "nvidia0"]))
    assert len(troubles(surroundings.environment)) == 2


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_ranks_that_are_no_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "one")
    assert one(surroundings.environment) == (
        "problem", f"{name} is 'one', which is no number: a run ends there", f"unset {name}"
    )  # fmt: skip


def test_a_terminal_that_cannot_show_all_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="utf-8"))
    assert troubles(surroundings.terminal) == []
    for encoding in ("ascii", "latin-1", "no-such-encoding"):
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding=encoding))
        assert one(surroundings.terminal).remedy == "export PYTHONUTF8=1"


# ------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def call(command: Callable[..., Any]) -> Callable[..., Any]:
    """Run `alignkit doctor ARGUMENTS`."""
    return partial(command, "doctor")


def test_the_command(call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    filled = fill(tmp_path / "cache.sqlite")
    code, out, err = call("--json", "d.json")
    described = json.loads((tmp_path / "d.json").read_text())
    assert (code, err) == (0 if described["healthy"] else 1, "")
    assert re.findall(r"^(\w[\w ]*): (?:ok|warn|problem)$", out, re.MULTILINE) == list(examined.PROBES)
    assert list(described["parts"]) == list(examined.PROBES)
    assert "  path: ~/cache.sqlite\n" in out
    assert str(tmp_path) not in out
    spoil(filled)
    code, out, _ = call()
    assert code == 1
    assert "reference cache: problem\n" in out
    assert "  problem: 1 of the cache's values are damaged\n    remedy: alignkit cache verify\n" in out


def test_what_the_settings_ask_for_is_looked_at(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Asked] = []

    def probe(asked: Asked) -> Iterator[Fact | Trouble]:
        seen.append(asked)
        yield Fact("a", "σ")

    monkeypatch.setattr(examined, "PROBES", {"mine": probe})
    (tmp_path / "c.yaml").write_text("method: dpo\nreference: int8\noutput: elsewhere\n")
    assert call("c.yaml", "--verify")[0] == 0
    assert call()[0] == 0
    assert seen == [Asked(Path("elsewhere"), True, True), Asked(Path("runs"), False, False)]
    code, _, err = call("none.yaml")
    assert code == 2
    assert "cannot read none.yaml" in err


def test_a_poor_terminal_gets_what_it_can_show() -> None:
    code = (
        "import sys\nfrom alignkit import cli\nfrom alignkit.insight.doctor import examined\n"
        "from alignkit.insight.doctor.parts import Fact\n"
        "examined.PROBES = {'mine': lambda asked: iter([Fact('a', chr(963))])}\n"
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
    assert all(f"\n{title}: " in f"\n{ran.stdout}" for title in examined.PROBES)
