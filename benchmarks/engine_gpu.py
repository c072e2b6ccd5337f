"""DPO at the shapes of Llama-3.2-1B and Qwen3-0.6B: alignkit, and TRL's DPOTrainer with and without its chunked head.

    python benchmarks/engine_gpu.py --json engine-gpu.json
    python benchmarks/engine_gpu.py --tiny --json /tmp/tiny.json      the same on small models, on a CPU too

Random weights, bfloat16, 8 pairs a step, LoRA (rank 16 on all linear layers) and full training. The most telling come
first: alignkit and TRL as it comes, on one model and mode after the other. Every contender runs in
a process of its own and trains on all rows twice: the first pass compiles and fills caches, the second is timed, with a
fresh reference cache for alignkit. TRL's head has no switch: "trl-full-logits" puts full logits and TRL's own
selective_log_softmax in its place. Peak memory is the allocator's on a GPU, the process's resident set on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import engine

MODELS = ("llama-3.2-1b", "qwen3-0.6b")
MODES = ("lora", "full")
CONTENDERS = ("alignkit", "trl", "trl-full-logits")
DEFAULT_ROWS, MOST_ROWS = 64, 256


# ------------------------------------------------------------------------------------------------ models and rows


def build_model(name: str, tiny: bool) -> Any:
    """Return the untrained model, the same for the same name: bfloat16 on a GPU, float32 on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    shared = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    if name == "llama-3.2-1b":
        shape = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rope_theta": 500000.0,
                 "max_position_embeddings": 131072}  # fmt: skip
    else:
        shape = {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                 "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1000000.0,
                 "max_position_embeddings": 40960}  # fmt: skip
    if tiny:
        shape |= {"vocab_size": engine.VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
                  "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    config = (LlamaConfig if name.startswith("llama") else Qwen3Config)(**shape, **shared)
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)


