"""The alarms of docs/health.md on runs with a planted failure, and on healthy ones, of the demo's task.

    python benchmarks/health.py --part tune --work DIR       the runs on which the limits were chosen; also tune-again
    python benchmarks/health.py --part report --work DIR     the runs that are reported: another world, base and seeds
    python benchmarks/health.py --tiny                       two runs of a few steps, in seconds: does everything run?

Every run is real: 32 small steps, with alignkit's listener and its default limits. A planted run is a hit when it
raises the alarm that it was planted for. A healthy run is one of the demo's recipes, at its rate or half of it, in full
or with LoRA; every alarm of it is false. Other alarms of a planted run are in the JSON and are not judged: a policy
that has left its reference is wrong in more than one way. A run that is in DIR already is read from its folder, which
raises the same alarms. A run that fails is reported with its error, and the exit code is 1.
"""

from __future__ import annotations

import random
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import torch
from health_cases import CALLS, CASES, Case

from alignkit import Engine
from alignkit.alarms import ALARMS, Health
from alignkit.config import read_yaml
from alignkit.demo import recipes, world
from alignkit.demo.base import write_start
from alignkit.insight.health import replay
from alignkit.insight.health.monitor import held_out
from alignkit.runs.folder import read_lines, read_metrics

# seed of the world and its base, first seed of the runs
PARTS = {"tune": (0, 100), "tune-again": (1, 200), "report": (2, 300)}
SMALL = {"batch_size": 8, "max_steps": 32, "epochs": 100, "device": "cpu"}
SAMPLED = {"grpo": {"group_size": 4}, "rloo": {"group_size": 4, "batch_size": 8}, "ppo": {"batch_size": 16}}
TINY = {"max_steps": 3, "batch_size": 4}
TINY_CASES = (("8 tokens", "grpo"), ("recipe", "dpo"))
# what a run must log so that an alarm can be raised

LOGGED = {
    "kl_high": {"kl"}, "kl_low": {"kl"}, "reward_kl": {"kl", "reward/mean"},
    "reward_length": {"reward/mean", "completion/length"}, "reward_held_out": {"reward/mean", "a reward of weight 0"},
    "distinct": {"completion/distinct_2"}, "entropy": {"entropy"}, "repetition": {"texts"}, "opening": {"texts"},
    "displacement": {"logps/chosen"}, "same_reward": {"reward/std"}, "zero_variance": {"several texts a prompt"},
    "clip_fraction": {"clip_fraction"},
    "value_loss": {"value"}, "explained_variance": {"value/explained_variance"}, "grad_spike": {"grad_norm"},
    "truncation": {"completion/eos_rate"}, "mismatch": {"rollout/kl"},
}  # fmt: skip


def watched(folder: Path) -> list[str]:
    """Return the alarms that a run could raise, because it logs what they need."""
    logged = {name for line in read_metrics(folder) for name in line}
    logged |= {"a reward of weight 0"} if held_out(read_yaml(folder / "config.yaml").get("reward")) else set()
    texts = folder / "completions.jsonl"
    rows = [row for row in read_lines(texts) if row["training"]] if texts.is_file() else []
    logged |= {"texts"} if rows else set()
    logged |= {"several texts a prompt"} if len({(r["step"], r["row"]) for r in rows}) < len(rows) else set()
    return [name for name in ALARMS if LOGGED[name] <= logged]


def prepare(folder: Path, seed: int, tiny: bool) -> None:
    """Create the world of a part and its base, once."""
    train, test = world.questions(seed)
    rows = world.judged_rows(train)
    draw = random.Random(seed)
    noise = "".join(draw.choices("qxzjkvw#%&@", k=48))
    bad = {**rows[0], "chosen": noise, "rejected": rows[0]["chosen"]}
    world.write_jsonl(folder / "train.jsonl", rows)
    world.write_jsonl(folder / "noise.jsonl", [*rows[1:], bad])
    world.write_jsonl(folder / "test.jsonl", world.judged_rows(test)[:12])
    world.write_jsonl(folder / "sft.jsonl", world.sft_rows(train))
    if (folder / "sft/model").is_dir():
        return
    start = write_start(folder / "start", [q.prompt + answer for q in train for answer in (q.brief, q.chatty)], seed)
    settings = {**recipes.base_settings(), **(TINY if tiny else {})}
    Engine(output=folder, seed=seed).run(
        "sft", model=str(start), data=str(folder / "sft.jsonl"), name="sft", **settings
    )


