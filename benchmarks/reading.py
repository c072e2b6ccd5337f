"""Reading many rows: seconds, CPU seconds and memory until the examples are there, the first time and a second time.

    python benchmarks/reading.py --rows 200000 --json reading.json
    python benchmarks/reading.py --tiny              few rows, in seconds: does everything run?

Each case is read in a process of its own, by the phase of a run that reads. `text-kept` is the run of `text`
again, which maps what the first one kept. Memory is resident: what reading adds, and the peak of the whole process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

CASES = ("text", "text-kept", "chat", "chat-kept", "prompts", "prompts-kept")
WORDS = "the a red fox owl runs over lazy hill and sees blue river small house where king baker sings loud songs"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def main() -> int:
    parser = common.parser_of(__doc__)
    parser.add_argument("--only", help=f"comma-separated cases, in this order: {', '.join(CASES)}")
    parser.add_argument("--rows", type=int, default=200_000, help="rows of each case (default 200,000)")
    for hidden in ("--case", "--work"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = common.parsed(parser)
    if args.case:
        print(json.dumps(measured(args.case, Path(args.work))))
        return 0
    names = common.chosen(parser, "--only", args.only, CASES)
    # the tiny rows are longer ones: a source of less than 1 MiB is not kept
    n, words = (250, 40) if args.tiny else (args.rows, 1)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        found = {name: of_process(name, n, words, Path(folder), args.threads) for name in names}
    return common.finish(args, [table(found)], {}, {"cases": found})


def of_process(name: str, n: int, longer: int, folder: Path, threads: int) -> dict[str, Any]:
    """Measure one case in a new process."""
    path = folder / f"{name.split(',')[0]}.jsonl"
    if not path.exists():
        common.write_jsonl(path, rows_of(name.split("-")[0], n, longer))
    command = [sys.executable, __file__, "--case", name, "--work", str(folder), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(kind: str, n: int, longer: int) -> Any:
    """Yield short rows: a prompt of 12 words, answers of 10; or `longer` times as many."""
    import random

    rng, words = random.Random(0), WORDS.split()

    def text(size: int) -> str:
        return " ".join(rng.choice(words) for _ in range(longer * size))

    def said(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    for i in range(n):
        prompt, chosen, rejected = f"{i} {text(12)}?", text(10), text(10)
        if kind == "prompts":
            yield {"prompt": prompt, "answer": chosen, "number": i}
        elif kind == "text":
            yield {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
        else:
            answers = {"chosen": said("assistant", chosen), "rejected": said("assistant", rejected)}
            yield {"prompt": said("user", prompt), **answers}


def write_model(folder: Path) -> None:
    """Write a tokenizer with a vocabulary of words and pieces, and the configuration of a model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["</s>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, *(f" {word}" for word in WORDS.split())] * 9, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder / "model")
    LlamaConfig(**common.TINY_LLAMA | {"vocab_size": len(made)}).save_pretrained(folder / "model")


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Read the rows of a case and return what it took."""
    import resource

    from alignkit.engine.phases import Run

    kind = name.split("-")[0]
    settings: dict[str, Any] = {"reward": {"use": "length", "max": 40}} if kind == "prompts" else {}
    method, data = "grpo" if kind == "prompts" else "dpo", folder / f"{kind}.jsonl"
    with Run(method, model=str(folder / "model"), data=str(data), output=folder / "runs", **settings) as run:
        run.tokenizer("a")  # imports
        before, wall, cpu = resident(), time.perf_counter(), time.process_time()
        n = len(run.read().train)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rows": n, "seconds": wall, "cpu": cpu, "added_mib": resident() - before, "peak_mib": peak}


def resident() -> float:
    """Return this process's resident memory, in MiB."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return float("nan")
    return int(status.read_text().split("VmRSS:")[1].split()[0]) / 1024


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return a line for each case."""
    cells = [
        [name, f"{one['rows']:,}", *(f"{one[key]:.2f}" for key in ("seconds", "cpu")), f"{one['added_mib']:.0f}",
         f"{one['peak_mib']:.0f}"]
        for name, one in found.items()
    ]  # fmt: skip
    return common.table(["case", "rows", "seconds", "CPU seconds", "added MiB", "peak MiB"], cells)


if __name__ == "__main__":
    common.hide_scripts()
    sys.exit(main())
