"""Rows of each kind, made of a few words, and a tiny model of these words."""

from __future__ import annotations

import random
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WORDS = (
    "red", "blue", "green", "fox", "owl", "newt", "sees", "likes", "eats", "a", "the", "big", "small", "old", "moss",
    "tree", "king", "hill",
)  # fmt: skip

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentence(rng: random.Random, low: int = 1, high: int = 9) -> str:
    """A few random words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def make_rows(kind: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """n rows of a data kind with different prompts."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(n):
        prompt = f"{i} {sentence(rng)}:"
        if kind == "pairs":
            rows.append({"prompt": prompt, "chosen": f" yes {sentence(rng)}", "rejected": f" no {sentence(rng)}"})
        elif kind == "unpaired":
            rows.append({"prompt": prompt, "completion": f" {sentence(rng)}", "label": i % 2 == 0})
        else:
            rows.append({"prompt": prompt, "completion": f" {sentence(rng)}"})
    return rows


def free_port(n: int = 1) -> int:
    """The first of n free ports in a row."""
    from alignkit.rollout.own_servers import free_ports

    return free_ports(n)


def write_plugin(
    folder: Path, entry: str, code: str, distribution: str = "somebodys-method", group: str = "alignkit"
) -> Path:
    """Write a distribution as an installer would, a module and its entry point; return the folder for sys.path."""
    words = re.sub(r"\W", "_", distribution)
    module = f"module_of_{words}_{abs(hash(folder))}"  # its own name in every folder, for sys.modules keeps the first
    info = folder / f"{words}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(textwrap.dedent(code))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry} = {module}\n")
    return folder


# a method that advises for itself
ADVISED = """
    from pydantic import Field
    from torch.nn.functional import logsigmoid

    from alignkit import Advice, Choice, Method, MethodConfig, Term, hookimpl
    from alignkit_kernels import sequence_sum


    class Stranger(Method["Stranger.Config"]):
        name = "stranger"
        data = "pairs"
        demo_settings = {"learning_rate": 5e-4, "epochs": 1, "tau": 0.3}

        class Config(MethodConfig):
            tau: float = Field(0.7, gt=0, description="how strange")

        @classmethod
        def advice(cls, facts):
            if facts.length_bias is None:
                return Advice(None, "nothing to learn: answers are of like lengths")
            return Advice(99, f"made for this: {facts.length_bias}", (Choice("tau", 0.2, "half of the bias"),))

        def loss(self, batch, models):
            chosen, rejected = batch.pairs(sequence_sum(models.policy(batch).logps, batch.cu_seqlens))
            return {"stranger": Term(-logsigmoid(self.config.tau * (chosen - rejected)))}


    @hookimpl
    def register_methods():
        return [Stranger]
"""


def write_tiny(folder: Path, kind: Any = None, **changes: Any) -> None:
    """Write a tiny model, with these changes of its configuration, and its tokenizer; kind: default LlamaConfig."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from alignkit.demo.base import tokenizer_from

    tokenizer = tokenizer_from([" ".join(WORDS), "0 1 2 3 4 5 6 7 8 9 yes no :"], 300)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    made = (kind or LlamaConfig)(**{"vocab_size": len(tokenizer)} | sizes | ends | changes)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_chatml(folder: Path) -> Any:
    """Write a tiny model whose tokenizer, returned, has a ChatML template and the special tokens of it."""
    from transformers import AutoTokenizer

    write_tiny(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    write_tiny(folder, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return tokenizer


@contextmanager
def killed_before(number: int) -> Iterator[None]:
    """Inside of it, a run ends before the step of this number, counted from 0."""
    from alignkit.engine.loop import Loop

    step = Loop.step

    def dies(loop: Loop, at: int, total: int) -> dict[str, float]:
        if at >= number:
            raise OSError
        return step(loop, at, total)

    with pytest.raises(OSError), pytest.MonkeyPatch.context() as patch:  # noqa: PT012
        patch.setattr(Loop, "step", dies)
        yield
