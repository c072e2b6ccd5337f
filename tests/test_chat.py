"""Conversations with the chat templates of 41 model families: nothing of a row is lost in silence."""

from __future__ import annotations

import json
import re
from datetime import date
from itertools import groupby
from typing import Any

import pytest
import torch
from families import FAMILIES, FOLDER, MARKED, tokenizer_of, training_text
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.data import FaultyRowsError, load
from alignkit.data.chat import Chat
from alignkit.data.chat.template import Template
from alignkit.data.tokenise import SPELLED, tokenise
from alignkit.errors import ConfigError

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "4 degrees, rain"}
# roles other than user and assistant, or tool calls: refused by the template itself or left out by it
NO_TOOLS = {"cohere", "cohere2", "gemma", "gemma3", "idefics3", "lfm2", "llama3", "llava_next", "phi3", "phi3_5",
            "qwen2_5_vl", "smolvlm"}  # fmt: skip
# an assistant's reasoning is shown where the turn is the last one
REASON = {"diffusion_gemma", "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "muse_glimmer",
          "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "qwen3",
          "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"}  # fmt: skip


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TWO_TURNS = {"messages": [user("Name a bird."), assistant("A gull."), user("And a fish?"), assistant("A cod.")]}
WITH_TOOLS = {
    "messages": [user("The weather?"), assistant(None, tool_calls=[CALL]), RESULT, assistant("It rains.")],
    "tools": [TOOL],
}
REASONED = {
    "messages": [
        user("Name a bird."),
        assistant("A gull.", reasoning_content="Birds fly."),
        user("And a fish?"),
        assistant("A cod.", reasoning_content="Fish swim."),
    ]
}


def read(name: str, row: dict[str, Any], kind: str = "text", **chat: Any) -> tuple[Any, Any, Any]:
    """Return the tokenizer, the row's example, and the report."""
    tokenizer = tokenizer_of(name)
    (example,), report = tokenise(load([row], kind), tokenizer, chat=Chat(**chat))
    return tokenizer, example, report


def whole(tokenizer: Any, example: Any, k: int = 0) -> str:
    return tokenizer.decode(torch.cat([example.prompt, example.completions[k].tokens]).tolist())


def learned(tokenizer: Any, example: Any, k: int = 0) -> list[str]:
    """Return the learned stretches of an answer."""
    completion = example.completions[k]
    trained = [True] * len(completion.tokens) if completion.trained is None else completion.trained.tolist()
    pairs = groupby(zip(completion.tokens.tolist(), trained, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in some]) for is_learned, some in pairs if is_learned]


def bare(text: str) -> str:
    return re.sub(r"\s|</s>", "", text)


# ---- which turns are learned, and in which text ---------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_turn_of_the_assistant_is_learned_and_nothing_else(name):
    tokenizer, example, _ = read(name, TWO_TURNS)
    turns = learned(tokenizer, example)
    assert len(turns) == 2
    assert "A gull." in turns[0]
    assert "A cod." in turns[1]
    assert not any("fish" in turn or "bird" in turn for turn in turns)
    for turn in turns:  # and its end, where the template writes one: the next speaker's opening is none
        ended = turn.rstrip().endswith(">") or name == "glm4moe"
        assert ended, turn


@pytest.mark.parametrize("row", [TWO_TURNS, WITH_TOOLS], ids=["two turns", "tools"])
@pytest.mark.parametrize("name", MARKED)
def test_the_text_and_the_turns_are_those_of_the_variant_that_trl_trains_with(name, row):
    if row is WITH_TOOLS and (name in NO_TOOLS or "deepseek" in name):  # its variants fail on tool calls
        pytest.skip("no tool calls in this template")
    if name in ("idefics3", "smolvlm", "llava_next"):  # read lists of parts only
        parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in row["messages"]]
        expected, turns = training_text(name, {"messages": parts})
    else:
        expected, turns = training_text(name, row)
    tokenizer, example, _ = read(name, row)
    if name == "glm4moe":  # its variant teaches the user's opening as the end of the last turn
        expected = expected.removesuffix("<|user|>")
    assert bare(whole(tokenizer, example)) == bare(expected)
    ours = "".join(learned(tokenizer, example))
    # theirs may begin with the opening of the turn, which is given when the model generates
    position = 0
    for turn in turns:
        words = [w for w in ("A gull.", "A cod.", "weather", "Oslo", "It rains.") if w in turn]
        for word in words:
            position = ours.find(word, position)
            assert position >= 0, word


