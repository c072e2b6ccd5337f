"""A model that cannot be loaded safely is refused in our words, which never advise to switch safety off."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkit.config import RunConfig
from alignkit.errors import ModelError
from alignkit.models.loading import from_pretrained, load_tokenizer
from alignkit.rewards.classifier import Classifier
from helpers import write_tiny

INVITING = ("weights_only", "torch.load", "`trust_remote_code=True`", "prompt in future")


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def config(folder: Path, **more: Any) -> RunConfig:
    return RunConfig(method="sft", model=str(folder), data="d", device="cpu", **more)


def refused(load: Any) -> str:
    """The message of the ModelError, after a look at the whole traceback."""
    with pytest.raises(ModelError) as caught:
        load()
    whole = "".join(traceback.format_exception(caught.value))
    assert not [words for words in INVITING if words in whole]
    return str(caught.value)


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A model whose weights are a pickle."""
    write_tiny(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    torch.save(load_file(file), tmp_path / "m/pytorch_model.bin")
    file.unlink()
    return tmp_path / "m"


@pytest.mark.parametrize("fault", ["code", "garbage"])
@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_weights_that_cannot_be_read_safely(fault: str, kind: Any, pickled: Path, tmp_path: Path) -> None:
    file = pickled / "pytorch_model.bin"
    from_pretrained(str(pickled), config(pickled))  # plain tensors are read
    if fault == "code":
        torch.save({**torch.load(file, weights_only=True), "x": Evil(f"touch {tmp_path / 'ran'}")}, file)
    else:
        file.write_bytes(b"garbage")
    said = refused(lambda: from_pretrained(str(pickled), config(pickled), kind))
    assert f"from '{pickled}': pytorch_model.bin cannot be read without running the code" in said
    assert "Use a copy of the model in safetensors" in said
    assert "pytorch_model.bin cannot be read" in refused(lambda: Classifier(str(pickled), "cpu", 100))
    assert not (tmp_path / "ran").exists()


def test_an_adapter_that_cannot_be_read_safely(tiny: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "a"
    plain: Any = from_pretrained(tiny, config(Path(tiny)))
    get_peft_model(plain, LoraConfig(target_modules="all-linear")).save_pretrained(str(folder))
    about = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": tiny}))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Evil("true")}, folder / "adapter_model.bin")
    assert "adapter_model.bin cannot be read" in refused(lambda: from_pretrained(str(folder), config(folder)))


def test_code_of_a_model_names_our_flag_and_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path / "c")
    (tmp_path / "c/strange.py").write_text("raise SystemExit('it ran')\n")
    file, of_tokenizer = tmp_path / "c/config.json", tmp_path / "c/tokenizer_config.json"
    names = {"AutoConfig": "strange.C", "AutoModelForCausalLM": "strange.M"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": names, "model_type": "strange"}))
    tokens = {"auto_map": {"AutoTokenizer": ["strange.T", None]}, "tokenizer_class": "T"}
    of_tokenizer.write_text(json.dumps(json.loads(of_tokenizer.read_text()) | tokens))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    words = "it comes with code of its own (strange.py), which is not run unasked. "
    for load in (
        lambda: from_pretrained(str(tmp_path / "c"), config(tmp_path / "c")),
        lambda: load_tokenizer(config(tmp_path / "c")),
    ):
        assert f"{words}Read that code; to run it, add --trust-remote-code" in refused(load)
    said = refused(lambda: Classifier(str(tmp_path / "c"), "cpu", 100))
    assert f"{words}Use a model of an architecture that transformers has" in said
    assert "custom code" not in capsys.readouterr().out


def test_other_faults_keep_their_words_and_cause(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no file named model\.safetensors") as caught:
        from_pretrained(str(tmp_path / "m"), config(tmp_path / "m"))
    assert isinstance(caught.value.__cause__, OSError)
