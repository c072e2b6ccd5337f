"""Online methods on real prompts: a small model, fine-tuned on GSM8K, learns brief answers that end in `#### number`.

    python benchmarks/gsm8k.py --data gsm8k_train.jsonl --json gsm8k.json
    python benchmarks/gsm8k.py --tiny                made-up rows and a tiny model, in seconds: does everything run?

A model of 2.5 M parameters that was fine-tuned for some minutes cannot solve these problems, so the reward is for what
it can learn: 1 for an answer that ends in `#### number`, less up to 1 for its length. Reward, its parts and the KL to
the fine-tuned model are measured on held-out questions before and after, with the same sampling seed. A method that
fails is reported with its error, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import common

REWARD = [
    {"use": "format", "pattern": r"(?s).*\n#### -?[\d,.]+\s*", "name": "format"},
    {"use": "brevity", "free": 16, "limit": 96, "name": "brevity"},
]
LLAMA = {
    "vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 1024,
}  # fmt: skip
TOKENS, TINY_TOKENS = 96, 8
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"group_size": 8, "batch_size": 8, "beta": 0.05},
    "rloo": {"group_size": 8, "batch_size": 8, "beta": 0.05},
    "ppo": {"batch_size": 64, "minibatches": 2, "epochs_per_batch": 2, "beta": 0.05, "critic_learning_rate": 1e-3},
    "nash": {"batch_size": 64, "tau": 0.02},
}


class Bench:
    """The rows, the fine-tuned base and its tokenizer; trains by a method and measures a model."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        import alignkit

        self.args, self.work = args, work
        self.tokens = TINY_TOKENS if args.tiny else TOKENS
        rows = common.made_up_questions(args.sft_rows + 4) if args.data is None else common.read_jsonl(args.data)
        random.Random(0).shuffle(rows)
        texts = [{"prompt": f"{r['question']}\n", "completion": r["answer"]} for r in rows]
        n_held_out = 4 if args.tiny else 100
        self.questions = [r["prompt"] for r in texts[:n_held_out]]
        self.train_rows = texts[n_held_out : n_held_out + args.sft_rows]
        self.engine = alignkit.Engine(
            output=work, cache_file=work / "reference.sqlite", device="cpu", save_minutes=1000, max_prompt_tokens=256
        )
        self.base, self.tokenizer = self._fine_tuned()

    def _fine_tuned(self) -> tuple[Any, Any]:
        """Return the base and its tokenizer, fine-tuned unless a kept folder has them."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = self.work / "sft/model"
        if not folder.is_dir():
            start = self.work / "start"
            common.write_start(start, [r["prompt"] + r["completion"] for r in self.train_rows], self.args.tiny, **LLAMA)
            settings = {"learning_rate": 2e-3, "batch_size": 32, "max_completion_tokens": 256}
            self.engine.run("sft", model=str(start), data=self.train_rows, name="sft", **settings)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)

    def train(self, method: str) -> Any:
        """Align the base by a method and return the model."""
        scores = {"judge": {"bradley_terry": REWARD, "scale": 4.0}} if method == "nash" else {"reward": REWARD}
        settings = METHODS[method] | ({"batch_size": 4} if self.args.tiny else {})
        result = self.engine.run(
            method, model=str(self.work / "sft/model"), data=[{"prompt": r["prompt"]} for r in self.train_rows],
            sampling={"max_new_tokens": self.tokens}, max_steps=self.args.steps, learning_rate=1e-4,
            **scores, **settings,
        )  # fmt: skip
        return result.model

    def measure(self, model: Any) -> dict[str, Any]:
        """Return the mean reward, its parts, and the KL to the base in nats a sequence, over samples of all prompts."""
        from alignkit.rewards import Answers, build_rewards
        from alignkit.rollout import sample
        from alignkit.rollout_settings import Sampling

        how = Sampling(max_new_tokens=self.tokens)
        samples = [s for (s,) in sample(model, self.tokenizer, self.questions, how, seed=7)]
        texts = [self.tokenizer.decode(s.tokens, skip_special_tokens=True) for s in samples]
        lengths, ended = [len(s.tokens) for s in samples], [s.ended for s in samples]
        answers = Answers(self.questions, texts, {}, [*range(len(texts))], lengths, ended)
        scores = build_rewards(REWARD).score(answers)
        kl = [self._log_ratio(model, question, s.tokens) for question, s in zip(self.questions, samples, strict=True)]
        values = {"reward": scores.total, **scores.parts, "kl": kl, "tokens": lengths}
        return {name: sum(v) / len(v) for name, v in values.items()} | {"sample": texts[0]}

    def _log_ratio(self, model: Any, question: str, tokens: list[int]) -> float:
        import torch

        from alignkit.models.scoring import plain_logps

        ids = self.tokenizer(question)["input_ids"]
        whole = torch.tensor(ids + tokens)
        with torch.no_grad():
            return float((plain_logps(model, whole, len(ids)) - plain_logps(self.base, whole, len(ids))).sum())


def main() -> int:
    """Fine-tune the base, align it by each method, print and write."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--data", type=Path, help="gsm8k_train.jsonl (with --tiny by default: made-up rows)")
    parser.add_argument("--methods", help=f"comma-separated, of {', '.join(METHODS)}")
    parser.add_argument("--sft-rows", type=int, help="rows to fine-tune on (default 4800, tiny 32)")
    parser.add_argument("--steps", type=int, help="steps of a method (default 40, tiny 1)")
    parser.add_argument("--work", type=Path, help="folder to keep (default: a temporary one)")
    args = common.parsed(parser)
    methods = common.chosen(parser, "--methods", args.methods, tuple(METHODS))
    if args.data is None and not args.tiny:
        parser.error("--data is needed: gsm8k_train.jsonl, a JSONL file with the columns question and answer")
    args.sft_rows = args.sft_rows or (32 if args.tiny else 4800)
    args.steps = args.steps or (1 if args.tiny else 40)
    common.hide_scripts()
    import torch

    torch.set_num_threads(args.threads)
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args, args.work or Path(temporary))
        rows = {"base": bench.measure(bench.base)}
        for method in methods:
            started = time.perf_counter()
            try:
                rows[method] = bench.measure(bench.train(method))
            except Exception as error:
                traceback.print_exc()
                failed[method] = common.reason(error)
            else:
                rows[method] |= {"seconds": time.perf_counter() - started}
                print(method, rows[method], file=sys.stderr, flush=True)
    names = ["reward", "format", "brevity", "tokens", "kl", "seconds"]
    cells = [[method, *(common.shown(row.get(name), ".2f") for name in names)] for method, row in rows.items()]
    return common.finish(args, [common.table(["method", *names], cells)], failed, {"table": rows})


if __name__ == "__main__":
    sys.exit(main())