@pytest.mark.parametrize("name", sorted(REASON))
def test_the_reasoning_of_every_learned_turn_is_learned(name):
    tokenizer, example, report = read(name, REASONED)
    turns = learned(tokenizer, example)
    assert len(turns) == 2
    for turn, reasoning, content in zip(turns, ("Birds fly.", "Fish swim."), ("A gull.", "A cod."), strict=True):
        assert turn.index(reasoning) < turn.index(content)
    by_turns = "rows rendered turn by turn, because the chat template rewrites earlier turns" in report.noted
    text, _ = training_text(name, REASONED) if name in MARKED else ("", [])
    assert by_turns != (name in ("muse_glimmer", "qwen3_8"))  # these show earlier reasoning themselves
    if name.startswith("qwen3"):  # where the variant keeps earlier reasoning, the texts are the same
        assert bare(whole(tokenizer, example)) == bare(text)


def test_the_last_turn_alone_stands_in_the_text_that_the_model_meets():
    tokenizer, example, report = read("qwen3", REASONED, train_on="last")
    assert learned(tokenizer, example) == ["<think>\nFish swim.\n</think>\n\nA cod.<|im_end|>"]
    rendered = tokenizer.apply_chat_template(REASONED["messages"], tokenize=False)
    assert whole(tokenizer, example) == rendered.rstrip("\n")
    assert report.noted == {
        "rows with reasoning_content of earlier messages left out by the chat template of qwen3": [1]
    }


def test_a_template_that_drops_the_reasoning_of_a_call_once_it_is_answered():
    row = {
        "messages": [
            user("The weather?"),
            assistant(None, reasoning_content="I look it up.", tool_calls=[CALL]),
            RESULT,
            assistant("It rains.", reasoning_content="It says rain."),
        ],
        "tools": [TOOL],
    }
    tokenizer, example, _ = read("gptoss", row)
    call, answer = learned(tokenizer, example)
    assert call == (
        "<|channel|>analysis<|message|>I look it up.<|end|><|start|>assistant to=functions.weather"
        '<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
    )
    assert answer == (
        "<|channel|>analysis<|message|>It says rain.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It rains.<|return|>"
    )


TEXTS = st.text("ab <>/#\n{}'\"é", min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=6), st.sampled_from(["qwen2_5", "llama3", "gemma", "phi3", "cohere"]))
def test_templates_that_keep_history_are_rendered_at_once(texts, name):
    texts = texts[: len(texts) // 2 * 2]
    messages = [(user if i % 2 == 0 else assistant)(text) for i, text in enumerate(texts)]
    tokenizer, example, report = read(name, {"messages": messages})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole(tokenizer, example).removesuffix("</s>").rstrip() == rendered.removesuffix("</s>").rstrip()
    assert len(learned(tokenizer, example)) == len(texts) // 2
    assert not report.noted


# ---- what stands beside the content ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*FAMILIES} - NO_TOOLS))
def test_tools_and_tool_calls_reach_the_template(name):
    tokenizer, example, report = read(name, WITH_TOOLS)
    call, answer = learned(tokenizer, example)
    assert "weather" in call
    assert "Oslo" in call
    assert "It rains." in answer
    assert "4 degrees" not in call + answer
    seen = "The weather now" in tokenizer.decode(example.prompt.tolist())
    assert seen != any("tools" in note for note in report.noted)
    assert seen != ("deepseek" in name)


@pytest.mark.parametrize("name", sorted(NO_TOOLS - {"llava_next"}))
def test_a_template_that_leaves_out_tool_calls_is_refused(name):
    with pytest.raises(FaultyRowsError, match=rf"tool_calls': the chat template of {name} leaves out 'weather'|raised"):
        read(name, WITH_TOOLS)


def test_a_row_with_tools_has_the_tokens_of_the_template():
    row = {"prompt": [user("The weather?")], "completion": "Rain.", "tools": [TOOL]}
    tokenizer, example, _ = read("qwen3", row)
    messages = [user("The weather?"), assistant("Rain.")]
    expected = tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False)
    without = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole(tokenizer, example) == expected.rstrip("\n")
    assert len(expected) > len(without) + 300


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "text", "prompts"])
def test_tools_reach_every_kind_from_a_column_as_json_or_from_the_run(kind):
    rows = {
        "pairs": {"chosen": "Rain.", "rejected": "Sun."},
        "unpaired": {"completion": "Rain.", "label": True},
        "text": {"completion": "Rain."},
        "prompts": {},
    }
    prompt = {"prompt": [user("The weather?")], **rows[kind]}
    for row, chat in (
        ({**prompt, "tools": [TOOL]}, {}),
        ({**prompt, "tools": json.dumps([TOOL])}, {}),
        (prompt, {"tools": [TOOL]}),
    ):
        tokenizer, example, _ = read("qwen3", row, kind, **chat)
        text = tokenizer.decode(example.prompt.tolist())
        expected = tokenizer.apply_chat_template(
            [user("The weather?")], tools=[TOOL], tokenize=False, add_generation_prompt=True
        )
        assert text == expected


