"""Rows become tokens: borders, beginnings and ends, chat templates, special tokens, cuts."""

from __future__ import annotations

import os
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from families import tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from alignkit.data import FaultyRowsError, load
from alignkit.data.chat import Chat, Draft
from alignkit.data.encoder import Encoder, is_direct
from alignkit.data.rows import Row
from alignkit.data.tokenise import SPELLED, tokenise
from alignkit.errors import ConfigError, ModelError

DATA = Path(os.environ.get("ALIGNKIT_DATA", Path(__file__).parents[2] / "shared/data"))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "the user said hello there and the assistant said hello world again, system tool Human: Assistant: 1 2 3 4 5 6\n"
)


@cache
def backend() -> str:
    """A byte-level BPE with four special tokens: <s> 0, </s> 1, <|im_start|> 2, <|im_end|> 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 9, trainer)
    return tokenizer.to_str()


def make(bos: bool = False, template: str | None = None, eos: str | None = "</s>", **options):
    built = Tokenizer.from_str(backend())
    if bos:
        built.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>" if bos else None, eos_token=eos, **options
    )
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str, first: str = "user") -> list[dict]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def first(rows: list[dict], kind: str, tokenizer, *limits, **options):
    examples, _ = tokenise(load(rows, kind), tokenizer, *limits, **options)
    return examples[0]


def tokens(example) -> tuple[list[int], ...]:
    return example.prompt.tolist(), *(completion.tokens.tolist() for completion in example.completions)


# ---- text: borders, beginnings and ends -----------------------------------------------------------------------------


def test_a_prompt_and_its_answers():
    t = make()
    example = first([{"prompt": "the user said", "chosen": " hello", "rejected": " again"}], "pairs", t)
    assert tokens(example) == (plain(t, "the user said"), [*plain(t, " hello"), 1], [*plain(t, " again"), 1])
    assert {example.prompt.dtype, example.completions[0].tokens.dtype} == {torch.int32}
    assert [completion.trained for completion in example.completions] == [None, None]
    assert example.row == 1


def test_a_token_that_reaches_over_the_border_belongs_to_the_completions():
    t = make()
    hello = plain(t, " hello")
    assert len(hello) == 1  # so " hel" + "lo" meet inside one token
    example = first([{"prompt": "said hel", "chosen": "lo", "rejected": "p"}], "pairs", t)
    said = plain(t, "said")
    assert example.prompt.tolist() == said
    assert example.completions[0].tokens.tolist() == [*hello, 1]
    assert example.completions[1].tokens.tolist() == [*plain(t, "said help")[len(said) :], 1]


def test_a_common_beginning_of_the_answers_is_learned():
    t = make()
    example = first([{"prompt": "said", "chosen": " hello world", "rejected": " hello there"}], "pairs", t)
    assert example.prompt.tolist() == plain(t, "said")
    assert example.completions[0].tokens.tolist() == [*plain(t, " hello world"), 1]


@settings(max_examples=60, deadline=None)
@given(
    st.text("helo wrd,\né ", max_size=12),
    st.lists(st.text("helo wrd,\né ", min_size=1, max_size=9), min_size=2, max_size=2),
)
def test_prompt_and_completion_are_the_joint_tokenisation(prompt, answers):
    t = make()
    if answers[0] == answers[1] or not all(answer.strip() for answer in answers):
        return
    got = tokens(first([{"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}], "pairs", t))
    alone = plain(t, prompt)
    for k, answer in enumerate(answers, 1):
        whole = got[0] + got[k]
        joint = [*plain(t, prompt + answer), 1]
        assert whole in (joint, [1, *joint])  # without a prompt's token, EOS is the context
        shared = got[0] if whole == joint else got[0][1:]
        assert shared == alone[: len(shared)]


def test_exactly_one_bos_and_one_eos():
    t = make(bos=True)
    assert t("said")["input_ids"] == [0, *plain(t, "said"), 1]  # the tokenizer would end prompts too
    want = ([0, *plain(t, "said")], [*plain(t, " hello"), 1])
    assert tokens(first([{"prompt": "said", "completion": " hello"}], "text", t)) == want
    assert tokens(first([{"prompt": "<s>said", "completion": " hello</s>"}], "text", t)) == want
    spelled = first([{"prompt": "<s>said", "completion": " hello</s>"}], "text", t, chat=Chat(special_tokens=True))
    assert tokens(spelled) == want


@pytest.mark.parametrize(("bos", "context"), [(True, 0), (False, 1)])
def test_an_empty_prompt_keeps_one_token_of_context(bos, context):
    t = make(bos=bos)
    assert tokens(first([{"text": "hello"}], "text", t)) == ([context], [*plain(t, "hello"), 1])
    assert tokens(first([{"text": "<s>hello</s>"}], "text", make(bos=True))) == ([0], [*plain(t, "hello"), 1])


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ConfigError, match=r"no end-of-sequence token; set tokenizer\.eos_token"):
        tokenise(load([{"text": "x"}], "text"), make(eos=None))


def test_masks_do_not_come_from_the_pad_token():
    t = make(pad_token="</s>")
    completion = first([{"prompt": "said", "completion": " hello"}], "text", t).completions[0]
    assert completion.trained is None
    assert completion.tokens[-1] == t.pad_token_id


def test_prompts_have_no_completions():
    t = make(template=CHATML, bos=True)
    assert tokens(first([{"prompt": "said"}], "prompts", t)) == ([0, *plain(t, "said")],)
    example = first([{"prompt": chat("hello")}], "prompts", t)
    assert tokens(example) == ([2, *plain(t, "user\nhello"), 3, *plain(t, "\n"), 2, *plain(t, "assistant\n")],)


def test_numbers_and_row_numbers_are_kept():
    rows = [{"prompt": "q", "completion": "c", "label": False}, {"prompt": "q", "completion": "d", "label": True}]
    examples, _ = tokenise(load(rows, "unpaired"), make())
    assert [(e.row, e.numbers["desirable"]) for e in examples] == [(1, 0.0), (2, 1.0)]


# ---- special tokens inside the text ---------------------------------------------------------------------------------


def test_special_tokens_in_text_are_plain_text():
    t = make(bos=True)
    rows = [{"prompt": "said", "completion": " <|im_end|> hello <s> there"}, {"prompt": "said", "completion": " hello"}]
    examples, report = tokenise(load(rows, "text"), t)
    got = examples[0].completions[0].tokens.tolist()
    assert not {0, 2, 3} & set(got)
    assert t.decode(got[:-1]) == " <|im_end|> hello <s> there"
    assert report.noted == {SPELLED: [1]}
    examples, report = tokenise(load(rows, "text"), t, chat=Chat(special_tokens=True))
    assert {0, 3} < set(examples[0].completions[0].tokens.tolist())
    assert report.lines() == []


def test_special_tokens_in_messages_are_plain_text_and_those_of_the_template_are_not():
    t = make(template=CHATML)
    inside = "hello<|im_end|>\n<|im_start|>system said"
    examples, report = tokenise(load([{"prompt": chat(inside), "completion": "there </s> again"}], "text"), t)
    prompt, answer = tokens(examples[0])
    assert prompt.count(2) == 2
    assert (prompt.count(3), answer.count(1), answer.count(3)) == (1, 0, 1)
    assert t.decode(prompt) == f"<|im_start|>user\n{inside}<|im_end|>\n<|im_start|>assistant\n"
    assert t.decode(answer) == "there </s> again<|im_end|>"
    assert report.noted == {SPELLED: [1]}


def test_hiding_special_tokens_changes_no_other_token():
    t = make(template=CHATML)
    rows = [
        {"prompt": chat("the user said <s>"), "completion": "hello there"},
        {"prompt": chat("hi"), "completion": "hello there"},
    ]
    examples, _ = tokenise(load(rows, "text"), t)
    assert tokens(examples[0])[1] == tokens(examples[1])[1]
    prompt = tokens(examples[0])[0]
    assert prompt[: 1 + len(plain(t, "user\nthe user said"))] == [2, *plain(t, "user\nthe user said")]


def test_private_use_characters_of_the_user_survive():
    t = make(template=CHATML)
    text = "\U000f0000 <s> \U000f0001"
    assert (
        t.decode(first([{"prompt": chat("hi"), "completion": text}], "text", t).completions[0].tokens)
        == text + "<|im_end|>"
    )


def test_tokens_that_swallow_white_space_do_so_beside_hidden_text():
    t = make(template="{% for m in messages %}<|im_start|>{{ m.role }}<|sep|>\n{{ m.content }}<|im_end|>{% endfor %}")
    t.add_special_tokens({"additional_special_tokens": [AddedToken("<|sep|>", rstrip=True, special=True)]})
    normal = first([{"prompt": chat("hello")}], "prompts", t).prompt.tolist()
    hidden = first([{"prompt": chat("hello<s>")}], "prompts", t).prompt.tolist()
    assert normal[:-1] == hidden[: len(normal) - 1]


# ---- chat templates -------------------------------------------------------------------------------------------------


def test_a_template_that_ends_the_turn_gets_no_second_end():
    t = make(template=CHATML, bos=True)
    example = first([{"prompt": chat("hello"), "chosen": "there", "rejected": "again"}], "pairs", t)
    prompt = [2, *plain(t, "user\nhello"), 3, *plain(t, "\n"), 2, *plain(t, "assistant\n")]
    assert tokens(example) == (prompt, [*plain(t, "there"), 3], [*plain(t, "again"), 3])


def test_an_answer_that_looks_like_the_end_is_not_the_end():
    t = make(template=CHATML)
    completion = first([{"prompt": chat("hello"), "completion": "im_end"}], "text", t).completions[0]
    assert completion.tokens.tolist() == [*plain(t, "im_end"), 3]


def test_a_template_without_an_end_gets_one():
    t = make(template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    example = first([{"prompt": chat("hello"), "completion": "there"}], "text", t)
    assert tokens(example) == (plain(t, "user: hello\n"), [*plain(t, "assistant: there\n"), 1])


def test_a_generation_prompt_that_differs_from_the_answers_header():
    thinking = CHATML.replace("assistant\n{% endif", "assistant\n(again){% endif")
    t = make(template=thinking)
    example = first([{"prompt": chat("hello"), "completion": "there"}], "text", t)
    assert tokens(example)[1] == [*plain(t, "there"), 3]
    assert tokens(example)[0][-1] == plain(t, "assistant\n")[-1]


def test_only_the_assistants_turns_of_an_answer_are_learned():
    t = make(template=CHATML)
    answer = [*chat("hello", "the user said", "world", first="assistant")]
    answer[1]["role"] = "tool"
    example = first([{"prompt": chat("said"), "completion": answer}], "text", t)
    (completion,) = example.completions
    learned = completion.tokens[completion.trained_at].tolist()
    assert learned == [*plain(t, "hello"), 3, *plain(t, "world"), 3]
    assert (
        t.decode(completion.tokens)
        == "hello<|im_end|>\n<|im_start|>tool\nthe user said<|im_end|>\n<|im_start|>assistant\nworld<|im_end|>"
    )


def test_learned_turns_are_found_beside_hidden_special_tokens():
    t = make(template=CHATML)
    answer = chat("hello <s>", "and <|im_start|>", "world </s></s>", first="assistant")
    (completion,) = first([{"prompt": chat("</s> said"), "completion": answer}], "text", t).completions
    assert t.decode(completion.tokens[completion.trained_at]) == "hello <s><|im_end|>world </s></s><|im_end|>"
    assert completion.tokens[completion.trained_at].tolist().count(3) == 2


def test_turns_without_special_tokens_do_not_teach_the_users_words():
    t = make(template="{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}")
    answer = chat("hello", "there", "world", first="assistant")
    (completion,) = first([{"prompt": chat("said"), "completion": answer}], "text", t).completions
    learned = t.decode(completion.tokens[completion.trained_at])
    assert "user" not in learned
    assert "there" not in learned
    assert "hello" in learned
    assert "world" in learned


REWRITING = (  # leaves out what the assistant said before the last user's message
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_earlier_turns_that_the_template_rewrites_are_not_learned_and_counted():
    t = make(template=REWRITING)
    answer = chat("hello", "there", "world", first="assistant")
    examples, report = tokenise(load([{"prompt": chat("said"), "completion": answer}], "text"), t)
    (completion,) = examples[0].completions
    assert completion.tokens[completion.trained_at].tolist() == [*plain(t, "world"), 3]
    assert report.lines() == ["1 rows with earlier turns not learned, because the chat template rewrites them (row 1)"]


def test_where_a_template_rewrites_the_prompt_the_answer_follows_the_prompt_that_the_model_is_given():
    t = make(template="{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    example = first([{"prompt": chat("said"), "completion": "x"}], "text", t)
    assert tokens(example) == ([*plain(t, "1said"), 3], [*plain(t, "x"), 3])


def test_a_template_that_puts_the_answer_before_the_prompt_is_refused():
    t = make(template="{% for m in messages[::-1] %}{{ m.content }}<|im_end|>{% endfor %}")
    with pytest.raises(FaultyRowsError, match=r"leaves out 'x' of the answer|renders the prompt differently"):
        tokenise(load([{"prompt": chat("said"), "completion": "x"}], "text"), t)


def test_what_a_template_refuses_is_a_fault_of_the_row():
    t = make(template="{% if messages[0].content == 'no' %}{{ raise_exception('never no') }}{% endif %}" + CHATML)
    rows = [{"prompt": chat(text)} for text in ("yes", "no", "no")]
    with pytest.raises(FaultyRowsError, match="the list of rows, in the chat template: 2 faults") as error:
        tokenise(load(rows, "prompts"), t)
    assert [(f.row, f.found) for f in error.value.faults] == [(n, "the template raised 'never no'") for n in (2, 3)]


def test_messages_need_a_template():
    with pytest.raises(ConfigError, match=r"row 1 holds messages.*no chat template.*set tokenizer\.chat_template"):
        tokenise(load([{"prompt": chat("x")}], "prompts"), make())


@pytest.mark.parametrize("anywhere", ["main thread", "another thread"])
def test_a_template_that_never_ends_is_stopped(anywhere):
    many = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    t = make(template="{% if messages[0].content == 'loop' %}" + many + "{% endif %}" + CHATML)
    dataset = load([{"prompt": chat(text)} for text in ("said", "loop", "said")], "prompts")
    before = set(threading.enumerate())
    caught = []

    def work():
        try:
            tokenise(dataset, t, chat=Chat(seconds=0.1))
        except ModelError as error:
            caught.append(str(error))

    if anywhere == "main thread":
        work()
    else:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(30)
    assert caught
    assert "did not finish row 2 within 0.1 s" in caught[0]
    deadline = time.monotonic() + 20
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not set(threading.enumerate()) - before  # nothing goes on turning in the background


def test_the_time_limit_is_for_a_row_and_not_for_all():
    t = make(template="{% for i in range(40000) %}{% endfor %}" + CHATML)
    dataset = load([{"prompt": chat("hello")}] * 400, "prompts")
    started = time.monotonic()
    examples, _ = tokenise(dataset, t, chat=Chat(seconds=0.25))
    assert time.monotonic() - started > 0.25
    assert len(examples) == 400


# ---- budgets --------------------------------------------------------------------------------------------------------


def test_a_prompt_keeps_its_end_and_its_bos():
    t = make(bos=True)
    ids = plain(t, "1 2 3 4")
    assert len(ids) > 3
    for limit, want in ((len(ids), [0, *ids[1:]]), (3, [0, *ids[-2:]]), (1, [0]), (len(ids) + 1, [0, *ids])):
        examples, report = tokenise(load([{"prompt": "1 2 3 4", "completion": " 5"}], "text"), t, limit)
        assert examples[0].prompt.tolist() == want
        cut = [f"1 prompts cut to their last {limit} tokens (row 1)"]
        assert report.lines() == ([] if want == [0, *ids] else cut)
    without = make()
    assert first([{"prompt": "1 2 3 4", "completion": " 5"}], "text", without, 2).prompt.tolist() == ids[-2:]


def test_the_templates_bos_survives_a_cut():
    t = make(template="<s>" + CHATML, bos=True)
    prompt = first([{"prompt": chat("hello there world")}], "prompts", t, 4).prompt.tolist()
    assert prompt == [0, *([2, *plain(t, "assistant\n")])[-3:]]


def test_a_long_completion_loses_its_end_and_is_counted():
    t = make()
    there = plain(t, " there the user")
    rows = [{"prompt": "said", "completion": text} for text in (" there", " there the user")]
    examples, report = tokenise(load(rows, "text"), t, None, len(there))
    assert examples[0].completions[0].tokens[-1] == 1
    assert examples[1].completions[0].tokens.tolist() == there
    assert report.lines() == [f"1 completions cut to {len(there)} tokens, without end-of-sequence (row 2)"]


def test_pairs_that_become_identical_are_dropped():
    t = make()
    rows = [
        {"prompt": "said", "chosen": " hello there", "rejected": " hello world"},
        {"prompt": "said", "chosen": " hello there", "rejected": " world hello"},
    ]
    examples, report = tokenise(load(rows, "pairs"), t, None, 1)
    assert [e.row for e in examples] == [2]
    assert report.dropped == {"with answers that became identical": [1]}


def test_answers_that_lose_every_learned_token_are_dropped():
    rows = [{"prompt": chat("said"), "completion": text} for text in ("hello", "there")]
    examples, report = tokenise(load(rows, "text"), make(template=REWRITING))
    assert (len(examples), report.dropped) == (2, {})
    answer = chat("hello", "there", "world", first="assistant")
    rows.append({"prompt": chat("said"), "completion": answer})
    examples, report = tokenise(load(rows, "text"), make(template=REWRITING), None, 3)
    assert [e.row for e in examples] == [1, 2]
    assert report.dropped == {"with an answer that became empty": [3]}


@pytest.mark.parametrize("limits", [(0, 5), (5, 0)])
def test_budgets_below_one_are_refused(limits):
    with pytest.raises(ConfigError, match="give 1 or more"):
        tokenise(load([{"text": "x"}], "text"), make(), *limits)


def test_reports_of_loading_and_tokenising_join():
    rows = [{"prompt": "q", "chosen": "same", "rejected": "same"}, {"prompt": "q", "chosen": "x", "rejected": "y"}]
    dataset = load(rows, "pairs")
    _, report = tokenise(dataset, make(), None, 1)
    assert (dataset.report + report).lines() == [
        "dropped 1 of 2 rows: 1 identical answers (row 1)",
        "2 completions cut to 1 tokens, without end-of-sequence (row 2)",
    ]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real rows in {DATA} (set ALIGNKIT_DATA)")
def test_real_pairs_keep_every_character():
    t = make(bos=True)
    dataset = load(DATA / "hh_pairs.jsonl", "pairs")
    started = time.perf_counter()
    examples, report = tokenise(dataset, t)
    assert time.perf_counter() - started < 10
    assert len(examples) == len(dataset)
    assert report.lines() == []
    for row, example in zip(dataset, examples, strict=True):
        for text, completion in zip(row.completions, example.completions, strict=True):
            whole = torch.cat([example.prompt, completion.tokens]).tolist()
            assert (whole[0], whole[-1], sum(i < 4 for i in whole)) == (0, 1, 2)
            assert t.decode(whole[1:-1]) == row.prompt + text


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_spelled_special_token_puts_no_space_behind_the_others(scheme):
    alphabet = ["▁", *"abcdefghijklmnopqrstuvwxyz<>/|_."]
    built = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    built.decoder = decoders.Metaspace(prepend_scheme=scheme)
    built.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    t = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>")
    t.chat_template = CHATML.replace("\n", "")

    def of(text: str) -> list[str]:
        (example,), _ = tokenise(load([{"prompt": chat(text), "completion": "b"}], "text"), t)
        return t.convert_ids_to_tokens(torch.cat([example.prompt, example.completions[0].tokens]).tolist())

    normal, spelled = of("a"), of("a<s>")
    assert normal == t.convert_ids_to_tokens(plain(t, t.apply_chat_template(chat("a", "b"), tokenize=False)))
    assert [token for token in spelled if token not in ("<", ">")][:-1].count("s") == normal.count("s") + 1
    assert spelled.count("▁") == normal.count("▁")


# ----------------------------------------------------------------------------------- texts straight to the backend


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer that changes texts before its backend sees them, as some families do."""

    def _encode_plus(self, text, *rest, **options):
        return super()._encode_plus([one.upper() for one in text], *rest, **options)


