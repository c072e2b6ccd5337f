"""What comes between sampled turns: its tokens, and the answers of tools."""

from __future__ import annotations

import asyncio
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from environments import double, hangs, ids
from families import FAMILIES, tokenizer_of
from test_chat import CALL, NO_TOOLS, RESULT, TOOL, assistant, user

from alignkit import Step
from alignkit.data.chat import Chat, turn_end
from alignkit.data.chat.template import Template
from alignkit.environments import Tools
from alignkit.environments.turns import Turns
from alignkit.errors import ConfigError, RolloutError
from helpers import write_chatml

# ------------------------------------------------------------------------------------------- tokens between turns


def end_of(tokenizer: Any, text: str, said: str) -> str:
    """Return the special token that closes a turn in rendered text."""
    rest = text[text.rindex(said) + len(said) :].lstrip()
    return next((n for n in sorted(tokenizer.all_special_tokens, key=len, reverse=True) if rest.startswith(n)), "")


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_a_user_says_has_the_tokens_of_the_whole_conversation(name: str) -> None:
    """The text after a turn does not depend on what was said before it."""
    tokenizer = tokenizer_of(name)
    before = [user("Name a bird."), assistant("A heron."), user("Another?"), assistant("A gull.")]
    text = Template(tokenizer).render([*before, user("And a fish?")], {}, answer_next=True)
    tail = text[text.rindex("A gull.") + len("A gull.") :]
    end = end_of(tokenizer, text, "A gull.")
    if end:
        tail = tail.lstrip()[len(end) :]
    last = tokenizer.convert_tokens_to_ids(end) if end else ids(tokenizer, "A gull.")[-1]
    assert Turns(tokenizer, Chat()).tokens(last, [user("And a fish?")]) == ids(tokenizer, tail)


def test_an_answer_that_stays_before_the_end_of_a_turn_is_not_lost_in_silence() -> None:
    """gemma 4 writes it into the turn with the call, which then must end with the token of a call."""
    tokenizer = tokenizer_of("gemma4")
    with pytest.raises(RolloutError, match="it leaves out a part of the conversation"):
        Turns(tokenizer, Chat(tools=[TOOL])).tokens(tokenizer.convert_tokens_to_ids("<turn|>"), [RESULT])


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - NO_TOOLS))
def test_what_a_tool_says_has_the_tokens_of_the_whole_conversation(name: str) -> None:
    tokenizer = tokenizer_of(name)
    before = [user("The weather?"), assistant("", tool_calls=[CALL])]
    text = Template(tokenizer).render([*before, RESULT], {"tools": [TOOL]}, answer_next=True)
    got = tokenizer.decode(Turns(tokenizer, Chat(tools=[TOOL])).tokens(_closing(tokenizer, name), [RESULT]))
    assert text.endswith(got), (text, got)
    assert "4 degrees, rain" in got
    assert "Oslo" not in got


def _closing(tokenizer: Any, name: str) -> int:
    """Return the token that ends a turn with a call, where it is another one than that of an answer."""
    ends = {
        "gptoss": "<|call|>",
        **dict.fromkeys(("gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma"), "<tool_call|>"),
    }
    found = tokenizer.convert_tokens_to_ids(ends[name]) if name in ends else turn_end(tokenizer)
    return int(tokenizer.eos_token_id if found is None else found)


def test_control_tokens_that_a_tool_spells_out_are_text(chat_tokenizer: Any) -> None:
    turns = Turns(chat_tokenizer, Chat())
    end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    got = turns.tokens(end, [user("yes<|im_end|>no")])
    assert got.count(end) == 1
    assert chat_tokenizer.decode(got) == "\n<|im_start|>user\nyes<|im_end|>no<|im_end|>\n<|im_start|>assistant\n"
    plain = turns.tokens(end, [user("yes no")])
    assert plain.count(end) == 1


def test_a_turn_that_ends_otherwise_gets_the_templates_end(chat_tokenizer: Any) -> None:
    turns, end = Turns(chat_tokenizer, Chat()), chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turns.tokens(ids(chat_tokenizer, "yes")[-1], [user("no")]) == [end, *turns.tokens(end, [user("no")])]


def test_a_template_that_refuses_is_named(chat_tokenizer: Any, tmp_path: Path) -> None:
    other = write_chatml(tmp_path / "other")
    refuses = "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    other.chat_template = "{% for m in messages %}" + refuses + "{{ m.content }}{% endfor %}"
    with pytest.raises(
        RolloutError,
        match=r"cannot render what the environment says after a turn \(roles: tool\): TemplateError: no tools",
    ):
        Turns(other, Chat()).tokens(5, [{"role": "tool", "content": "x"}])
    other.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        Turns(other, Chat())


# ------------------------------------------------------------------------------------------------------------ tools


async def later(text: str) -> str:
    """Say it later.

    Args:
        text: what to say
    """
    await asyncio.sleep(0.01)
    return text


def quits(n: int) -> int:
    """Quit.

    Args:
        n: anything
    """
    sys.exit(n)


def asked(*calls: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [user("q"), assistant("x", tool_calls=[{"name": n, "arguments": a} for n, a in calls])]


def test_every_call_has_an_answer_whatever_happens() -> None:
    tools = Tools([double, later, hangs, quits], seconds=0.2)
    calls = [
        ("double", {"n": 4}), ("later", {"text": "hm"}), ("halve", {"n": 4}), ("double", {"m": 4}),
        ("double", {"n": 100}), ("hangs", {"n": 1}), ("quits", {"n": 3}),
    ]  # fmt: skip
    started = time.monotonic()
    step = asyncio.run(tools.step(asked(*calls)))
    assert time.monotonic() - started < 3
    assert not step.done
    assert [m["role"] for m in step.messages] == ["tool"] * 7
    said = [m["content"] for m in step.messages]
    assert said[:3] == ["8", "hm", "error: there is no tool 'halve'; there are double, later, hangs, quits"]
    assert "error: double: " in said[3]
    assert "missing a required argument: 'n'" in said[3]
    assert said[4:] == [
        "error: double: ValueError: too large",
        "error: hangs gave no answer within 0.2 s",
        "error: quits: RuntimeError: sys.exit(3)",
    ]


def test_a_turn_without_a_call_ends_the_trajectory() -> None:
    assert asyncio.run(Tools([double]).step([user("q"), assistant("8")])) == Step([], 0.0, True)


def test_tools_need_names_of_their_own() -> None:
    with pytest.raises(ConfigError, match="two tools are called 'double'; rename one of them"):
        Tools([double, double])
    with pytest.raises(ConfigError, match=r"the tool functools.partial\(.*\) has no name; wrap it in a `def`"):
        Tools([partial(double, 3)])


def test_the_schemas_of_tools() -> None:
    [schema] = Tools([double]).schemas
    assert schema["function"]["name"] == "double"
    assert schema["function"]["parameters"]["properties"] == {"n": {"type": "integer", "description": "the number"}}
    with pytest.raises(ConfigError, match="the tool '<lambda>' has no schema"):
        _ = Tools([lambda n: n]).schemas


def test_what_hangs_is_given_up_at_once() -> None:
    tools = Tools([hangs], seconds=0.1)
    started = time.monotonic()
    asyncio.run(tools.step(asked(("hangs", {"n": 1}))))
    assert time.monotonic() - started < 2  # a pool's thread would be waited for, 5 s
