"""Tokenizers with the chat templates of model families, as the package `trl` ships them as files."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

_SPEC = importlib.util.find_spec("trl")  # found, not imported
assert _SPEC is not None
assert _SPEC.origin is not None
FOLDER = Path(_SPEC.origin).parent / "chat_templates"
FAMILIES = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training"))
MARKED = [
    name
    for name in FAMILIES
    for file in [FOLDER / f"{name}_training.jinja", FOLDER / f"{name}.jinja"]
    if file.exists() and re.search(r"%-?\s*generation", file.read_text())
]
_CONTROL = re.compile(
    r"<\|[^|<>'\"{}\s]{1,40}\|>|<｜[^<>]{1,40}｜>|<(?:start|end)_of_(?:turn|utterance)>"
    r"|<\|?(?:tool_call|turn|channel|tool_response|tool)\|?>|\[gMASK\]|<sop>"
)


def text_of(name: str) -> str:
    """Return the family's chat template."""
    return (FOLDER / f"{name}.jinja").read_text()


@cache
def _backend(template: str) -> str:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", *sorted(set(_CONTROL.findall(template)))])
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer.to_str()


def tokenizer_of(name: str) -> Any:
    """Return a tokenizer of bytes with the family's chat template and its control tokens."""
    template = text_of(name)
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(template)), bos_token="<s>", eos_token="</s>"
    )
    made.chat_template, made.name_or_path = template, name
    return made


def training_text(name: str, row: dict[str, Any]) -> tuple[str, list[str]]:
    """Return a conversation in the variant of the template that trl trains with, and the turns that it marks."""
    file = FOLDER / f"{name}_training.jinja"
    source = file.read_text() if file.exists() else text_of(name)
    messages = [{k: v for k, v in message.items() if v is not None} for message in row["messages"]]
    (text,), (spans,) = render_jinja_template(
        conversations=[messages],
        tools=row.get("tools"),
        chat_template=source,
        return_assistant_tokens_mask=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    return text, [text[begin:end] for begin, end in spans]
