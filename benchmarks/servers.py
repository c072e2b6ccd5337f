"""GRPO on the demo's task, sampled by this process and by a vLLM server: rewards, and the mismatch of both.

    python benchmarks/servers.py --vllm ENVIRONMENT/bin/vllm --threads 1 --json servers.json
    python benchmarks/servers.py --tiny              few questions and steps, no server: does everything run?

Each seed has its own task and base. The base is aligned with completions of `generate`, of a bfloat16 server with the
default correction (token_truncate), and of the same server without one. Rewards are those of held-out questions, four
answers each, sampled by `generate` whatever sampled in training; the last lines are their means over the seeds with
a 95 % interval (Student's t), and those of the rewards of all steps. reward/mean, rollout/kl and the others are means
over the steps, ratio_max the largest.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
from demo import shrink

ARMS: dict[str, dict[str, Any] | None] = {
    "generate": None,
    "vllm": {"backend": "vllm"},
    "vllm, none": {"backend": "vllm", "correction": "none"},
}
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t of 2, 3, ... 10 values
OF_STEPS = ("reward/mean", "rollout/kl", "rollout/ratio_mean", "rollout/corrected", "seconds/sync", "seconds/sampling")


def measured(seed: int, folder: Path, rollout: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """Run a demo whose completions are sampled in this way; return its figures, and the folder of its base."""
    import yaml

    from alignkit import registry
    from alignkit.demo.before_after import outcome
    from alignkit.runs.folder import read_metrics

    method, started = registry.get("grpo"), time.perf_counter()
    settings = dict(method.demo_settings or {})
    method.demo_settings = settings | ({} if rollout is None else {"rollout": rollout})
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = outcome("grpo", folder, seed)
    finally:
        method.demo_settings = settings
    lines = read_metrics(found.folder)
    figures = {
        "seconds": time.perf_counter() - started,
        "before": found.before.reward,
        "reward": found.after.reward,
        "policy_kl": found.after.kl,
    }
    for name in OF_STEPS:
        if values := [line[name] for line in lines if name in line]:
            figures[name] = statistics.fmean(values)
    if values := [line["rollout/ratio_max"] for line in lines if "rollout/ratio_max" in line]:
        figures["rollout/ratio_max"] = max(values)
    return figures, str(yaml.safe_load((found.folder / "config.yaml").read_text())["model"])


@contextlib.contextmanager
def served(program: Path, model: str, logs: Path) -> Iterator[str]:
    """Run a bfloat16 server of a model; yield its address."""
    from alignkit.config import RunConfig
    from alignkit.rollout.serving import Servers, plan

    given = {"method": "-", "data": "-", "model": model, "device": "cpu"}
    made = plan(RunConfig(**given), str(program), 1, [], "bfloat16", [])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Servers(made, "127.0.0.1", port, 1, logs) as running:
        running.wait_until_ready(900)
        yield running.urls[0]


def of_seed(seed: int, work: Path, program: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the figures of each arm."""
    figures, base = measured(seed, work / f"{seed}-generate", None)
    yield "generate", figures
    if program is None:
        return
    with served(program, base, work / f"{seed}-logs") as url:
        for arm, rollout in ARMS.items():
            if rollout is not None:
                yield arm, measured(seed, work / f"{seed}-{arm}", {**rollout, "urls": [url]})[0]


def interval(values: list[float]) -> str:
    """Return a mean with the half of its 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = T95[min(len(values), len(T95) + 1) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} +- {half:.3f}"


def main() -> int:
    """Measure, print and write the figures."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--vllm", type=Path, help="the program `vllm`; without it only `generate` is measured")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    args = common.parsed(parser)
    common.hide_scripts()
    import torch

    if args.tiny:
        shrink()
    torch.set_num_threads(args.threads)
    found, failed = list[dict[str, Any]](), dict[str, str]()
    with tempfile.TemporaryDirectory() as work:
        os.environ["ALIGNKIT_DEMO"] = str(Path(work) / "bases")
        for seed in [0] if args.tiny else map(int, args.seeds.split(",")):
            try:
                for arm, figures in of_seed(seed, Path(work), args.vllm):
                    found.append({"arm": arm, "seed": seed, **figures})
                    common.save(args, {"runs": found})
            except Exception as error:
                traceback.print_exc()
                failed[f"seed {seed}"] = common.reason(error)
    return common.finish(args, [table(found), *means(found)], failed, {"runs": found})


def table(found: list[dict[str, Any]]) -> str:
    """Return a line for each run."""
    names = ("before", "reward", "reward/mean", "policy_kl", "rollout/kl", "rollout/ratio_mean", "rollout/ratio_max",
             "rollout/corrected", "seconds/sync", "seconds/sampling", "seconds")  # fmt: skip
    cells = [[f"{one['arm']}, {one['seed']}", *(common.shown(one.get(n), ".4g") for n in names)] for one in found]
    return common.table(["run", *names], cells)


def means(found: list[dict[str, Any]]) -> list[str]:
    """Return the mean rewards of each arm."""
    by_arm = {arm: [one for one in found if one["arm"] == arm] for arm in ARMS}

    def of(runs: list[dict[str, Any]], name: str) -> str:
        return interval([one[name] for one in runs])

    return [
        f"{arm}: reward {of(runs, 'reward')}, in training {of(runs, 'reward/mean')}"
        for arm, runs in by_arm.items()
        if runs
    ]


if __name__ == "__main__":
    sys.exit(main())
