"""Talking to models: what they are shown, what is kept, and the command."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignkit
from alignkit.errors import AlignkitError, ConfigError, ModelError
from alignkit.insight.talk import Speaker, converse, speakers
from helpers import make_rows, write_tiny

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SHORT = {"sampling.max_new_tokens": 6, "device": "cpu"}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    write_tiny(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def roles(speaker: Speaker) -> list[str]:
    return [m["role"] for m in speaker.messages]


def likeliest(speaker: Speaker, text: str, n: int) -> list[int]:
    """Return n most likely tokens after a text, computed by whole passes of the model."""
    ids = speaker.tokenizer(text)["input_ids"]
    for _ in range(n):
        ids.append(int(speaker.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return list(ids[-n:])


def test_an_answer_continues_the_whole_conversation(chatty: str) -> None:
    [speaker] = speakers(chatty, settings={**SHORT, "sampling.top_k": 1})
    heard: list[str] = []
    first = speaker.answer("one 1", heard.append)
    assert "".join(heard) == first
    want = likeliest(speaker, "[user] one 1 [assistant]", 6)
    assert first == speaker.tokenizer.decode(want, skip_special_tokens=True)
    second = speaker.answer("two 2", heard.append)
    want = likeliest(speaker, f"[user] one 1 [assistant] {first} [user] two 2 [assistant]", 6)
    assert second == speaker.tokenizer.decode(want, skip_special_tokens=True)
    assert [m["content"] for m in speaker.messages] == ["one 1", first, "two 2", second]


def test_without_a_template_each_text_is_continued_alone(tiny: str) -> None:
    [speaker] = speakers(tiny, settings={**SHORT, "sampling.top_k": 1})
    assert not speaker.converses
    speaker.answer("yes", lambda _: None)
    again = speaker.answer("no :", lambda _: None)
    assert again == speaker.tokenizer.decode(likeliest(speaker, "no :", 6), skip_special_tokens=True)
    assert speaker.messages == []


def test_the_settings_of_sampling_are_in_force(chatty: str) -> None:
    [speaker] = speakers(chatty, settings={**SHORT, "sampling.temperature": 0.5, "sampling.stop": ["e"]})
    settings = speaker._generation(speaker.model)
    assert (settings.temperature, settings.top_k, settings.top_p, settings.stop_strings) == (0.5, 0, 1.0, ["e"])
    texts = {speaker.answer("yes", lambda _: None) for _ in range(8)}
    assert len(texts) > 1
    with pytest.raises(ConfigError, match=r"chat has no setting 'beta'"):
        speakers(chatty, settings={"beta": 1})


def test_a_seed_repeats_a_conversation(chatty: str) -> None:
    said = []
    for seed in (1, 1, 2):
        [speaker] = speakers(chatty, settings={**SHORT, "seed": seed})
        said.append([speaker.answer(text, lambda _: None) for text in ("one", "two", "three")])
    assert said[0] == said[1]
    assert said[0] != said[2]


def test_commands_forget_and_begin_again(chatty: str) -> None:
    both = speakers(chatty, chatty, SHORT)
    out: list[str] = []
    seen: list[list[str]] = []

    def lines() -> Any:
        yield "/undo"
        yield "one"
        yield "  "
        yield "/no_think two"
        seen.append(roles(both[1]))
        yield "/undo"
        seen.append(roles(both[1]))
        yield "/reset"
        seen.append(roles(both[0]))
        yield "/quit"
        pytest.fail("/quit ends the conversation")

    converse(both, lines(), out.append, system="be brief")
    turn = ["user", "assistant"]
    assert seen == [["system", *turn, *turn], ["system", *turn], ["system"]]
    text = "".join(out)
    assert text.startswith("nothing was said\n")
    assert text.count("> ") >= 4
    assert "forgotten\n" in text
    assert "a new conversation\n" in text


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(chatty: str) -> None:
    [speaker] = speakers(chatty, settings={"sampling.max_new_tokens": 200, "sampling.min_new_tokens": 200})
    out: list[str] = []

    def write(text: str) -> None:
        out.append(text)
        if len(out) == 4:
            raise KeyboardInterrupt

    converse([speaker], ["one", "two"], write)
    assert " (stopped)" in out
    kept = speaker.messages[1]["content"]
    assert kept == "".join(out[1:4])
    assert roles(speaker) == ["user", "assistant"] * 2


def test_a_message_that_cannot_be_answered_is_left_out(tmp_path: Path) -> None:
    from transformers import GPT2Config

    folder = tmp_path / "short"
    write_tiny(folder, GPT2Config, max_position_embeddings=64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    [speaker] = speakers(str(folder), settings=SHORT)
    out: list[str] = []
    converse([speaker], ["one", "yes " * 80, "two"], out.append)
    assert "needs more than the model's" in "".join(out)
    assert [m["content"] for m in speaker.messages if m["role"] == "user"] == ["one", "two"]
    with pytest.raises(ModelError):
        speaker.answer("yes " * 80, out.append)


def test_a_run_is_compared_with_its_base(settings: dict[str, Any], chatty: str) -> None:
    rows = make_rows("text", 8)
    for lora, name in ((None, "whole"), (4, "adapter")):
        result = alignkit.run(
            "sft", **{**settings, "model": chatty, "learning_rate": 0.1}, data=rows, lora=lora, name=name
        )
        trained, base = speakers(str(result.folder), "base", {**SHORT, "sampling.top_k": 1})
        assert (trained.name, base.name) == (name, Path(chatty).name)
        plain = AutoModelForCausalLM.from_pretrained(chatty)
        ids = torch.arange(5, 12)[None]
        with base.context(), torch.no_grad():
            assert torch.equal(base.model(ids).logits, plain(ids).logits)
        with trained.context(), torch.no_grad():
            assert not torch.allclose(trained.model(ids).logits, plain(ids).logits)
        assert (trained.model is base.model) == (lora is not None)


def test_what_has_no_base_is_an_error(chatty: str) -> None:
    with pytest.raises(ConfigError, match=r"'.*' is neither a run nor an adapter; name the model to compare with"):
        speakers(chatty, "base")


def test_a_run_of_objects_has_its_own_tokenizer_and_no_name_of_its_base(settings: dict[str, Any], chatty: str) -> None:
    given = settings | {"max_steps": 1, "model": AutoModelForCausalLM.from_pretrained(chatty)}
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    result = alignkit.run("sft", **given, tokenizer=tokenizer, data=make_rows("text", 8))
    [speaker] = speakers(str(result.folder), settings=SHORT)
    assert speaker.tokenizer.chat_template == TEMPLATE
    with pytest.raises(ConfigError, match="the run began with a model object, <LlamaForCausalLM>; name the model"):
        speakers(str(result.folder), "base", SHORT)


def test_a_run_keeps_its_settings_of_sampling(settings: dict[str, Any], chatty: str) -> None:
    given = {**settings, "model": chatty, "max_steps": 1}
    result = alignkit.run("sft", **given, data=make_rows("text", 8), template_date="2026-01-02")
    [speaker] = speakers(str(result.folder), settings=SHORT)
    assert str(speaker.config.template_date) == "2026-01-02"
    assert speaker.config.sampling.max_new_tokens == 6


@pytest.fixture
def chat(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run `alignkit chat ARGUMENTS`, with lines of standard input."""

    def call(*arguments: str, lines: str = "") -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return partial(command, "chat")(*arguments)

    return call


def test_the_command_answers_the_lines_of_standard_input(chat: Callable[..., Any], chatty: str, tiny: str) -> None:
    options = [part for name, value in SHORT.items() for part in ("--set", f"{name}={value}")]
    code, out, err = chat(chatty, "--against", tiny, *options, lines="one\n/undo\ntwo\n")
    assert code == 0
    names = [Path(folder).name for folder in (chatty, tiny)]
    assert [line.partition("> ")[0] for line in out.splitlines() if "> " in line][:2] == names
    assert f"without a chat template each message is continued as text: {names[1]}" in err


def test_errors_of_the_command(chat: Callable[..., Any], chatty: str) -> None:
    assert chat("no/such/model/here")[0] == 2
    code, _, err = chat(chatty, "--against", "base")
    assert code == 2
    assert "name the model to compare with" in err
    with pytest.raises(AlignkitError):
        speakers(chatty, settings={"sampling.temperature": 0})