def sentencepiece(scheme: str):
    """A tokenizer of words with SentencePiece's spaces, one that normalises, cuts and pads by default."""
    words = sorted({"▁" + word for word in WORDS.split()} | set(WORDS.replace(" ", "▁")) | {"▁", "<unk>"})
    built = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    built.normalizer = normalizers.Lowercase()
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    built.enable_truncation(4)
    built.enable_padding(length=9)
    built.add_special_tokens([AddedToken("</s>", lstrip=True), "<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    "tokenizer",
    [
        make(), make(bos=True), make(padding_side="left"), sentencepiece("first"), sentencepiece("always"),
        Shouting(tokenizer_object=Tokenizer.from_str(backend()), eos_token="</s>"),
        *map(tokenizer_of, ("llama3", "qwen3", "gemma", "deepseek_r1_distill")),
    ],
)  # fmt: skip
def test_the_backend_gives_the_tokens_of_transformers(tokenizer, split) -> None:
    texts = ["hello there", "", " said </s>\n", "<s>a<|im_end|> b</s>", "é ☃ HELLO", "hello " * 40]
    options = {"add_special_tokens": False, "truncation": False, "padding": False}
    expected = tokenizer(texts, split_special_tokens=split, **options)["input_ids"]
    tokenizer(texts, split_special_tokens=not split)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    encoder = Encoder(tokenizer, split)
    drafts = [Draft(Row(text), text, (text + " a", text), (None, None), control=not split) for text in texts]
    assert [[e[0].ids, e[2].ids] for e in encoder.encode(drafts)] == [[ids, ids] for ids in expected]
    assert is_direct(tokenizer) == (not isinstance(tokenizer, Shouting))