def test_arguments_come_in_the_form_that_the_template_reads():
    as_text = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    for name in ("llama3_1", "deepseekv3", "qwen3", "gptoss"):  # tojson; text only; both; tojson
        texts = []
        for call in (CALL, as_text):
            messages = [user("The weather?"), assistant(None, tool_calls=[call]), RESULT, assistant("It rains.")]
            tokenizer, example, _ = read(name, {"messages": messages, "tools": [TOOL]})
            texts.append(whole(tokenizer, example))
        assert texts[0] == texts[1]
        assert '{"city": "Oslo"}' in texts[0]


def test_reasoning_is_read_under_each_of_its_names():
    texts = set()
    for field in ("reasoning_content", "thinking", "reasoning"):
        for name in ("qwen3", "gptoss", "lfm2_2_5"):
            tokenizer, example, _ = read(name, {"messages": [user("2 + 2?"), assistant("4", **{field: "Two twos."})]})
            texts.add((name, whole(tokenizer, example)))
            assert "Two twos." in "".join(learned(tokenizer, example))
    assert len(texts) == 3


def test_pairs_with_reasoning():
    row = {
        "prompt": [user("2 + 2?")],
        "chosen": [assistant("4", reasoning_content="Two and two are four.")],
        "rejected": [assistant("5", reasoning_content="Two and two are five.")],
    }
    tokenizer, example, _ = read("qwen3", row, "pairs")
    assert learned(tokenizer, example, 0) == ["<think>\nTwo and two are four.\n</think>\n\n4<|im_end|>"]
    assert learned(tokenizer, example, 1) == ["<think>\nTwo and two are five.\n</think>\n\n5<|im_end|>"]


def test_parts_of_a_content_are_one_text():
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a bird."}]
    for name in ("qwen3", "llama3", "gemma3", "smolvlm", "glm4moe"):
        row = {"messages": [user(parts), assistant([{"type": "text", "text": "Gull."}])]}
        tokenizer, example, _ = read(name, row)
        assert "Name a bird." in tokenizer.decode(example.prompt.tolist())
        assert "Gull." in learned(tokenizer, example)[0]
        assert "'type'" not in whole(tokenizer, example)


def test_images_are_refused_by_name():
    row = {"messages": [user([{"type": "image", "url": "x.png"}]), assistant("A gull.")]}
    with pytest.raises(FaultyRowsError, match=r"a part of the type 'image'; remove the row: only text is trained"):
        load([row], "text")


def test_a_developer_message_is_shown_or_reported():
    row = {"messages": [{"role": "developer", "content": "One word."}, user("A bird?"), assistant("Gull.")]}
    tokenizer, example, report = read("gptoss", row)
    assert "One word." in tokenizer.decode(example.prompt.tolist())
    assert not report.noted
    _, _, report = read("qwen3", row)
    assert report.lines() == ["1 rows with content of the developer left out by the chat template of qwen3 (row 1)"]


def test_variables_of_the_template_come_from_the_row_and_from_the_run():
    row = {"messages": [user("2 + 2?"), assistant("4")]}
    own = {**row, "chat_template_kwargs": {"enable_thinking": False}}
    for given_row, chat in (
        (own, {}),
        (row, {"arguments": {"enable_thinking": False}}),
        (own, {"arguments": {"enable_thinking": True}}),
    ):
        tokenizer, example, _ = read("qwen3", given_row, **chat)
        assert learned(tokenizer, example) == ["4<|im_end|>"]
    tokenizer, example, _ = read("qwen3", row)
    assert learned(tokenizer, example) == ["<think>\n\n</think>\n\n4<|im_end|>"]
    tokenizer, example, _ = read("gptoss", {**row, "chat_template_kwargs": '{"reasoning_effort": "high"}'})
    assert "Reasoning: high" in tokenizer.decode(example.prompt.tolist())


