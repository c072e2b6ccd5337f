"""Online methods on real prompts: a small model made on GSM8K's rows learns to end in `#### number`, and soon.

    python benchmarks/gsm8k.py --data gsm8k_train.jsonl --json gsm8k.json

A model of 2.5 M parameters that was fine-tuned for some minutes cannot solve these problems, so its reward is what it
can learn: 1 for an answer that ends in `#### number`, less up to 1 for its length. Reward, its parts and the KL to the
fine-tuned model are measured on held-out questions before and after, with the same sampling seed.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import alignkit
from alignkit.config import Sampling
from alignkit.demo.base import tokenizer_from
from alignkit.models.scoring import plain_logps
from alignkit.rewards import Answers, build_rewards
from alignkit.rollout import sample

REWARD = [
    {"use": "format", "pattern": r"(?s).*\n#### -?[\d,.]+\s*", "name": "format"},
    {"use": "brevity", "free": 16, "limit": 96, "name": "brevity"},
]
TOKENS = 96
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"group_size": 8, "batch_size": 8, "beta": 0.05},
    "rloo": {"group_size": 8, "batch_size": 8, "beta": 0.05},
    "ppo": {"batch_size": 64, "minibatches": 2, "epochs_per_batch": 2, "beta": 0.05, "critic_learning_rate": 1e-3},
    "nash": {"batch_size": 64, "tau": 0.02},
}


def write_base(folder: Path, texts: list[str]) -> None:
    """Write the untrained Llama and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_from(texts, 4096)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(model: Any, base: Any, tokenizer: Any, prompts: list[str]) -> dict[str, float]:
    """Return the mean reward, its parts, and the KL to the base in nats a sequence over samples of all prompts."""
    made = [s for (s,) in sample(model, tokenizer, prompts, Sampling(max_new_tokens=TOKENS), seed=7)]
    texts = [tokenizer.decode(s.tokens, skip_special_tokens=True) for s in made]
    lengths, ended = [len(s.tokens) for s in made], [s.ended for s in made]
    scores = build_rewards(REWARD).score(Answers(prompts, texts, {}, [*range(len(texts))], lengths, ended))
    kl = []
    for prompt, one in zip(prompts, made, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            whole = torch.tensor(ids + one.tokens)
            kl.append(float((plain_logps(model, whole, len(ids)) - plain_logps(base, whole, len(ids))).sum()))
    means = {name: sum(values) / len(values) for name, values in {"reward": scores.total, **scores.parts}.items()}
    return means | {"kl": sum(kl) / len(kl), "tokens": sum(lengths) / len(lengths), "sample": texts[0]}  # type: ignore[dict-item]


def main() -> None:
    """Make the base, align it by each method, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="gsm8k_train.jsonl")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--sft-rows", type=int, default=4800)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--work", type=Path, help="folder that is kept")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = [json.loads(line) for line in Path(given.data).read_text().splitlines()]
    random.Random(0).shuffle(rows)
    asked = [{"prompt": f"{r['question']}\n", "completion": r["answer"]} for r in rows]
    held_out, train = asked[:100], asked[100 : 100 + given.sft_rows]
    work = given.work or Path(tempfile.mkdtemp())
    engine = alignkit.Engine(output=work, cache_file=work / "reference.sqlite", device="cpu", save_minutes=1000)
    if not (work / "sft/model").is_dir():
        write_base(work / "start", [r["prompt"] + r["completion"] for r in train])
        sft = {"learning_rate": 2e-3, "batch_size": 32, "max_prompt_tokens": 256, "max_completion_tokens": 256}
        engine.run("sft", model=str(work / "start"), data=train, name="sft", **sft)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(work / "sft/model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work / "sft/model")
    questions = [r["prompt"] for r in held_out]
    table = {"base": measure(base, base, tokenizer, questions)}
    prompts = [{"prompt": r["prompt"]} for r in train]
    for method in given.methods.split(","):
        started = time.perf_counter()
        who = {"judge": {"bradley_terry": REWARD, "scale": 4.0}} if method == "nash" else {"reward": REWARD}
        result = engine.run(
            method, model=str(work / "sft/model"), data=prompts, sampling={"max_new_tokens": TOKENS},
            max_steps=given.steps, learning_rate=1e-4, max_prompt_tokens=256, **who, **METHODS[method],
        )  # fmt: skip
        table[method] = measure(result.model, base, tokenizer, questions)
        table[method] |= {"seconds": time.perf_counter() - started}
        print(method, table[method], flush=True)
    names = ["reward", "format", "brevity", "tokens", "kl", "seconds"]
    print(" | ".join(["", *names]))
    for who_, row in table.items():
        print(" | ".join([who_, *(f"{row[n]:.2f}" if n in row else "-" for n in names)]))
    if given.json:
        given.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
