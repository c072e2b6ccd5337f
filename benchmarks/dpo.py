"""DPO contenders of engine.py and engine_gpu.py: alignkit, phase by phase, and TRL's DPOTrainer, on the same rows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import common

BATCH, RATE = 8, 1e-5


def made_up_pairs(n: int, tiny: bool) -> list[dict[str, str]]:
    """Make pairs with lengths like those of dialogues: log-normal, a long tail, chosen and rejected apart."""
    text, scale = common.made_up_text(), 8 if tiny else 1
    return [
        {
            "prompt": f"Human: {text(90 / scale, 0.8, 600 // scale)}\n\nAssistant:",
            "chosen": " " + text(55 / scale, 0.8, 500 // scale),
            "rejected": " " + text(50 / scale, 0.8, 500 // scale),
        }
        for _ in range(n)
    ]


def prepare_rows(data: Path | None, pairs: int, tiny: bool, work: Path) -> list[str]:
    """Write the first `pairs` usable rows of the data, or made-up ones; return prompts with their chosen answers.

    rows.jsonl is for alignkit; in-order.jsonl has the same rows in the order in which its seed 0 visits them.
    """
    from alignkit.data import load

    rows: list[Any] = made_up_pairs(pairs, tiny)
    if data is not None:
        loaded = load(str(data), "pairs").rows[:pairs]
        rows = [{"prompt": r.prompt, "chosen": r.completions[0], "rejected": r.completions[1]} for r in loaded]
    common.write_jsonl(work / "rows.jsonl", rows)
    common.write_jsonl(work / "in-order.jsonl", (rows[i] for i in common.visited(len(rows), BATCH)))
    return [row["prompt"] + row["chosen"] for row in rows]


def run_alignkit(work: Path, cache: Path, **changes: Any) -> dict[str, Any]:
    """Train one epoch. Seconds are those of building (load the model, fill the reference's cache) and of all steps.

    changes: settings that differ from those below.
    """
    import torch

    from alignkit.engine.phases import Run

    settings: dict[str, Any] = {
        "model": str(work / "start"), "data": str(work / "rows.jsonl"), "output": work / "runs", "cache_file": cache,
        "reference": "cached", "batch_size": BATCH, "epochs": 1, "seed": 0, "max_tokens": 1024, "learning_rate": RATE,
        "schedule": "constant", "warmup_fraction": 0.0, "max_grad_norm": 1e9, "max_prompt_tokens": None,
        "max_completion_tokens": None, **changes,
    }  # fmt: skip
    run = Run("dpo", **settings)
    n_rows = len(run.read().train)
    if n_rows != (given := len(common.read_jsonl(work / "rows.jsonl"))):
        raise RuntimeError(f"alignkit trains on {n_rows} of the {given} rows, so the order of in-order.jsonl is wrong")
    started = time.perf_counter()
    total = run.build().total_steps
    built = time.perf_counter()
    losses = [run.loop.step(i, total)["loss"] for i in range(total)]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ended = time.perf_counter()
    return {"seconds": ended - started, "fill_seconds": built - started, "losses": losses, "pairs": n_rows}


def run_trl(
    work: Path, models: dict[str, Any] | None = None, checkpointing: bool = False, rounds: int = 1, **changes: Any
) -> dict[str, Any]:
    """Train one epoch with TRL's DPOTrainer, unshuffled. Seconds are those of all steps; the models are loaded before.

    models: `model`, `ref_model` and `peft_config` of the trainer, in place of the start model. rounds: epochs, each
    continues from the one before; the last is timed, the losses are of the first. changes: arguments of DPOConfig.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    if models is None:
        load = AutoModelForCausalLM.from_pretrained
        models = {k: load(work / "start", dtype=torch.float32) for k in ("model", "ref_model")}
    settings = {
        "output_dir": str(work / "trl"), "per_device_train_batch_size": BATCH, "num_train_epochs": 1,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 1e9,
        "max_length": None, "beta": 0.1, "use_cpu": True, "bf16": False, "fp16": False,
        "gradient_checkpointing": checkpointing, "save_strategy": "no", "report_to": [], "logging_steps": 1,
        "disable_tqdm": True, "optim": "adamw_torch_fused", "seed": 0, "dataloader_num_workers": 0, **changes,
    }  # fmt: skip
    rows = common.read_jsonl(work / "in-order.jsonl")
    trainer = InOrder(
        args=DPOConfig(**settings), train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work / "start"), **models,
    )  # fmt: skip
    losses: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        losses = losses or [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "fill_seconds": 0.0, "losses": losses, "pairs": len(rows)}
