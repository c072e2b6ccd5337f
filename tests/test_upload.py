"""The saved model on the hub: checked before anything is trained, and never a reason to lose a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import alignkit
from alignkit.errors import ConfigError
from alignkit.runs.upload import check_upload
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
