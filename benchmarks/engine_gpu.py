"""DPO at the shapes of Llama-3.2-1B and Qwen3-0.6B: alignkit, and TRL's DPOTrainer with and without its chunked head.

    python benchmarks/engine_gpu.py --json engine-gpu.json
    python benchmarks/engine_gpu.py --tiny           tiny models, on a CPU too, in seconds: does everything run?

Random weights, bfloat16, 8 pairs a step, LoRA (rank 16 on all linear layers) and full training. TRL takes part with
--trl-python, an interpreter that has it; the most informative contenders run first: alignkit and TRL with its defaults,
for each model and mode. Every contender has its own process and trains on all rows twice: the first pass compiles and
fills caches, the second is timed, with a new reference cache for alignkit. TRL's head has no switch: "trl-full-logits"
replaces it by full logits and TRL's own selective_log_softmax. Peak memory is the allocator's on a GPU, the resident
set of the process on a CPU. A contender that fails is reported with its error, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import common
import contest
import dpo

MODELS = ("llama-3.2-1b", "qwen3-0.6b")
MODES = ("lora", "full")
CONTENDERS = ("alignkit", "trl", "trl-full-logits")
DEFAULT_ROWS, TINY_ROWS, MOST_ROWS = 64, 8, 256
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
    },
    "qwen3-0.6b": {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
    },
}  # fmt: skip
TINY = {
    "vocab_size": common.VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- contenders


def prepare(args: argparse.Namespace, work: Path) -> None:
    """Write the rows, and a byte-level BPE tokenizer of them."""
    from alignkit.demo.base import tokenizer_from

    texts = dpo.prepare_rows(args.data, args.pairs, args.tiny, work)
    tokenizer_from(texts, common.VOCABULARY).save_pretrained(work / "start")


def contend(name: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run one contender, MODEL:MODE:CONTENDER, in this process and return its figures."""
    model, mode, contender = name.split(":")
    if contender == "alignkit":
        figures = run_alignkit(model, mode, args.tiny, work)
    else:
        figures = run_trl(model, mode, args.tiny, work, chunked=contender == "trl")
    figures["pairs_per_second"] = figures["pairs"] / figures["seconds"]
    figures["step_pairs_per_second"] = figures["pairs"] / (figures["seconds"] - figures["fill_seconds"])
    return figures


def build_model(name: str, tiny: bool) -> Any:
    """Return the untrained model, the same for the same name: bfloat16 on a GPU, float32 on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    ends = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    kind = LlamaConfig if name.startswith("llama") else Qwen3Config
    config = kind(**SHAPES[name] | (TINY if tiny else {}) | ends)
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)


def run_alignkit(model: str, mode: str, tiny: bool, work: Path) -> dict[str, Any]:
    """Train twice from the start, and time the second time."""
    import torch

    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    losses = None
    for i in range(2):
        free_memory()
        figures = dpo.run_alignkit(
            work, work / f"{model}-{mode}-{i}.sqlite", model=build_model(model, tiny), tokenizer=str(work / "start"),
            lora=16 if mode == "lora" else None, dtype=dtype, max_tokens=8192,
        )  # fmt: skip
        losses = losses or figures["losses"]
    return {**figures, "losses": losses}


def run_trl(model: str, mode: str, tiny: bool, work: Path, chunked: bool) -> dict[str, Any]:
    """Train on all rows twice, and time the second time."""
    import torch
    from peft import LoraConfig
    from trl.trainer import dpo_trainer

    usual_head = dpo_trainer.add_fused_lm_head
    if not chunked:
        dpo_trainer.add_fused_lm_head = full_logits_head
    free_memory()
    models: dict[str, Any] = {"model": build_model(model, tiny)}
    if mode == "lora":
        models["peft_config"] = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        models["ref_model"] = build_model(model, tiny)
    cuda = torch.cuda.is_available()
    try:
        return dpo.run_trl(work, models, rounds=2, use_cpu=not cuda, bf16=cuda)
    finally:
        dpo_trainer.add_fused_lm_head = usual_head


def full_logits_head(model: Any, **_: Any) -> None:
    """Replace TRL's `add_fused_lm_head`: the model's own logits at every position, as trainers did before it."""
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
        # TRL logs the entropy; it is left out here: it would need the probabilities of the whole row once more
        nothing = logps.detach().float().zero_()
        return FusedCausalLMOutput(
            log_probs=logps, entropy=nothing, mean_logits=seen.mean(-1), is_top1=top, label_mask=mask
        )

    model.forward = types.MethodType(scored, model)


def free_memory() -> None:
    """On a GPU free what an earlier pass left, and restart the memory's high-water mark; a CPU's cannot restart."""
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# -------------------------------------------------------------------------------------------------------- report


def report(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Lay out the figures; ratios are to TRL with its defaults."""
    head = [
        "model",
        "mode",
        "contender",
        "pairs/s",
        "steps alone",
        "peak MiB",
        "x trl",
        "memory/trl",
        "first, last loss",
    ]
    rows = []
    for name, (f,) in runs.items():
        model, mode, contender = name.split(":")
        trl = runs.get(f"{model}:{mode}:trl", [{}])[0]
        speed = common.ratio(f["pairs_per_second"], trl.get("pairs_per_second"))
        memory = common.ratio(f["peak_mib"], trl.get("peak_mib"))
        figures = [f"{f['pairs_per_second']:.2f}", f"{f['step_pairs_per_second']:.2f}", f"{f['peak_mib']:.0f}"]
        figures += [common.shown(speed, ".2f"), common.shown(memory, ".2f")]
        rows.append([model, mode, contender, *figures, f"{f['losses'][0]:.4f} {f['losses'][-1]:.4f}"])
    return common.table(head, rows, names=3)


def in_order(models: list[str], modes: list[str], contenders: list[str]) -> list[str]:
    """Return MODEL:MODE:CONTENDER, the most informative first: TRL with full logits comes last."""
    names = [f"{model}:{mode}:{contender}" for model in models for mode in modes for contender in contenders]
    return sorted(names, key=lambda name: name.endswith(":trl-full-logits"))


def main() -> int:
    """Parse arguments, run the contenders in turn, print and write."""
    parser = common.parser_of(__doc__, trl=True)
    parser.add_argument("--data", type=Path, help="JSONL of preference pairs (default: made-up text)")
    parser.add_argument(
        "--pairs", type=int, help=f"rows, at most {MOST_ROWS} (default {DEFAULT_ROWS}, tiny {TINY_ROWS})"
    )
    parser.add_argument("--models", help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--modes", help=f"comma-separated, of {', '.join(MODES)}")
    parser.add_argument("--only", help=f"contenders, comma-separated, of {', '.join(CONTENDERS)}")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this time; contenders left over fail")
    args = common.parsed(parser)
    args.pairs = min(args.pairs or (TINY_ROWS if args.tiny else DEFAULT_ROWS), MOST_ROWS)
    if args.child:
        return contest.answer(args, prepare, contend)
    names = in_order(
        common.chosen(parser, "--models", args.models, MODELS), common.chosen(parser, "--modes", args.modes, MODES),
        common.contenders(parser, args, CONTENDERS),
    )  # fmt: skip
    deadline = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        ran = contest.Contest(__file__, args, Path(folder), pairs=args.pairs)
        ran.run(names, deadline=deadline)
    return common.finish(args, [report(ran.runs)], ran.failed, {"pairs": args.pairs, "runs": ran.runs})


if __name__ == "__main__":
    sys.exit(main())
