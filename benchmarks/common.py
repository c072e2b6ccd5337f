"""Code that the benchmarks share: options, start model, made-up rows, tables, the description of the machine.

Nothing heavy is imported at the top, and nothing of alignkit: the interpreter that has TRL need not have alignkit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

VOCABULARY = 8192
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1280, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 4096,
}  # fmt: skip
TINY_LLAMA = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- options


def parser_of(script_doc: str | None, trl: bool = False, png: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has.

    trl: with those of contenders in processes. png: with the file of a picture.
    """
    parser = argparse.ArgumentParser(description=script_doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="smallest size, in seconds on a CPU: does everything run?")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    if png:
        parser.add_argument("--png", type=Path, help="file to draw the figures to; needs matplotlib")
    if trl:
        parser.add_argument("--trl-python", help="an interpreter that has TRL; without it TRL does not take part")
        for hidden in ("--child", "--work", "--round"):
            parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and refuse a --json or --png file in a folder that does not exist."""
    args = parser.parse_args()
    for option, path in (("--json", args.json), ("--png", getattr(args, "png", None))):
        if path and not path.parent.is_dir():
            parser.error(f"{option} {path}: the folder {path.parent} does not exist")
    return args


def chosen(parser: argparse.ArgumentParser, option: str, text: str | None, known: Sequence[str]) -> list[str]:
    """Return the names of a comma-separated list in the order of `known`, all of them for None; refuse unknown ones."""
    names = list(known) if text is None else text.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{option}: unknown name '{unknown[0]}'; choose from {', '.join(known)}")
    return [name for name in known if name in names]


def contenders(parser: argparse.ArgumentParser, args: argparse.Namespace, known: Sequence[str]) -> list[str]:
    """Return the contenders of --only, by default all; those of TRL take part only with --trl-python."""
    own = [name for name in known if not is_trl(name)]
    names = chosen(parser, "--only", args.only, known) if args.only or args.trl_python else own
    if not args.trl_python and (rivals := [name for name in names if is_trl(name)]):
        parser.error(f"--only: '{rivals[0]}' needs --trl-python, an interpreter that has TRL")
    return names


def is_trl(name: str) -> bool:
    """Return whether a contender, NAME or WHERE:NAME, belongs to TRL."""
    return name.split(":")[-1].startswith("trl")


def hide_scripts() -> None:
    """Take this folder off the import path: transformers would take kernels.py for the package `kernels`."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]


# ------------------------------------------------------------------------------------------------- model and rows


def write_start(folder: Path, texts: Iterable[str], tiny: bool = False, **changes: Any) -> None:
    """Write an untrained Llama (28 M parameters, less with `tiny`) and a byte-level BPE tokenizer of the texts.

    changes: of its LlamaConfig.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from alignkit.demo.base import tokenizer_from

    sizes = LLAMA | changes | (TINY_LLAMA if tiny else {})
    tokenizer = tokenizer_from(texts, sizes["vocab_size"])
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **ends, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def products_alone(folder: Path, rows: int, tokens: int, bf16: bool) -> float:
    """Return the seconds of the products of the linear layers alone for so many rows and tokens, a median of three."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    weights = [m.weight.detach() for m in model.modules() if type(m) is torch.nn.Linear]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=dtype) for w in weights}
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(tokens):
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def made_up_text(seed: int = 0) -> Callable[[float, float, int], str]:
    """Return a function of (median, spread, most) that draws text of log-normal length in words of a Zipf law."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlcumwfgypbvk", k=draw.randint(1, 9))) for _ in range(4000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]

    def text(median: float, spread: float, most: int) -> str:
        length = min(most, max(3, round(median * draw.lognormvariate(0, spread))))
        return " ".join(draw.choices(words, weights, k=length))

    return text


def made_up_questions(n: int) -> list[dict[str, str]]:
    """Return short rows in the form of GSM8K: question, and an answer that ends in `#### number`."""
    text = made_up_text()
    return [{"question": text(8, 0.3, 16), "answer": f"{text(6, 0.3, 12)}\n#### {i}"} for i in range(n)]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def visited(n_rows: int, batch_size: int, steps: int | None = None) -> list[int]:
    """Return the indices of rows in the order in which alignkit's seed 0 visits them, of an epoch or some steps."""
    import torch

    from alignkit.data.stream import Stream
    from alignkit.types import Example

    stream = Stream([Example(torch.tensor([i]), ()) for i in range(n_rows)], batch_size, seed=0)
    return [int(e.prompt) for step in range(steps or stream.steps_per_epoch) for e in stream[step]]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------------------------------------------------------- report


def ratio(above: float | None, below: float | None) -> float | None:
    """Return above / below, None when one of them is missing."""
    return above / below if above is not None and below else None


def shown(value: float | None, form: str) -> str:
    """Return the number in a format, "-" for None."""
    return "-" if value is None else format(value, form)


def reason(error: BaseException) -> str:
    """Return an error's class and message in one line."""
    name = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
    return name + " ".join(str(error).split())[:400]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """Align the columns: the first `names` to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    lines = []
    for line in (head, *rows):
        cells = [c.ljust(w) if i < names else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def finish(args: argparse.Namespace, lines: Iterable[str], failed: dict[str, str], found: dict[str, Any]) -> int:
    """Print the report and each failure, write the JSON; return the exit code: 1 when a contender failed."""
    print("\n".join([*lines, *(f"{name} failed: {why}" for name, why in failed.items())]), flush=True)
    save(args, {**found, "failed": failed})
    return int(bool(failed))


def save(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write the figures and a description of the machine to --json, when it is given."""
    if args.json:
        # in two steps, so that a run killed while it writes leaves the file of the contender before
        unfinished = args.json.with_name(args.json.name + ".new")
        unfinished.write_text(json.dumps({"machine": machine(args.threads), **found}, indent=1) + "\n")
        unfinished.replace(args.json)


def machine(threads: int) -> dict[str, Any]:
    """Describe what was measured on: device, threads, versions, date."""
    import torch

    from alignkit_kernels.bench import measure

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {**measure.machine(device, threads), **versions("transformers")}
    return {name: value for name, value in about.items() if value is not None}


def versions(*names: str) -> dict[str, str | None]:
    """Return the versions of distributions, None for one that is not installed."""
    found: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