def name_of(case: Case, seed: int) -> str:
    """Return the name of the run's folder."""
    return f"{case.plants or 'healthy'}-{case.method}-{case.name}-{seed}".replace(" ", "_").replace(",", "")


def train(case: Case, folder: Path, seed: int, tiny: bool) -> None:
    """Do the run. Raises RuntimeError when its folder leads to other alarms than the run raised."""
    settings = {**recipes.recipe(case.method), **SMALL, **SAMPLED.get(case.method, {}), **case.settings}
    settings |= TINY if tiny else {}
    if settings.pop("halved", False):
        settings["learning_rate"] /= 2
    if "lora" in settings:
        settings["learning_rate"] *= 5
    settings |= {} if case.method == "sft" else {"eval_data": str(folder / "test.jsonl")}
    rows = "sft" if case.method == "sft" else case.rows
    CALLS.clear()
    result = Engine(output=folder / "runs", cache_file=folder / "reference.sqlite", seed=seed).run(
        case.method, name=name_of(case, seed), model=str(folder / "sft/model"), data=str(folder / f"{rows}.jsonl"),
        **settings,
    )  # fmt: skip
    raised = [(alarm["step"], alarm["name"]) for alarm in read_lines(result.folder / "alarms.jsonl")]
    if raised != (replayed := [(step, alarm.name) for step, alarm in replay(result.folder)]):
        raise RuntimeError(f"the run raised the alarms {raised}, its folder leads to {replayed}")


def run(case: Case, folder: Path, seed: int, tiny: bool) -> dict[str, Any]:
    """Do a run that is not in the folder yet; return its alarms with their steps."""
    run_folder = folder / "runs" / name_of(case, seed)
    if not (run_folder / "model").is_dir():
        train(case, folder, seed, tiny)
    shipped = Health().model_dump(exclude={"enabled"})
    alarms = {a.name: {"step": step, "value": a.value} for step, a in replay(run_folder, shipped)}
    about = {k: v for k, v in asdict(case).items() if k in ("name", "method", "plants")}
    return {**about, "seed": seed, "alarms": alarms, "watched": watched(run_folder)}


def table(runs: list[dict[str, Any]]) -> str:
    """Lay out, by alarm, hits of planted runs, and false alarms of the healthy runs that log what the alarm needs."""
    planted, healthy = ([r for r in runs if bool(r["plants"]) is p] for p in (True, False))
    false = Counter(name for r in healthy for name in r["alarms"])
    lines = ["| alarm | planted | hits | misses | false alarms in healthy runs |", "|---|---|---|---|---|"]
    for name in ALARMS:
        for_it = [r for r in planted if r["plants"] == name]
        hits = sum(name in r["alarms"] for r in for_it)
        could = sum(name in r["watched"] for r in healthy)
        lines.append(f"| `{name}` | {len(for_it)} | {hits} | {len(for_it) - hits} | {false[name]} of {could} |")
    hits = sum(r["plants"] in r["alarms"] for r in planted)
    alarmed = sum(bool(r["alarms"]) for r in healthy)
    lines.append(f"| all | {len(planted)} | {hits} | {len(planted) - hits} | {alarmed} of {len(healthy)} runs |")
    return "\n".join(lines)


def chosen(only: str, tiny: bool) -> list[tuple[int, Case]]:
    """Return the cases whose alarm or method contains `only`, with their places in the list of all."""
    return [
        (i, case)
        for i, case in enumerate(CASES)
        if only in f"{case.plants or 'healthy'} {case.method}" and (not tiny or (case.name, case.method) in TINY_CASES)
    ]


def main() -> int:
    """Do the runs of a part, print and write."""
    parser = common.parser_of(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--part", choices=PARTS, default="report")
    parser.add_argument("--work", type=Path, help="folder for worlds, bases and runs (default: a temporary one)")
    parser.add_argument("--only", default="", help="runs with this in the name of their alarm or method")
    args = common.parsed(parser)
    common.hide_scripts()
    torch.set_num_threads(args.threads)
    world_seed, first = PARTS[args.part]
    runs: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.work or Path(temporary)) / ("tiny" if args.tiny else args.part)
        prepare(folder, world_seed, args.tiny)
        for i, case in chosen(args.only, args.tiny):
            try:
                runs.append(run(case, folder, first + i, args.tiny))
            except Exception as error:
                traceback.print_exc()
                failed[name_of(case, first + i)] = common.reason(error)
            else:
                print({k: v for k, v in runs[-1].items() if k != "seed"}, flush=True)
    return common.finish(args, [table(runs)], failed, {"part": args.part, "runs": runs})


if __name__ == "__main__":
    sys.exit(main())