def test_variables_that_the_template_does_not_have_are_refused_or_reported():
    row = {"messages": [user("2 + 2?"), assistant("4")]}
    with pytest.raises(ConfigError, match=r"of qwen3 reads no 'enable_thinkin'\. Did you mean 'enable_thinking'\?"):
        read("qwen3", row, arguments={"enable_thinkin": False})
    with pytest.raises(ConfigError, match=r"'messages' is set by alignkit"):
        read("qwen3", row, arguments={"messages": []})
    _, _, report = read("llama3", {**row, "chat_template_kwargs": {"enable_thinking": False}})
    assert report.lines() == ["1 rows with 'enable_thinking', which the chat template of llama3 does not read (row 1)"]


def test_documents_reach_the_template_or_are_reported():
    row = {"messages": [user("Who?"), assistant("Ada.")], "documents": [{"title": "T", "text": "Ada wrote it."}]}
    tokenizer = tokenizer_of("qwen2_5")
    tokenizer.chat_template = (
        "{% for d in documents %}{{ d.title }}: {{ d.text }}\n{% endfor %}" + tokenizer.chat_template
    )
    (example,), report = tokenise(load([row], "text"), tokenizer)
    assert tokenizer.decode(example.prompt.tolist()).startswith("T: Ada wrote it.\n")
    assert not report.noted
    _, _, report = read("qwen2_5", row)
    assert report.lines() == ["1 rows with documents left out by the chat template of qwen2_5 (row 1)"]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("tools", ["weather"], "column 'tools': found \\['weather'\\]; give a list of JSON schemas"),
        ("tools", "weather", "column 'tools': found 'weather'"),
        ("chat_template_kwargs", "thinking", "column 'chat_template_kwargs': found 'thinking'; give an object"),
        ("messages", [user("q"), assistant(None, tool_calls="weather")], "tool_calls 'weather'; give"),
        (
            "messages",
            [user("q"), assistant("a", reasoning_content=["x"])],
            "has reasoning_content \\['x'\\]; give it as",
        ),
    ],
)
def test_what_cannot_be_read_is_a_fault(column, value, said):
    with pytest.raises(FaultyRowsError, match=said):
        load([{"messages": [user("q"), assistant("a")], column: value}], "text")


# ---- what a template leaves out -------------------------------------------------------------------------------------

TAGGED = {"messages": [user("2 + 2?"), assistant("<think>Two and two are four.</think>4")]}


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_a_cut_answer_is_refused_with_the_remedy(name):
    with pytest.raises(FaultyRowsError) as error:
        read(name, TAGGED)
    (fault,) = error.value.faults
    assert (fault.row, fault.column) == (1, "content")
    assert fault.found == f"the chat template of {name} leaves out 'Two and two are four.' of the answer"
    assert fault.fix.startswith("on_dropped: keep-by-hand writes it as plain text")


def test_a_cut_answer_is_reported_or_written_by_hand():
    tokenizer, example, report = read("deepseek_r1_distill", TAGGED, on_dropped="report")
    assert learned(tokenizer, example) == ["4<｜end▁of▁sentence｜>"]
    note = "answers without their content, which the chat template of deepseek_r1_distill leaves out"
    assert note in report.noted
    tokenizer, example, report = read("deepseek_r1_distill", TAGGED, on_dropped="keep-by-hand")
    # as the model is asked: the template opens the think block, with its own line break
    assert tokenizer.decode(example.prompt.tolist()).endswith("<｜Assistant｜><think>\n")
    assert learned(tokenizer, example) == ["Two and two are four.</think>4<｜end▁of▁sentence｜>"]
    note = "rows with content written by hand, because the chat template of deepseek_r1_distill leaves it out"
    assert report.noted == {note: [1]}