def synthetic_rows(n: int, tiny: bool) -> list[dict[str, str]]:
    """Make pairs with lengths like those of dialogues: log-normal, a long tail, chosen and rejected apart."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlcumwfgypbvk", k=draw.randint(1, 9))) for _ in range(4000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]  # Zipf

    def text(median: float, spread: float, most: int) -> str:
        length = min(most, max(3, round(median * draw.lognormvariate(0, spread))))
        return " ".join(draw.choices(words, weights, k=length // 8 + 1 if tiny else length))

    return [
        {
            "prompt": f"Human: {text(90, 0.8, 600)}\n\nAssistant:",
            "chosen": " " + text(55, 0.8, 500),
            "rejected": " " + text(50, 0.8, 500),
        }
        for _ in range(n)
    ]


def prepare(data: Path | None, pairs: int, tiny: bool, work: Path) -> None:
    """Write the rows as explicit prompt, chosen and rejected, and a byte-level BPE tokenizer of them."""
    from alignkit.data import load
    from alignkit.demo.base import tokenizer_from

    if data is None:
        rows = synthetic_rows(pairs, tiny)
    else:
        loaded = load(str(data), "pairs").rows[:pairs]
        rows = [{"prompt": r.prompt, "chosen": r.completions[0], "rejected": r.completions[1]} for r in loaded]
    (work / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = tokenizer_from([r["prompt"] + r["chosen"] for r in rows], engine.VOCABULARY)
    tokenizer.save_pretrained(work / "start")


# ---------------------------------------------------------------------------------------------------- contenders


def run_alignkit(model: str, mode: str, tiny: bool, work: Path) -> dict[str, Any]:
    """Train twice from the start, and time the second time."""
    import torch

    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    losses = None
    for i in range(2):
        fresh()
        figures = engine.run_alignkit(
            "auto", work, work / f"{model}-{mode}-{i}.sqlite", model=build_model(model, tiny),
            tokenizer=str(work / "start"), lora=16 if mode == "lora" else None, dtype=dtype, max_tokens=8192,
        )  # fmt: skip
        losses = losses or figures["losses"]
    return {**figures, "losses": losses}


def run_trl(model: str, mode: str, tiny: bool, work: Path, chunked: bool) -> dict[str, Any]:
    """Train on all rows twice, and time the second time."""
    import torch
    from peft import LoraConfig
    from trl.trainer import dpo_trainer

    if not chunked:
        dpo_trainer.add_fused_lm_head = full_logits_head
    fresh()
    models: dict[str, Any] = {"model": build_model(model, tiny)}
    if mode == "lora":
        models["peft_config"] = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        models["ref_model"] = build_model(model, tiny)
    cuda = torch.cuda.is_available()
    return engine.run_trl(work, False, models, rounds=2, use_cpu=not cuda, bf16=cuda)


def full_logits_head(model: Any, **_: Any) -> None:
    """Stand in for TRL's `add_fused_lm_head`: the model's own logits at every position, as trainers did before it."""
    from trl.trainer.utils import FusedCausalLMOutput, selective_log_softmax

    forward = model.forward

    @functools.wraps(type(model).forward)
    def scored(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return forward(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        logits = forward(*args, **{**kwargs, "use_cache": False}).logits[:, :-1].contiguous()
        labels = labels[:, 1:]
        mask = labels != -100
        logps = selective_log_softmax(logits, labels.clamp(min=0)).masked_fill(~mask, 0)
        seen = logits.detach()
        top = seen.argmax(-1) == labels
        # TRL logs the entropy; left out here, it would need the probabilities of the whole row once more
        nothing = logps.detach().float().zero_()
        return FusedCausalLMOutput(
            log_probs=logps, entropy=nothing, mean_logits=seen.mean(-1), is_top1=top, label_mask=mask
        )

    model.forward = types.MethodType(scored, model)


def fresh() -> None:
    """Free what an earlier pass left, and let the memory's high-water mark start again."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def contend(name: str, work: Path) -> dict[str, Any]:
    """Run one contender, MODEL:MODE:CONTENDER, in this process and return its figures."""
    import resource

    import torch

    engine.hide_scripts()
    model, mode, contender = name.split(":")
    tiny = (work / "tiny").exists()
    if contender == "alignkit":
        figures = run_alignkit(model, mode, tiny, work)
    else:
        figures = run_trl(model, mode, tiny, work, chunked=contender == "trl")
    if torch.cuda.is_available():
        figures["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    else:
        figures["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures["pairs_per_second"] = figures["pairs"] / figures["seconds"]
    figures["step_pairs_per_second"] = figures["pairs"] / (figures["seconds"] - figures["fill_seconds"])
    return figures


# -------------------------------------------------------------------------------------------------------- report


def table(runs: dict[str, dict[str, Any]], left_out: dict[str, str]) -> str:
    """Lay out the figures; ratios are to TRL as it comes."""
    lines = [
        "model         mode  contender        pairs/s  steps alone  peak MiB  x trl  memory/trl  first and last loss"
    ]
    for name, f in runs.items():
        model, mode, contender = name.split(":")
        rival = runs.get(f"{model}:{mode}:trl")
        speed = f"{f['pairs_per_second'] / rival['pairs_per_second']:5.2f}" if rival else "    -"
        memory = f"{f['peak_mib'] / rival['peak_mib']:10.2f}" if rival else "         -"
        lines.append(
            f"{model:13} {mode:5} {contender:15} {f['pairs_per_second']:8.2f}  {f['step_pairs_per_second']:11.2f}  "
            f"{f['peak_mib']:8.0f}  {speed}  {memory}  {f['losses'][0]:.4f} {f['losses'][-1]:.4f}"
        )
    return "\n".join([*lines, *(f"without {name}: {why}" for name, why in left_out.items())])


def machine(threads: int) -> dict[str, Any]:
    """Describe what was measured on."""
    import datetime

    import torch
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}", "threads": threads,
        "cuda": torch.version.cuda, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def chosen(parser: argparse.ArgumentParser, option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """Return the names of a comma-separated list in the order of `known`; unknown ones are refused."""
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{option}: there is no '{unknown[0]}'; there are {', '.join(known)}")
    return [name for name in known if name in names]


def in_order(models: list[str], modes: list[str], contenders: list[str]) -> list[str]:
    """Return MODEL:MODE:CONTENDER, the most telling first: TRL with full logits comes after all else."""
    names = [f"{model}:{mode}:{contender}" for model in models for mode in modes for contender in contenders]
    return sorted(names, key=lambda name: name.endswith(":trl-full-logits"))


def without_trl(python: str) -> str | None:
    """Say why the interpreter cannot import what the TRL contenders use; None where it can."""
    command = [python, "-c", "import datasets, peft; from trl import DPOConfig, DPOTrainer"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"TRL cannot be imported by {python}: {error}"
    lines = done.stderr.strip().splitlines()
    return f"TRL cannot be imported by {python}: {lines[-1] if lines else done.returncode}" if done.returncode else None


def main() -> int:
    """Parse arguments, run the contenders in turn, print and write; 1 where one has no figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="JSONL of preference pairs (default: made-up text)")
    parser.add_argument("--pairs", type=int, default=DEFAULT_ROWS, help=f"at most {MOST_ROWS} (default {DEFAULT_ROWS})")
    parser.add_argument("--tiny", action="store_true", help="small models and short rows: does everything run?")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--only", default=",".join(CONTENDERS), help="contenders, comma-separated (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="leave out what has not ended by then")
    engine.add_process_arguments(parser)
    args = parser.parse_args()
    if args.child:
        Path(args.out).write_text(json.dumps(contend(args.child, Path(args.work))))
        return 0
    names = in_order(
        chosen(parser, "--models", args.models, MODELS), chosen(parser, "--modes", args.modes, MODES),
        chosen(parser, "--only", args.only, CONTENDERS),
    )  # fmt: skip
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    deadline = time.monotonic() + 60 * args.minutes
    runs: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    about = machine(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if args.tiny:
            (work / "tiny").touch()
        prepare(args.data, min(args.pairs, MOST_ROWS), args.tiny, work)
        no_trl = without_trl(args.trl_python) if any(":trl" in name for name in names) else None
        for name in names:
            left = deadline - time.monotonic()
            python = args.trl_python if ":trl" in name else sys.executable
            if ":trl" in name and no_trl:
                done: dict[str, Any] | str = no_trl
            elif left > 10:
                done = engine.child(name, python, work, work, args.threads, __file__, left)
            else:
                done = "out of time"
            if isinstance(done, str):
                left_out[name] = done
            else:
                runs[name] = done
            print(f"{name}: {done if isinstance(done, str) else round(done['pairs_per_second'], 2)}", file=sys.stderr)
            if args.json:
                found = {"machine": about, "pairs": args.pairs, "runs": runs, "left_out": left_out}
                args.json.write_text(json.dumps(found, indent=1))
    print(table(runs, left_out))
    return int(bool(left_out))


if __name__ == "__main__":
    sys.exit(main())
