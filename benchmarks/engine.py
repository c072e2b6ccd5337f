"""DPO on real preference pairs: the packed forest, padded concatenation, and TRL's DPOTrainer, in one run.

    python benchmarks/engine.py --data hh_pairs.jsonl --pairs 256 --json engine.json

Every contender runs in a process of its own, on the same rows in the same order, with the same 28 M-parameter Llama in
float32 and the same optimiser: 8 pairs a step, a reference pass for every row. Peak memory is the process's largest
resident set. TRL is left out, and said so, unless --trl-python (default: this interpreter) can import it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCABULARY, HIDDEN, LAYERS, BATCH, RATE = 8192, 512, 8, 8, 1e-5
CONTENDERS = ("forest", "forest-warm", "padded", "trl", "trl-checkpointing")


def write_start(folder: Path, texts: list[str], **changes: Any) -> None:
    """Write the untrained Llama, changed where it is told, and a byte-level BPE tokenizer of the texts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from alignkit.demo.base import tokenizer_from

    tokenizer = tokenizer_from(texts, VOCABULARY)
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 1280, "num_hidden_layers": LAYERS, "num_attention_heads": 8}
    sizes |= {"vocab_size": VOCABULARY, "num_key_value_heads": 8, "max_position_embeddings": 4096} | changes
    config = LlamaConfig(
        **sizes,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", file=sys.stderr)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_alignkit(layout: str, work: Path, cache: Path, **changes: Any) -> dict[str, Any]:
    """Train with the engine; seconds hold the reference's fill and all steps, not reading and loading.

    changes: settings that differ from those below.
    """
    import torch

    from alignkit import registry
    from alignkit.config import split
    from alignkit.engine import assemble
    from alignkit.engine.loop import Loop
    from alignkit.models.loading import load_tokenizer
    from alignkit.runs import folder as runfolder

    cls = registry.get("dpo")
    settings = {
        "method": "dpo", "model": str(work / "start"), "data": str(work / "rows.jsonl"), "layout": layout,
        "batch_size": BATCH, "learning_rate": RATE, "schedule": "constant", "warmup_fraction": 0.0,
        "output": work, "cache_file": cache, "reference": "cached", "max_prompt_tokens": None,
        "max_completion_tokens": None, "max_grad_norm": 1e9, "log_every": 10**6, "max_tokens": 4096, **changes,
    }  # fmt: skip
    config, method_config = split(settings, cls.Config)
    method = cls(method_config)
    rows = assemble.read(config, method, load_tokenizer(config))
    accelerator = assemble.accelerator_for(config)
    folder = runfolder.create(config, accelerator)
    # the rows lie in the file in the order of training
    order = torch.randperm
    torch.randperm = lambda n, **_: torch.arange(n)  # type: ignore[assignment]
    started = time.perf_counter()
    parts = assemble.build(config, method, rows, accelerator)
    filled = time.perf_counter()
    loop = Loop(config, method, parts, rows, folder, {})
    losses = [loop.step(i, parts.stream.steps_per_epoch)["loss"] for i in range(parts.stream.steps_per_epoch)]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ended = time.perf_counter()
    torch.randperm = order
    return {"seconds": ended - started, "fill_seconds": filled - started, "losses": losses, "pairs": len(rows.train)}


def run_trl(work: Path, checkpointing: bool, models: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Train with TRL's DPOTrainer on the same rows, unshuffled.

    models: its arguments `model`, `ref_model` and `peft_config` in the place of the start model; each round of
    training goes on from the one before, and the last is timed: "rounds", besides arguments of DPOConfig in changes.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    if models is None:
        load = AutoModelForCausalLM.from_pretrained
        models = {k: load(work / "start", dtype=torch.float32) for k in ("model", "ref_model")}
    rounds = changes.pop("rounds", 1)
    settings = {
        "output_dir": str(work / "trl"), "per_device_train_batch_size": BATCH, "num_train_epochs": 1,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 1e9,
        "max_length": None, "beta": 0.1, "use_cpu": True, "bf16": False, "fp16": False,
        "gradient_checkpointing": checkpointing, "save_strategy": "no", "report_to": [], "logging_steps": 1,
        "disable_tqdm": True, "optim": "adamw_torch_fused", "seed": 0, "dataloader_num_workers": 0, **changes,
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(work / "start")
    trainer = InOrder(
        args=DPOConfig(**settings), train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **models
    )
    losses: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        losses = losses or [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "fill_seconds": 0.0, "losses": losses, "pairs": len(rows)}


def hide_scripts() -> None:
    """Take this folder off the import path, or transformers takes our kernels.py for the package `kernels`."""
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]


def contend(name: str, work: Path, cache: Path) -> dict[str, Any]:
    """Run one contender in this process and return its figures."""
    import resource

    hide_scripts()
    if name.startswith("trl"):
        figures = run_trl(work, name == "trl-checkpointing")
    else:
        figures = run_alignkit(name.split("-")[0], work, cache)
    figures["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures["pairs_per_second"] = figures["pairs"] / figures["seconds"]
    return figures


def prepare(data: Path, pairs: int, work: Path) -> None:
    """Write the start model and the first `pairs` usable rows as explicit prompt, chosen and rejected."""
    from alignkit.data import load

    loaded = load(str(data), "pairs")
    rows = [{"prompt": r.prompt, "chosen": r.completions[0], "rejected": r.completions[1]} for r in loaded.rows[:pairs]]
    (work / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    write_start(work / "start", [r["prompt"] + r["chosen"] for r in rows])


def child(
    name: str, python: str, work: Path, cache: Path, threads: int, script: str = __file__, seconds: float | None = None
) -> dict[str, Any] | str:
    """Run one contender of the script in a process of its own; a text says why it has no figures."""
    out = work / f"{name}.json"
    command = [python, script, "--child", name, "--work", str(work), "--cache", str(cache), "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} seconds"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {done.returncode}"
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def report(runs: dict[str, list[dict[str, Any]]], left_out: dict[str, str]) -> dict[str, Any]:
    """Print the table and return what it shows, with ratios to TRL and to padded rows."""
    table = {
        name: {
            "pairs_per_second": statistics.median(f["pairs_per_second"] for f in figures),
            "peak_mib": statistics.median(f["peak_mib"] for f in figures),
            "first_loss": figures[0]["losses"][0],
            "last_loss": figures[0]["losses"][-1],
        }
        for name, figures in runs.items()
    }
    rows = ["contender            pairs/s   peak MiB   x padded   x TRL   memory/TRL   last loss"]
    for name, row in table.items():
        rival = table.get("trl")
        row["speed_to_padded"] = row["pairs_per_second"] / table["padded"]["pairs_per_second"]
        row["speed_to_trl"] = row["pairs_per_second"] / rival["pairs_per_second"] if rival else None
        row["memory_to_trl"] = row["peak_mib"] / rival["peak_mib"] if rival else None
        against = f"{row['speed_to_trl']:7.2f}   {row['memory_to_trl']:10.2f}" if rival else "      -            -"
        rows.append(
            f"{name:18} {row['pairs_per_second']:9.2f}  {row['peak_mib']:9.0f}  {row['speed_to_padded']:9.2f} "
            f"{against}   {row['last_loss']:.6f}"
        )
    difference = max(abs(a - b) for a, b in zip(runs["forest"][0]["losses"], runs["padded"][0]["losses"], strict=True))
    rows.append(f"largest difference of a step's loss, forest against padded: {difference:.2g}")
    warm = table["forest-warm"]["pairs_per_second"] / table["forest"]["pairs_per_second"]
    rows.append(f"warm cache against cold: {warm:.2f} times the pairs a second")
    rows += [f"{name} left out: {why}" for name, why in left_out.items()]
    print("\n".join(rows))
    return {"table": table, "forest_to_padded_loss": difference, "warm_to_cold": warm, "left_out": left_out}


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark of contenders in processes of their own takes, and what it tells them."""
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has TRL")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    for hidden in ("--child", "--work", "--cache", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)


def main() -> None:
    """Parse arguments, run the contenders in turn, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="JSONL of preference pairs")
    parser.add_argument("--pairs", type=int, default=256, help="rows to train on, once (default 256)")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; the medians are shown (default 1)")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, comma-separated")
    add_process_arguments(parser)
    args = parser.parse_args()
    if args.child:
        Path(args.out).write_text(json.dumps(contend(args.child, Path(args.work), Path(args.cache))))
        return
    if args.data is None:
        parser.error("--data is needed: a JSONL file of preference pairs")
    runs: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(args.data, args.pairs, work)
        for round_number in range(args.repeat):
            for name in args.only.split(","):
                python = args.trl_python if name.startswith("trl") else sys.executable
                # the padded run gets a cache of its own, the warm one finds what the cold one left
                cache = work / f"{'padded' if name == 'padded' else 'forest'}-{round_number}.sqlite"
                figures = child(name, python, work, cache, args.threads)
                if isinstance(figures, str):
                    left_out[name] = figures
                else:
                    print(f"{name}: {figures['pairs_per_second']:.2f} pairs/s", file=sys.stderr)
                    runs.setdefault(name, []).append(figures)
        result = report(runs, left_out)
    if args.json:
        import torch
        import transformers

        machine = {
            "processor": platform.machine(), "threads": args.threads, "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__, "pairs": args.pairs,
        }  # fmt: skip
        args.json.write_text(json.dumps({"machine": machine, **result, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
