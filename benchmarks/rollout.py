"""Sampling several completions a prompt: alignkit, transformers' generate, and its continuous batching, in one run.

    OMP_NUM_THREADS=2 python benchmarks/rollout.py --json rollout.json

The 28 M-parameter Llama of engine.py, untrained, in float32 on the CPU: 2 prompts of 120 to 180 tokens, 8 completions
of 64 tokens each. The contenders take turns, the first turn warms up, and figures are medians of the others.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alignkit.config import Sampling
from alignkit.demo.base import tokenizer_from
from alignkit.rollout import sample

PROMPTS, GROUP, TOKENS = 2, 8, 64


def start() -> tuple[Any, Any, list[list[int]]]:
    """Return the model, a tokenizer for its end-of-sequence token, and prompts of random tokens."""
    tokenizer, draw = tokenizer_from(["a"]), random.Random(0)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=engine.VOCABULARY, hidden_size=engine.HIDDEN, num_hidden_layers=engine.LAYERS,
        intermediate_size=1280, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    prompts = [draw.choices(range(1, engine.VOCABULARY), k=draw.randint(120, 180)) for _ in range(PROMPTS)]
    return LlamaForCausalLM(config).eval(), tokenizer, prompts


def with_generate(model: Any, tokenizer: Any, prompts: list[list[int]], seed: int) -> list[Any]:
    """Sample as transformers does it by itself: padded prompts, each read once for every completion."""
    torch.manual_seed(seed)
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    done = model.generate(
        **padded, do_sample=True, top_k=0, num_return_sequences=GROUP, max_new_tokens=TOKENS,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return list(done)


def main() -> None:
    """Parse arguments, let the contenders take turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="turns that count (default 3)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    model, tokenizer, prompts = start()

    def ours(backend: Any) -> Callable[[int], Any]:
        how = Sampling(max_new_tokens=TOKENS, backend=backend)
        return lambda turn: sample(model, tokenizer, prompts, how, n=GROUP, seed=turn)

    contenders = {
        "alignkit, generate": ours("generate"),
        "alignkit, continuous": ours("continuous"),
        "transformers, generate": lambda turn: with_generate(model, tokenizer, prompts, turn),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.repeat + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run(turn)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(s[1:]) for name, s in seconds.items()}
    for name, median in medians.items():
        rate = PROMPTS * GROUP * TOKENS / median
        print(
            f"{name:24}{median:8.2f} s{rate:8.0f} tokens/s{median / medians['alignkit, generate']:8.2f} times the time"
        )
    if args.json:
        args.json.write_text(json.dumps({"threads": torch.get_num_threads(), "medians": medians, "seconds": seconds}))


if __name__ == "__main__":
    main()
