"""Chat templates that are not in any list, and rows that are odd but legal."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest
from families import tokenizer_of
from test_chat import CALL, RESULT, TOOL, assistant, learned, read, user, whole

from alignkit.data import FaultyRowsError, load
from alignkit.data.chat import Chat
from alignkit.data.chat.template import Template
from alignkit.data.tokenise import tokenise

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}",
)


def tokenizer(template: str) -> Any:
    made = tokenizer_of("qwen2_5")
    made.chat_template = template
    return made


def read_with(template: str, row: dict[str, Any], kind: str = "text", **chat: Any) -> tuple[Any, Any, Any]:
    made = tokenizer(template)
    (example,), report = tokenise(load([row], kind), made, chat=Chat(**chat))
    return made, example, report


# ---- where an answer begins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "prompts"])
def test_a_prompt_does_not_end_with_a_tool_call(kind):
    row = {"prompt": [user("q"), assistant(None, tool_calls=[CALL])], "completion": [assistant("x")]}
    with pytest.raises(FaultyRowsError, match="column 'prompt': found a tool call at the end; end the prompt with"):
        read_with(CALLS, row, kind)


def test_turns_of_the_assistant_in_a_row_stay_turns():
    row = {
        "chosen": [user("q"), assistant("a1"), assistant("a2")],
        "rejected": [user("q"), assistant("a1"), assistant("b2")],
    }
    made, example, _ = read_with(CHATML, row, "pairs")
    assert learned(made, example) == ["a1<|im_end|>", "a2<|im_end|>"]
    rendered = made.apply_chat_template(row["chosen"], tokenize=False)
    assert whole(made, example) == rendered.rstrip("\n")


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe"])
def test_a_think_block_that_was_begun_is_continued(name):
    row = {"prompt": [user("q"), assistant("<think>\nLet me")], "completion": " see.\n</think>\n\nfour."}
    made, example, _ = read(name, row)
    assert made.decode(example.prompt.tolist()).endswith("<think>\nLet me")
    assert learned(made, example)[0].startswith(" see.")
    _, asked, _ = read(name, {"prompt": row["prompt"]}, "prompts")
    assert asked.prompt.tolist() == example.prompt.tolist()


def test_an_opening_that_the_answers_text_lacks_is_reported():
    header = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {{ controls }}\n{% endif %}"
    )
    row = {"prompt": [user("q")], "completion": "x", "chat_template_kwargs": {"controls": "short"}}
    _, _, report = read_with(header, row)
    (note,) = report.noted
    assert note.startswith("rows without ' short\\n', with which the chat template of")
    _, _, report = read("deepseek_r1_distill", {"messages": [user("q"), assistant("x")]})
    assert [note for note in report.noted if "<think>" in note]


def test_history_that_changes_once_an_answer_follows_stays_as_the_model_is_given_it():
    call = assistant(None, reasoning_content="I look it up.", tool_calls=[CALL])
    row = {
        "prompt": [user("q"), call, RESULT],
        "chosen": [assistant("It rains.")],
        "rejected": [assistant("Sun.")],
        "tools": [TOOL],
    }
    made, example, _ = read("gptoss", row, "pairs")
    _, asked, _ = read("gptoss", {"prompt": row["prompt"], "tools": [TOOL]}, "prompts")
    assert example.prompt.tolist() == asked.prompt.tolist()
    assert "I look it up." in made.decode(example.prompt.tolist())
    assert learned(made, example) == ["<|channel|>final<|message|>It rains.<|return|>"]


def test_a_system_message_that_moves_to_the_last_user():
    mistral = (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {% if system is defined and messages[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list "
        "| length == 0 %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    system = {"role": "system", "content": "SYS"}
    made, example, _ = read_with(
        mistral, {"messages": [system, user("q1"), assistant("a1"), user("q2"), assistant("a2")]}
    )
    assert learned(made, example) == [" a1</s>", " a2</s>"]
    assert whole(made, example) == "<s>[INST] SYS\n\nq1[/INST] a1</s>[INST] SYS\n\nq2[/INST] a2</s>"


# ---- where a turn ends ----------------------------------------------------------------------------------------------


def test_the_opening_of_the_users_turn_is_not_learned_as_an_end():
    made = tokenizer_of("phi3")
    made.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% if m.role == 'assistant' and loop.last %}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    row = {"messages": [user("q1"), assistant("a1"), user("q2"), assistant("a2")]}
    (example,), _ = tokenise(load([row], "text"), made)
    assert not any("<|user|>" in turn for turn in learned(made, example))


def test_a_turn_of_which_nothing_is_left_is_not_learned():
    rows = [{"messages": [user("q"), assistant(None, tool_calls=[CALL])]}, {"messages": [user("q"), assistant("x")]}]
    examples, report = tokenise(load(rows, "text"), tokenizer(CHATML), chat=Chat(on_dropped="report"))
    assert [e.row for e in examples] == [2]
    assert report.dropped == {"with an answer that became empty": [1]}
    row = {"messages": [user("q"), assistant(None, tool_calls=[CALL]), RESULT, assistant("x")]}
    made, example, _ = read_with(CHATML, row, on_dropped="report")
    assert learned(made, example) == ["x<|im_end|>"]


# ---- what is found and what is not ----------------------------------------------------------------------------------


def test_by_hand_an_answer_follows_the_opening_that_the_model_is_given():
    closing = (  # as DeepSeek-V3.1: the template closes the think block of every answer itself
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|im_end|></think>"
        "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|>{{ '<think>' if thinking else '</think>' }}{% endif %}"
    )
    row = {
        "prompt": [user("q")],
        "chosen": [assistant("a", reasoning_content="r1")],
        "rejected": [assistant("b", reasoning_content="r2")],
    }
    made, example, _ = read_with(closing, row, "pairs", on_dropped="keep-by-hand", arguments={"thinking": True})
    assert whole(made, example) == "<|im_start|>q<|im_end|><think>r1\n</think>\n\na</s>"
    assert made.decode(example.prompt.tolist()).endswith("<think>")
    with pytest.raises(FaultyRowsError, match="leaves out 'r1' of the answer"):  # the model is told not to reason
        read_with(closing, row, "pairs", on_dropped="keep-by-hand")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (assistant("x", reasoning_content="im"), "leaves out 'im'"),  # is in <|im_end|>
        (assistant("x", reasoning_content="x"), "leaves out 'x'"),
        (assistant("x", thinking="deep", reasoning_content="x"), "leaves out 'deep'|leaves out 'x'"),
    ],
)
def test_a_word_that_stands_elsewhere_is_not_the_part(message, said):
    with pytest.raises(FaultyRowsError, match=said):
        read_with(CHATML, {"messages": [user("q"), message]})


def test_content_that_is_only_a_word_of_the_call_is_missed():
    without = CALLS.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}")
    with pytest.raises(FaultyRowsError, match="leaves out 'name' of the answer"):
        read_with(without, {"messages": [user("q"), assistant("name", tool_calls=[CALL])]})


def test_truth_values_of_arguments_are_looked_for():
    names = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% for k in c.function.arguments %}"
        "<{{ k }}></{{ k }}>{% endfor %}{% endfor %}",
    )
    call = {"type": "function", "function": {"name": "run", "arguments": {"dry": True}}}
    with pytest.raises(FaultyRowsError, match="leaves out 'true'"):
        read_with(names, {"messages": [user("q"), assistant(None, tool_calls=[call])]})


@pytest.mark.parametrize(
    "arguments",
    [
        {"body": json.dumps({"code": 'x = 1\ny = "2"'})},
        {"b": ['it\'s "x"', 1.5, None, True]},
        '{"x": 1e3}',
        '{"url": "https:\\/\\/a.b"}',
        '{"x": "\\u00e9"}',
        "",
        {},
    ],
)
@pytest.mark.parametrize("shown", ["tojson", "string"])
def test_arguments_that_are_shown_are_found(arguments, shown):
    template = CALLS.replace(
        "{{ c.function | tojson }}",
        "{{ c.function.name }}{{ c.function.arguments if c.function.arguments is string else c.function.arguments | "
        + shown
        + " }}",
    )
    call = {"type": "function", "id": "c", "function": {"name": "run", "arguments": arguments}}
    made, example, _ = read_with(template, {"messages": [user("q"), assistant(None, tool_calls=[call])]})
    assert "run" in learned(made, example)[0]


# ---- what is not read is reported -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "chat", "said"),
    [
        ({"documents": ["one", "two"]}, {}, "`documents` are no list of objects"),
        ({"documents": "[broken"}, {}, "`documents` are no list of objects"),
        ({}, {"tools": [TOOL]}, "rows with tools left out by the chat template"),
        ({"messages": [user("q"), assistant("x", function_call={"name": "f"})]}, {}, "'function_call' in a message"),
        ({"messages": [user("q"), assistant("x", weight=0)]}, {}, "'weight' in a message"),
    ],
)
def test_what_a_template_does_not_read_is_reported(row, chat, said):
    dataset = load([{"messages": [user("q"), assistant("x")], **row}], "text")
    _, report = tokenise(dataset, tokenizer(CHATML), chat=Chat(**chat))
    assert any(said in note for note in (dataset.report + report).noted)


def test_a_template_that_shows_only_the_names_of_tools_is_reported():
    names = "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }}\n{% endfor %}" + CHATML
    _, _, report = read_with(names, {"messages": [user("q"), assistant("x")], "tools": [TOOL]})
    assert any("rows with tools left out" in note for note in report.noted)


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tools"])
def test_variables_that_are_set_elsewhere_are_refused_in_rows(name):
    row = {"messages": [user("q"), assistant("x")], "chat_template_kwargs": {name: []}}
    with pytest.raises(FaultyRowsError, match=f"found '{name}', which alignkit sets itself; remove it"):
        load([row], "text")


def test_a_part_of_reasoning_is_no_image():
    row = {"messages": [user("q"), assistant([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "x"}])]}
    with pytest.raises(FaultyRowsError, match="a part of the type 'thinking'; give it as `reasoning_content`"):
        load([row], "text")


def test_variables_of_the_template_for_tools_are_known():
    made = tokenizer_of("qwen2_5")
    made.chat_template = {"default": CHATML, "tool_use": "{{ style }}{% for t in tools %}{{ t }}{% endfor %}" + CALLS}
    row = {"messages": [user("q"), assistant(None, tool_calls=[CALL])], "tools": [TOOL]}
    (example,), _ = tokenise(load([row], "text"), made, chat=Chat(arguments={"style": "XML"}))
    assert made.decode(example.prompt.tolist()).startswith("XML{")


# ---- dates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("{{ strftime_now('%d ' ~ '%b') }}", "04 Jul"),
        ('{{ strftime_now("%Y" if true else "%m") }}', "2024"),
        ("{% set f = '%-d %B %Y' %}{{ strftime_now(f) }}", "4 July 2024"),
        ("{% macro today() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ today() }}", "2024-07-04"),
        ("{% if strftime_now is defined %}{{ strftime_now(format='%A') }}{% endif %}", "Thursday"),
        ("\n  {{ strftime_now('%H:%M') }}", "\n  00:00"),
    ],
)
def test_a_date_is_pinned_however_the_template_asks_for_it(source, written):
    made = tokenizer(source + "|" + CHATML)
    assert Template(made).writes_date
    text = Template(made, date(2024, 7, 4)).render([user("q")])
    assert text.split("|")[0] == written


def test_the_template_for_tools_may_write_a_date_too():
    made = tokenizer_of("qwen2_5")
    made.chat_template = {"default": CHATML, "tool_use": "{{ strftime_now('%Y') }}" + CHATML}
    assert Template(made).writes_date
