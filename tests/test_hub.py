"""A name of a model: what can only be a path is never asked of the hub, and a hub that is silent is given up soon."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from alignkit import hub
from alignkit.config import RunConfig
from alignkit.data import load
from alignkit.errors import DataError, ModelError
from alignkit.hub import is_path, meant, silent_hub
from alignkit.models import loading, places
from helpers import write_tiny


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base and a run, each with a model."""
    for name in ("base", "runs/dpo-001/model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The hub is an address that accepts no connection: its queue of one is full."""
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as server, socket.socket() as first, socket.socket() as second:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield address


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("name", "path"),
    [("gpt2", False), ("org/name", False), ("base", True), ("./x", True), ("/x", True), ("~/x", True), ("a/b/c", True),
     ("x/model", True), ("runs/x", True), ("base/", True), ("org/name/", False)],
)  # fmt: skip
def test_what_can_only_be_a_path(name: str, path: bool) -> None:
    assert is_path(name) == path


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("given", "is_meant"),
    [
        ("runs/dpo-001", "runs/dpo-001/model"),
        ("runs/dpo-01/model", "runs/dpo-001/model"),
        ("runs/dpo-01", "runs/dpo-001/model"),
        ("runs/dpo-001/modle", "runs/dpo-001/model"),
        ("bse", "base"),
        ("./bse", "base"),
    ],
)
def test_the_folder_that_is_meant_is_named(given: str, is_meant: str) -> None:
    assert meant(given) == f" Did you mean '{is_meant}'?"


def test_where_nothing_is_near_what_is_there_is_named(place: Path) -> None:
    assert meant("runs/zzz/model") == " The folder 'runs' holds: dpo-001."
    (place / "file").write_text("")
    assert meant("file/model") == " 'file' is a file."


@pytest.mark.usefixtures("place", "silent")
@pytest.mark.parametrize("name", ["runs/dpo-001", "runs/dpo-01", "runs/dpo-01/model", "./runs/dpo-01"])
def test_a_path_is_never_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "silent_hub", lambda: pytest.fail("asked the hub"))
    for load_one in (loading.load_tokenizer, lambda c: loading.from_pretrained(str(c.model), c)):
        with pytest.raises(ModelError, match=r"Did you mean 'runs/dpo-001/model'\?"):
            load_one(RunConfig(method="dpo", model=name, data="d"))


def test_a_silent_hub_is_given_up(silent: str, place: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ModelError, match=rf"no folder is called 'bse', .*hub \({silent}\) did not .* mean 'base'\?"):
        loading.load_tokenizer(RunConfig(method="dpo", model="bse", data="d"))
    with pytest.raises(DataError, match=r"'org/rows', and the hub .* did not answer"):
        load("org/rows", "pairs")
    assert time.monotonic() - started < 30  # datasets is imported in it


def test_a_hub_that_answers_or_is_not_asked_is_not_silent(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert silent_hub() == silent
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert silent_hub() is None
        monkeypatch.setattr(constants, "ENDPOINT", silent)
        proxies = {"http": f"http://127.0.0.1:{server.getsockname()[1]}"}
        monkeypatch.setattr(hub, "getproxies", lambda: proxies)  # the hub is reached through it
        assert silent_hub() is None
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert silent_hub() is None


def test_the_base_of_an_adapter_is_looked_for_in_the_same_way(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tmp_path}/bas"}}')
    with pytest.raises(ModelError, match=rf"from '{adapter}': its base '.*bas' is gone; name it in .*adapter_config"):
        loading.from_pretrained(str(adapter), RunConfig(method="dpo", model=str(adapter), data="d"))
