"""Planned against measured memory: what `alignkit plan` says before a run, and the peak that the run's folder tells.

    python benchmarks/plan.py --data gsm8k_train.jsonl --json plan.json

Each configuration is planned in one process and run for three steps in another, on the same rows. Measured is the
largest resident set of the run's (first) process on a CPU, and what torch allocated on a GPU (--gpu), on which several
processes are not tried.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import engine
import engine_gpu

BAR = 0.15
MODELS: dict[str, dict[str, int]] = {
    "28M": {},
    "82M": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    # wide and shallow, unlike the two that the plan's margins for the C library were fitted on
    "60M": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
}  # fmt: skip
OFFLINE = {"batch_size": 8, "max_tokens": 2048, "max_steps": 3}
ONLINE: dict[str, Any] = {
    "data": "prompts.jsonl", "batch_size": 4, "max_tokens": 2048, "max_steps": 3,
    "reward": {"use": "length", "max": 40}, "sampling": {"max_new_tokens": 48},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "sft": {**OFFLINE, "data": "text.jsonl"},
    "dpo": OFFLINE,
    "dpo, lora": {**OFFLINE, "lora": 16},
    "dpo, checkpointing": {**OFFLINE, "gradient_checkpointing": True},
    "dpo, a full reference": {**OFFLINE, "reference": "full"},
    "dpo, an 8-bit reference": {**OFFLINE, "reference": "int8"},
    "dpo, bfloat16": {**OFFLINE, "dtype": "bfloat16", "precision": "bf16"},
    "kto": {**OFFLINE, "data": "thumbs.jsonl"},
    "reward": OFFLINE,
    "grpo": {**ONLINE, "group_size": 4},
    "grpo, lora": {**ONLINE, "group_size": 4, "lora": 16},
    "ppo, a critic of its own": {**ONLINE, "batch_size": 16},
    "ppo, a shared critic": {**ONLINE, "batch_size": 16, "critic": "shared"},
    "dpo, 8,192 tokens at once": {**OFFLINE, "batch_size": 32, "max_tokens": 8192, "max_steps": 2},
    "dpo, two processes": {**OFFLINE, "processes": 2},
    "dpo, two processes, fsdp": {**OFFLINE, "processes": 2, "fsdp": True},
    "dpo, two processes, fsdp, lora": {**OFFLINE, "processes": 2, "fsdp": True, "lora": 16},
}


def prepare(data: Path, work: Path) -> None:
    """Write the models, and 64 rows of like lengths in each form that a method reads: any step is the heaviest."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for name, sizes in MODELS.items():
        engine.write_start(work / name, [f"{row['question']}\n{row['answer']}" for row in rows], **sizes)
    rows.sort(key=lambda row: len(row["question"]) + len(row["answer"]))
    some = rows[len(rows) // 2 :][:65]
    asked, answers = [r["question"] for r in some[:64]], [" " + r["answer"] for r in some]
    forms: dict[str, list[dict[str, Any]]] = {
        "text": [{"prompt": q, "completion": a} for q, a in zip(asked, answers, strict=False)],
        "prompts": [{"prompt": q} for q in asked],
        "pairs": [{"prompt": q, "chosen": answers[i], "rejected": answers[i + 1]} for i, q in enumerate(asked)],
        "thumbs": [{"prompt": q, "completion": answers[i], "label": bool(i % 2)} for i, q in enumerate(asked)],
    }
    for name, lines in forms.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def figures(work: Path, model: str, case: str, gpu: bool) -> dict[str, Any]:
    """Plan and run one configuration; bytes."""
    method = case.split(",")[0]
    settings = {"data": "pairs.jsonl", **CASES[case], "method": method, "model": str(work / model)}
    settings |= {
        "data": str(work / settings["data"]),
        "output": str(work / "runs"),
        "name": f"{model}-{len(list(work.glob('runs/*')))}",
    }
    settings |= {"cache_file": str(work / "cache.sqlite"), **({} if gpu else {"device": "cpu"})}
    processes = settings.pop("processes", 1)
    file = work / "config.yaml"
    file.write_text(json.dumps(settings))
    planned = work / "plan.json"
    of_plan = ["plan", str(file), "--json", str(planned), "--gpu" if gpu else "--cpu", "--processes", str(processes)]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    for command in (["-m", "alignkit", *of_plan], [*launch, "-m", "alignkit", "run", str(file)]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{model} {case}: {done.stderr[-2000:]}")
    (session,) = json.loads((work / "runs" / settings["name"] / "sessions.json").read_text())
    plan = json.loads(planned.read_text())
    measured = session["peak_memory_bytes"]
    return {
        "planned": plan["peak"],
        "measured": measured,
        "ratio": plan["peak"] / measured,
        "phases": plan["memory"]["phases"],
    }


def main() -> int:
    """Parse arguments, go through the configurations, print and write; 1 where one is off by more than the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with the columns question and answer")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--only", help="cases whose names begin so (default: all)")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    models = engine_gpu.chosen(parser, "--models", args.models, tuple(MODELS))
    table: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(args.data, Path(folder))
        for model in models:
            for case in [c for c in CASES if c.startswith(args.only or "") and not (args.gpu and "processes" in c)]:
                row = table[f"{model} {case}"] = figures(Path(folder), model, case, args.gpu)
                planned, measured = (row[k] / 2**20 for k in ("planned", "measured"))
                said = f"planned {planned:6.0f} MiB  measured {measured:6.0f} MiB  ratio {row['ratio']:.2f}"
                print(f"{model:5} {case:26} {said}", flush=True)
    off = [name for name, row in table.items() if abs(row["ratio"] - 1) > BAR]
    print(f"off by more than {BAR:.0%}: {', '.join(off) or 'none'}")
    if args.json:
        args.json.write_text(json.dumps({"machine": engine_gpu.machine(0), "table": table}, indent=1) + "\n")
    return int(bool(off))


if __name__ == "__main__":
    sys.exit(main())
