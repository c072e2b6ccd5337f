"""Tools in a closed world: a small model learns by reward to look ages up and to add, instead of guessing.

    python benchmarks/tools.py --json tools.json      about five minutes on two cores
    python benchmarks/tools.py --tiny                 one step of each method, in seconds: does everything run?

A Llama of 0.7 M parameters is fine-tuned on conversations of which half call a tool and half guess. The questions are
of two kinds: the age of a person, which only the tool `age` knows, and a sum of two numbers, which the tool `add`
computes. Then each method trains on the reward of a right answer alone. Held-out questions, before and after, with the
same seeds: how many trajectories call a tool, how many end with the right answer. A method that fails is reported with
its error, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import common

NAMES = [
    "ann", "bob", "cid", "dan", "eva", "fay", "gus", "hal", "ida", "jon", "kay", "leo", "mia", "ned", "oda", "pam",
]  # fmt: skip
AGES = {name: 20 + 37 * i % 70 for i, name in enumerate(NAMES)}
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = {
    "vocab_size": 400, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"group_size": 8, "batch_size": 8, "beta": 0.02},
    "rloo": {"group_size": 8, "batch_size": 8, "beta": 0.02},
    "reinforce": {"group_size": 4, "batch_size": 16, "beta": 0.0},
    "ppo": {"batch_size": 64, "beta": 0.02, "critic_learning_rate": 1e-3},
}


def age(name: str) -> int:
    """Say how old a person is.

    Args:
        name: the person
    """
    return AGES[name]


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: a number
        b: another number
    """
    return a + b


def right(completion_messages: list[Any], answer: list[int], **_: Any) -> list[float]:
    """1 where the last turn is the right number."""
    return [float(m[-1]["content"].strip() == str(a)) for m, a in zip(completion_messages, answer, strict=True)]


def questions(n: int, draw: random.Random) -> list[dict[str, Any]]:
    """Return n questions, each with its answer and the call that finds it."""
    found = []
    for i in range(n):
        if i % 2:
            name = draw.choice(NAMES)
            text, call, answer = f"age of {name}?", {"name": "age", "arguments": {"name": name}}, AGES[name]
        else:
            a, b = draw.randint(10, 49), draw.randint(10, 49)
            text, call, answer = f"{a} plus {b}?", {"name": "add", "arguments": {"a": a, "b": b}}, a + b
        found.append({"prompt": [{"role": "user", "content": text}], "answer": answer, "call": call})
    return found


def conversations(asked: list[dict[str, Any]], draw: random.Random) -> list[dict[str, Any]]:
    """Return conversations to fine-tune on: half of them call the tool, the others guess."""
    rows = []
    for i, one in enumerate(asked):
        if i // 2 % 2:
            call = {"type": "function", "function": one["call"]}
            said = [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {
                    "role": "tool",
                    "name": one["call"]["name"],
                    "content": str(one["answer"]),
                    "tool_call_id": "call00001",
                },
                {"role": "assistant", "content": str(one["answer"])},
            ]
        else:
            said = [{"role": "assistant", "content": str(draw.randint(20, 98))}]
        rows.append({"messages": [*one["prompt"], *said]})
    return rows


def fine_tuned(work: Path, args: argparse.Namespace) -> str:
    """Write the base, fine-tune it on conversations, and return its folder."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    import alignkit
    from alignkit.demo.base import tokenizer_from
    from alignkit.environments import Tools

    draw = random.Random(0)
    rows = conversations(questions(args.sft_rows, draw), draw)
    tokenizer = tokenizer_from([json.dumps(row["messages"]) for row in rows[:200]], LLAMA["vocab_size"] - 2)
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", TEMPLATE
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(**LLAMA | {"vocab_size": len(tokenizer)}, **ends)).save_pretrained(work / "start")
    tokenizer.save_pretrained(work / "start")
    settings = {"learning_rate": 3e-3, "batch_size": 32, "output": work, "device": "cpu", "save_minutes": 1000}
    settings["tools"] = Tools([age, add]).schemas
    result = alignkit.run("sft", model=str(work / "start"), data=rows, name="sft", **settings)
    return str(result.folder / "model")


def train(method: str, base: str, work: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train by a method; return what held-out trajectories do, before and after."""
    import alignkit

    draw = random.Random(1)
    rows = [{"prompt": q["prompt"], "answer": q["answer"]} for q in questions(512, draw)]
    held_out = [{"prompt": q["prompt"], "answer": q["answer"]} for q in questions(4 if args.tiny else 64, draw)]
    settings = METHODS[method] | ({"batch_size": 2} if args.tiny else {})
    result = alignkit.run(
        method, model=base, data=rows, eval_data=held_out, output=work, name=method, device="cpu", save_minutes=1000,
        environment={"tools": [age, add], "max_turns": 4, "max_tokens": 200}, reward=right,
        sampling={"max_new_tokens": 48}, max_steps=args.steps, learning_rate=args.rate, schedule="constant",
        eval_every=10**6, health={"enabled": False}, **settings,
    )  # fmt: skip
    lines = [json.loads(line) for line in (result.folder / "completions.jsonl").read_text().splitlines()]
    held = {step: [one for one in lines if not one["training"] and one["step"] == step] for step in (0, args.steps)}
    return {"before": figures(held[0]), "after": figures(held[args.steps])}


def figures(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return the fractions of trajectories that call a tool, and that end with the right answer; and mean turns."""
    n = len(lines)
    return {
        "calls": sum(one["turns"] > 1 for one in lines) / n,
        "right": sum(one["reward"] for one in lines) / n,
        "turns": sum(one["turns"] for one in lines) / n,
    }


def main() -> int:
    """Fine-tune the base, train by each method, print and write."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--methods", help=f"comma-separated, of {', '.join(METHODS)} (default grpo, rloo)")
    parser.add_argument("--sft-rows", type=int, help="conversations to fine-tune on (default 20000, tiny 32)")
    parser.add_argument("--steps", type=int, help="steps of a method (default 40, tiny 1)")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of the methods (default 3e-4)")
    args = common.parsed(parser)
    methods = common.chosen(parser, "--methods", args.methods or "grpo,rloo", tuple(METHODS))
    args.sft_rows = args.sft_rows or (32 if args.tiny else 20_000)
    args.steps = args.steps or (1 if args.tiny else 40)
    common.hide_scripts()
    import torch

    torch.set_num_threads(args.threads)
    rows: dict[str, Any] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        base = fine_tuned(Path(folder), args)
        seconds = {"sft": time.perf_counter() - started}
        for method in methods:
            started = time.perf_counter()
            try:
                rows[method] = train(method, base, Path(folder), args)
            except Exception as error:
                traceback.print_exc()
                failed[method] = common.reason(error)
            seconds[method] = time.perf_counter() - started
    cells = [
        [method, when, *(f"{100 * one[k]:.0f} %" for k in ("calls", "right")), f"{one['turns']:.2f}"]
        for method, found in rows.items()
        for when, one in found.items()
    ]
    head = ["method", "held-out questions", "call a tool", "right answers", "turns"]
    return common.finish(args, [common.table(head, cells, names=2)], failed, {"table": rows, "seconds": seconds})


if __name__ == "__main__":
    sys.exit(main())