def test_reasoning_that_a_template_does_not_know_is_written_between_think_tags():
    row = {"messages": [user("2 + 2?"), assistant("4", reasoning_content="Two <|eot_id|> twos.")]}
    tokenizer, example, _ = read("llama3", row, on_dropped="keep-by-hand")
    assert learned(tokenizer, example) == ["<think>\nTwo <|eot_id|> twos.\n</think>\n\n4<|eot_id|>"]
    ids = example.completions[0].tokens.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 1  # the message's own is plain text


def test_both_turns_of_a_cut_conversation_are_written_by_hand():
    messages = [
        user("2 + 2?"),
        assistant("<think>Twos.</think>4"),
        user("3 + 3?"),
        assistant("<think>Threes.</think>6"),
    ]
    tokenizer, example, _ = read("deepseek_r1_distill", {"messages": messages}, on_dropped="keep-by-hand")
    end = "<｜end▁of▁sentence｜>"
    assert learned(tokenizer, example) == [f"Twos.</think>4{end}", f"Threes.</think>6{end}"]


def test_a_short_answer_is_not_found_in_the_reasoning():
    template = "{% for m in messages %}{{ m.role }}: {{ m.reasoning_content }}<|im_end|>{% endfor %}"
    tokenizer = tokenizer_of("qwen2_5")
    tokenizer.chat_template = template
    row = {"prompt": [user("2 + 2?")], "completion": [assistant("4", reasoning_content="2 + 2 is 4")]}
    with pytest.raises(FaultyRowsError, match="leaves out '4' of the answer"):
        tokenise(load([row], "text"), tokenizer)


# ---- the beginning of an answer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prefill_is_part_of_the_prompt(name):
    row = {
        "prompt": [user("Name a bird as JSON."), assistant('{"bird":')],
        "chosen": ' "gull"}',
        "rejected": [assistant(" gull")],
    }
    tokenizer, example, _ = read(name, row, "pairs")
    assert tokenizer.decode(example.prompt.tolist()).endswith('{"bird":')
    assert learned(tokenizer, example, 0)[0].startswith(' "gull"}')
    assert learned(tokenizer, example, 1)[0].startswith(" gull")
    _, asked, _ = read(name, {"prompt": row["prompt"]}, "prompts")
    assert asked.prompt.tolist() == example.prompt.tolist()


# ---- text that was templated beforehand ------------------------------------------------------------------------------

TEMPLATED = {
    "prompt": "<|im_start|>user\nName a bird.<|im_end|>\n<|im_start|>assistant\n",
    "chosen": "A gull.<|im_end|>",
    "rejected": "A cod.<|im_end|>",
}


def test_control_tokens_in_text_are_read_as_such_when_the_user_says_so():
    messages = {"prompt": [user("Name a bird.")], "chosen": "A gull.", "rejected": "A cod."}
    _, expected, _ = read("qwen2_5_vl", messages, "pairs")
    tokenizer, example, report = read("qwen2_5_vl", TEMPLATED, "pairs", special_tokens=True)
    system = tokenizer.apply_chat_template([user("x")], tokenize=False).index("<|im_start|>user")
    n_system = len(tokenizer(tokenizer.apply_chat_template([user("x")], tokenize=False)[:system])["input_ids"])
    assert example.prompt.tolist() == expected.prompt.tolist()[n_system:]
    for mine, theirs in zip(example.completions, expected.completions, strict=True):
        assert mine.tokens.tolist() == theirs.tokens.tolist()  # no second end
    assert not report.noted


@pytest.mark.parametrize("kind", ["pairs", "text", "prompts"])
def test_control_tokens_in_text_are_noticed_in_prompts_too(kind):
    row = {"prompt": TEMPLATED["prompt"], "chosen": "A gull.", "rejected": "A cod."}
    _, _, report = read("qwen2_5", row, kind)
    assert report.noted == {SPELLED: [1]}


# ---- the date --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "written"), [("llama3_2", "Today Date: 03 Feb 2025"), ("gptoss", "date: 2025-02-03")])
def test_the_date_of_a_template_is_pinned(name, written):
    row = {"messages": [user("2 + 2?"), assistant("4")]}
    tokenizer, example, _ = read(name, row, date=date(2025, 2, 3))
    assert written in tokenizer.decode(example.prompt.tolist())
    assert Template(tokenizer).writes_date
    assert not Template(tokenizer_of("qwen3")).writes_date


def test_templates_are_there():
    assert len(FAMILIES) == 41
    assert FOLDER.is_dir()
