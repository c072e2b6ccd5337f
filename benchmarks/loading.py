"""Memory of a rank while a model is loaded and sharded by `fsdp`: read in parts, and as a whole.

    python benchmarks/loading.py --json loading.json      200 M weights, 2 and 4 gloo processes
    python benchmarks/loading.py --tiny                   20 M weights, 2 processes

A rank's peak is the largest growth of its resident set (VmHWM, which is reset before) over what it had before loading,
after a first model was loaded to import everything. The exit code is 1 where a peak of a model that is read in parts is
above 1.3 times the rank's share plus one block, and with --tiny 10 MiB more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

MIB = 2**20
SIZE: dict[str, int] = {
    "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 13,
    "num_attention_heads": 16, "num_key_value_heads": 16,
}  # fmt: skip
TINY_SIZE: dict[str, int] = {
    **SIZE,
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
}


def resident(what: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def load(folder: str, in_parts: bool) -> dict[str, int]:
    """Load and shard a model; return the bytes of this rank's share, of a block, and of the peak."""
    import torch
    from accelerate import Accelerator

    from alignkit.config import RunConfig
    from alignkit.models import loading, sharding
    from alignkit.models.scoring import Scorer

    loading.whole_because = lambda config: None if in_parts else "for comparison"  # type: ignore[assignment]
    config = RunConfig(method="dpo", model=folder, data="-", fsdp=True, device="cpu")
    accelerator = Accelerator(cpu=True)
    accelerator.wait_for_everyone()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    scorer = Scorer(loading.load_model(config, torch.device("cpu"))[0])
    block = max(sum(p.nbytes for p in b.parameters()) for b in sharding.blocks_of(scorer))
    sharding.shard(scorer, sharding.mesh_of("cpu", accelerator.num_processes, 1))
    sharding.ready(scorer, torch.device("cpu"))
    share = sum(sharding.local(p).nbytes for p in scorer.parameters())
    return {"share": share, "block": block, "peak": resident("VmHWM") - before}


def child(args: argparse.Namespace) -> None:
    """Load a first model, then the one to measure; write this rank's figures."""
    for folder in (args.work / "first", args.work / "model"):
        found = load(str(folder), args.child == "parts")
    (args.work / f"{args.child}-{os.environ['RANK']}.json").write_text(json.dumps(found))


def measure(work: Path, n: int, how: str) -> dict[str, Any]:
    """Return the figures of the rank with the highest peak, in MiB."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", __file__]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--child", how, "--work", str(work)], check=True, env=env, stderr=subprocess.DEVNULL)
    ranks = [json.loads((work / f"{how}-{rank}.json").read_text()) for rank in range(n)]
    worst = max(ranks, key=lambda one: one["peak"])
    return {"processes": n, "read": how, **{name: round(value / MIB, 1) for name, value in worst.items()}}


def main() -> None:
    """Write the models, measure, and print a table."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = common.parsed(parser)
    if args.child:
        child(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        texts = [f"{row['question']} {row['answer']}" for row in common.made_up_questions(8)]
        common.write_start(work / "first", texts, tiny=True)
        common.write_start(work / "model", texts, tiny=False, **(TINY_SIZE if args.tiny else SIZE))
        counts = [2] if args.tiny else [2, 4]
        rows = [measure(work, n, how) for n in counts for how in ("parts", "whole")]
    slack, off = 10.0 * args.tiny, False
    for row in rows:
        row["allowed"] = round(1.3 * row["share"] + row["block"] + slack, 1)
        off |= row["read"] == "parts" and row["peak"] > row["allowed"]
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if args.json:
        args.json.write_text(json.dumps({"unit": "MiB", "rows": rows}, indent=1))
    sys.exit(int(off))


if __name__ == "__main__":
    main()
