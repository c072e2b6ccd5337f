"""The saved model on the hub: checked before anything is trained, and never a reason to lose a run."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import alignkit
from alignkit.errors import ConfigError, ModelError
from alignkit.runs.upload import check_upload, send
from helpers import make_rows


class Hub:
    """Takes the place of HfApi; `down` makes uploads fail."""

    calls: list[tuple[str, dict[str, Any]]]
    down = False

    def create_repo(self, name: str, **given: Any) -> None:
        self.calls.append((name, given))

    def upload_folder(self, **given: Any) -> str:
        if self.down:
            raise OSError("no route to host")
        given["files"] = sorted(p.name for p in Path(given.pop("folder_path")).iterdir())
        self.calls.append(("upload", given))
        return "https://hub/me/model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(Hub, "calls", [], raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a-token")
    return Hub


def test_a_run_uploads_its_model_to_a_private_repository(hub: type[Hub], settings: dict[str, Any]) -> None:
    result = alignkit.run("sft", **settings, data=make_rows("text", 8), push_to_hub="me/model")
    (name, created), (_, uploaded) = hub.calls
    assert (name, created) == ("me/model", {"private": True, "exist_ok": True})
    assert uploaded["repo_id"] == "me/model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(uploaded["files"])
    assert result.folder.is_dir()


def test_a_failed_upload_loses_nothing(
    hub: type[Hub], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub, "down", True)
    result = alignkit.run("sft", **settings, data=make_rows("text", 8), push_to_hub="me/model")
    assert (result.folder / "model/model.safetensors").is_file()
    assert f"(OSError: no route to host); upload it by: hf upload me/model {result.folder / 'model'}" in caplog.text


def test_names_and_tokens_are_checked_first(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="push_to_hub needs a token of the hub: run `hf auth login`"):
        alignkit.run("sft", **settings, data=make_rows("text", 8), push_to_hub="me/model")
    assert not settings["output"].exists()
    with pytest.raises(ConfigError, match=r"push_to_hub: .*give a name such as"):
        check_upload("my/model/of/today")
    check_upload(None)


# ------------------------------------------------------------------- the real client, and a hub on this machine


class HubServer(BaseHTTPRequestHandler):
    """Answers what the client asks when it creates a repository and commits files to it."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.asked.append((self.path, self.headers.get("Authorization"), body))
        address = f"http://127.0.0.1:{server.server_port}"
        if server.refuses:
            return self.reply(403, {"error": "you may not write here"})
        if self.path == "/api/repos/create":
            return self.reply(200, {"url": f"{address}/me/model"})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        if "/commit/" in self.path:
            return self.reply(200, {"commitUrl": f"{address}/me/model/commit/abc", "commitOid": "abc"})
        return self.reply(200, {"errors": [], "warnings": []})

    def reply(self, status: int, value: dict[str, Any]) -> None:
        """Send JSON."""
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a server that the real client takes for the hub."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), HubServer)
    server.asked, server.refuses = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "a-token")
    yield server
    server.shutdown()
    server.server_close()


def test_the_command_uploads_every_byte_of_a_run(
    hub_server: Any, settings: dict[str, Any], command: Callable[..., Any]
) -> None:
    result = alignkit.run("sft", **settings, data=make_rows("text", 8))
    code, out, err = command("push", str(result.folder), "me/model")
    assert (code, err) == (0, "")
    assert "uploaded: http://127.0.0.1" in out
    paths = [path for path, _, _ in hub_server.asked]
    assert paths[0] == "/api/repos/create"
    assert json.loads(hub_server.asked[0][2])["visibility"] == "private"
    assert {token for _, token, _ in hub_server.asked} >= {"Bearer a-token"}
    commit = next(body for path, _, body in hub_server.asked if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {v["value"]["path"]: base64.b64decode(v["value"]["content"]) for v in lines if v["key"] == "file"}
    assert sent == {p.name: p.read_bytes() for p in (result.folder / "model").iterdir()}


def test_a_public_repository_has_to_be_asked_for(hub_server: Any, tiny: str, command: Callable[..., Any]) -> None:
    assert command("push", tiny, "me/model", "--public")[0] == 0
    assert json.loads(hub_server.asked[0][2])["visibility"] == "public"


def test_a_refused_upload_says_why_and_what_to_type(hub_server: Any, tiny: str, command: Callable[..., Any]) -> None:
    hub_server.refuses = True
    code, _, err = command("push", tiny, "me/model")
    assert code == 2
    assert "you may not write here" in err
    assert f"upload it by: hf upload me/model {tiny}" in err
    with pytest.raises(ModelError, match="the model could not be uploaded"):
        send(Path(tiny), "me/model")


def test_what_is_no_model_is_not_uploaded(hub_server: Any, tmp_path: Path, command: Callable[..., Any]) -> None:
    code, _, err = command("push", str(tmp_path), "me/model")
    assert code == 2
    assert "holds no saved model; give the folder of a finished run, or of a model" in err
    assert hub_server.asked == []
