"""Planned and measured memory: what `alignkit plan` estimates before a run, and the peak in the run's folder after it.

    python benchmarks/plan.py --data gsm8k_train.jsonl --json plan.json
    python benchmarks/plan.py --tiny                 a tiny model and one case, in seconds: does everything run?

Each configuration is planned in one process and run for three steps in another, on the same rows. Measured is the
largest resident set of the (first) process of the run on a CPU, and what torch allocated on a GPU (--gpu, without the
cases of several processes). With fsdp, glibc is told to give back what is freed (MALLOC_MMAP_THRESHOLD_).
A configuration that fails is reported with its error; the exit code is 1 then, or when a plan is off by more than the
bar.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

BAR = 0.15
RETURNED = 4_000_000  # bytes, from which glibc gives memory back; else it keeps much of what FSDP2 gathers, and frees
MODELS: dict[str, dict[str, int]] = {
    "28M": {},
    "82M": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    # wide and shallow, unlike the two to which the plan's margins for the C library were fitted
    "60M": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
}  # fmt: skip
TINY_MODEL, TINY_CASE = "tiny", "dpo"
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
    "dpo, four processes, fsdp": {**OFFLINE, "processes": 4, "fsdp": True},
    "dpo, four processes, fsdp, two replicas": {**OFFLINE, "processes": 4, "fsdp": True, "fsdp_replicas": 2},
    "grpo, two processes, fsdp": {**ONLINE, "processes": 2, "fsdp": True, "group_size": 4},
    "grpo, four processes, fsdp": {**ONLINE, "processes": 4, "fsdp": True, "group_size": 4},
}


def prepare(args: argparse.Namespace, models: list[str], work: Path) -> None:
    """Write the models, and rows of similar lengths in each form that a method reads: any step is the heaviest."""
    n_rows = 8 if args.tiny else 64
    rows = common.made_up_questions(4 * n_rows) if args.data is None else common.read_jsonl(args.data)
    for name in models:
        texts = [f"{row['question']}\n{row['answer']}" for row in rows]
        common.write_start(work / name, texts, args.tiny, **MODELS.get(name, {}))
    rows.sort(key=lambda row: len(row["question"]) + len(row["answer"]))
    rows = rows[len(rows) // 2 :][: n_rows + 1]
    questions, answers = [r["question"] for r in rows[:n_rows]], [" " + r["answer"] for r in rows]
    pairs = zip(questions, answers, answers[1:], strict=False)
    forms: dict[str, list[dict[str, Any]]] = {
        "text": [{"prompt": q, "completion": a} for q, a in zip(questions, answers, strict=False)],
        "prompts": [{"prompt": q} for q in questions],
        "pairs": [{"prompt": q, "chosen": a, "rejected": other} for q, a, other in pairs],
        "thumbs": [{"prompt": q, "completion": answers[i], "label": bool(i % 2)} for i, q in enumerate(questions)],
    }
    for name, lines in forms.items():
        common.write_jsonl(work / f"{name}.jsonl", lines)


def measure(work: Path, model: str, case: str, gpu: bool, threads: int) -> dict[str, Any]:
    """Plan and run one configuration; bytes. Raises RuntimeError with the last line that a failing command printed."""
    settings = {"data": "pairs.jsonl", **CASES[case], "method": case.split(",")[0], "model": str(work / model)}
    settings |= {"data": str(work / settings["data"]), "output": str(work / "runs")}
    settings |= {"name": f"run-{len(list(work.glob('runs/*')))}", "cache_file": str(work / "cache.sqlite")}
    settings |= {} if gpu else {"device": "cpu"}
    processes = settings.pop("processes", 1)
    config, planned = work / "config.yaml", work / "plan.json"
    config.write_text(json.dumps(settings))
    alignkit = ["-m", "alignkit"]
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    # a plan that fits tries no settings that need less memory, which takes longer than the plan itself
    place = ["--gpu"] if gpu else ["--cpu", "--memory", "1000TB"]
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads // processes))}
    if settings.get("fsdp"):
        env["MALLOC_MMAP_THRESHOLD_"] = str(RETURNED)
    for command in (
        [*alignkit, "plan", str(config), "--json", str(planned), *place, "--processes", str(processes)],
        [*several, *alignkit, "run", str(config)],
    ):
        done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr)
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RuntimeError(f"alignkit {command[-1] if command[-2] == 'run' else 'plan'}: {last}")
    (session,) = json.loads((work / "runs" / settings["name"] / "sessions.json").read_text())
    plan, measured = json.loads(planned.read_text()), session["peak_memory_bytes"]
    ratio = plan["peak"] / measured
    return {"planned": plan["peak"], "measured": measured, "ratio": ratio, "phases": plan["memory"]["phases"]}


def chosen_cases(args: argparse.Namespace) -> list[str]:
    """Return the cases whose names contain --only, by default all; with --tiny one."""
    if args.tiny and not args.only:
        return [TINY_CASE]
    return [case for case in CASES if (args.only or "") in case and not (args.gpu and "processes" in case)]


def main() -> int:
    """Parse arguments, go through the configurations, print and write."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--data", type=Path, help="JSONL with the columns question and answer (tiny: made-up rows)")
    parser.add_argument("--models", help=f"comma-separated, of {', '.join(MODELS)} (tiny: a model of its own)")
    parser.add_argument("--only", help="cases whose names contain this (default: all; tiny: dpo)")
    parser.add_argument("--gpu", action="store_true", help="plan and measure on a GPU")
    args = common.parsed(parser)
    if args.data is None and not args.tiny:
        parser.error("--data is needed: a JSONL file with the columns question and answer")
    models = [TINY_MODEL] if args.tiny else common.chosen(parser, "--models", args.models, tuple(MODELS))
    rows: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    common.hide_scripts()
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, models, Path(folder))
        for name, model, case in [(f"{model} {case}", model, case) for model in models for case in chosen_cases(args)]:
            try:
                rows[name] = measure(Path(folder), model, case, args.gpu, args.threads)
            except RuntimeError as error:
                failed[name] = str(error)
            print(f"{name}: {failed.get(name, 'done')}", file=sys.stderr, flush=True)
    cells = [
        [name, f"{row['planned'] / 2**20:.0f}", f"{row['measured'] / 2**20:.0f}", f"{row['ratio']:.2f}"]
        for name, row in rows.items()
    ]
    lines = [common.table(["configuration", "planned MiB", "measured MiB", "ratio"], cells)]
    off = [name for name, row in rows.items() if abs(row["ratio"] - 1) > BAR and not args.tiny]
    if not args.tiny:  # the plan's margins are for models, not for an interpreter without one
        lines.append(f"off by more than {BAR:.0%}: {', '.join(off) or 'none'}")
    return common.finish(args, lines, failed, {"table": rows}) or int(bool(off))


if __name__ == "__main__":
    sys.exit(main())
