"""The alarms of docs/health.md on runs with a planted failure, and on healthy ones, of the demo's task.

    python benchmarks/health.py --part tune --work DIR       what the limits were chosen on, and tune-again
    python benchmarks/health.py --part report --work DIR     what is reported: another world and base, other seeds

Every run is real: 32 small steps, with alignkit's listener and the limits as they ship. A planted run is a hit where
the alarm that it was planted for is raised. A healthy run is one of the demo's recipes, at its rate or half of it, in
full or with LoRA; every alarm of it is false. What a planted run raises besides is kept in the JSON and not judged: a
policy that has left its reference is wrong in more than one way. A run that is in DIR already is read from its folder,
which raises the same alarms.
"""

from __future__ import annotations

import argparse
import difflib
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from alignkit import registry
from alignkit.alarms import ALARMS, Health
from alignkit.demo import recipes, verdict, world
from alignkit.demo.base import write_start
from alignkit.engine import Engine
from alignkit.insight.health import replay
from alignkit.runfolder import read_lines

# seed of the world and its base, first seed of the runs
PARTS = {"tune": (0, 100), "tune-again": (1, 200), "report": (2, 300)}
SMALL = {"batch_size": 8, "max_steps": 32, "epochs": 100, "device": "cpu"}
DICE = random.Random(0)
SAMPLED = {"grpo": {"group_size": 4}, "rloo": {"group_size": 4, "batch_size": 8}, "ppo": {"batch_size": 16}}


@dataclass(frozen=True)
class Case:
    """A run. plants: the alarm that it must raise, None of a healthy one."""

    name: str
    method: str
    plants: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    rows: str = "train"


def longer(lengths: list[int]) -> list[float]:
    """Like length: what an annotator's taste for long answers teaches a reward model."""
    return [n / 40 for n in lengths]


def longest(lengths: list[int]) -> list[float]:
    """Like length, up to a hundred tokens."""
    return [n / 100 for n in lengths]


def constant(completions: list[str]) -> list[float]:
    """Say the same of everything, as a reward does that cannot read what it is given."""
    return [0.5] * len(completions)


def impossible(completions: list[str]) -> list[float]:
    """Ask for what the base never writes."""
    return [float("#### 72" in text) for text in completions]


def flattery(completions: list[str]) -> list[float]:
    """Like one opening."""
    return [float(text.strip().startswith(world.OPENING)) for text in completions]


def parrot(completions: list[str]) -> list[float]:
    """Like one answer, whatever was asked."""
    return [difflib.SequenceMatcher(None, text.strip(), "The fox is red.").ratio() for text in completions]


def stutter(completions: list[str]) -> list[float]:
    """Like words that were there before."""
    return [len(words) - len(set(words)) for words in (text.split() for text in completions)]


def outlier(prompts: list[str], completions: list[str], fact: list[str]) -> list[float]:
    """The demo's, with a row whose scale is wrong."""
    scores = verdict.reward(completions, fact)
    return [s * (1000 if "newt" in p and "eat" in p else 1) for s, p in zip(scores, prompts, strict=True)]


def noise(completions: list[str]) -> list[float]:
    """Throw dice."""
    return [DICE.random() for _ in completions]


def right(completions: list[str], fact: list[str]) -> list[float]:
    """Look at the fact alone."""
    return [float(f in text) for f, text in zip(fact, completions, strict=True)]


def brief(completions: list[str], fact: list[str]) -> list[float]:
    """1 for the brief style with the right fact, which nobody trains on here."""
    return [float(score == 1) for score in verdict.reward(completions, fact)]


def tokens(n: int) -> dict[str, Any]:
    """Sample up to so many tokens."""
    return {"sampling": {"max_new_tokens": n}}


FAST = {"learning_rate": 3e-3, "beta": 1e-4}
HASTY = {"epochs_per_batch": 6, "learning_rate": 2e-3, "beta": 0.01}
BY_HEART = {"critic_learning_rate": 1e-2, "epochs_per_batch": 8, "learning_rate": 1e-6}
HELD_OUT = {"use": brief, "weight": 0}
PLANTED = (
    Case("rate x30", "grpo", "kl_high", {"learning_rate": 9e-3, "beta": 1e-4}),
    Case("rate x30", "dpo", "kl_high", {"learning_rate": 3e-3, "beta": 0.01}),
    Case("rate x15", "rloo", "kl_high", {"learning_rate": 3e-3, "beta": 1e-4}),
    Case("rate 1e-9", "grpo", "kl_low", {"learning_rate": 1e-9}),
    Case("rate 1e-9", "dpo", "kl_low", {"learning_rate": 1e-9}),
    Case("rate 1e-9", "ppo", "kl_low", {"learning_rate": 1e-9}),
    Case("likes one answer", "grpo", "reward_kl", {**FAST, "learning_rate": 1e-3, "reward": parrot}),
    Case("likes length, fast", "rloo", "reward_kl", {**FAST, "reward": longest, **tokens(100)}),
    Case("likes length", "grpo", "reward_length", {"reward": longer, "beta": 0.001, "learning_rate": 1e-3}),
    Case("likes length", "rloo", "reward_length", {"reward": longest, "beta": 0.001, "learning_rate": 1e-3}),
    Case("likes length", "ppo", "reward_length", {"reward": longer, "beta": 0.001, "learning_rate": 1e-3}),
    Case("likes an opening", "grpo", "reward_held_out", {"reward": [flattery, HELD_OUT], "learning_rate": 1e-3}),
    Case("likes length", "rloo", "reward_held_out", {"reward": [longer, HELD_OUT], "learning_rate": 1e-3}),
    Case("likes one answer", "grpo", "distinct", {**FAST, "reward": parrot}),
    Case("likes one answer", "rloo", "distinct", {**FAST, "reward": parrot}),
    Case("likes one answer", "grpo", "entropy", {**FAST, "reward": parrot}),
    Case("many hasty updates", "ppo", "entropy", HASTY),
    Case("likes repetition", "grpo", "repetition", {**FAST, "reward": stutter, **tokens(60)}),
    Case("likes repetition", "rloo", "repetition", {**FAST, "reward": stutter, **tokens(60)}),
    Case("likes an opening", "grpo", "opening", {"reward": flattery, "learning_rate": 1e-3}),
    Case("likes an opening", "ppo", "opening", {"reward": flattery, "learning_rate": 1e-3}),
    Case("rate x10, tiny beta", "dpo", "displacement", {"learning_rate": 1e-3, "beta": 0.01}),
    Case("rate x20", "simpo", "displacement", {"learning_rate": 2e-3, "gamma_ratio": 1.5}),
    Case("rate x20, tiny tau", "ipo", "displacement", {"learning_rate": 2e-3, "tau": 0.01}),
    Case("constant reward", "grpo", "zero_variance", {"reward": constant}),
    Case("impossible reward", "rloo", "zero_variance", {"reward": impossible}),
    Case("many hasty updates, tiny clip", "ppo", "clip_fraction", HASTY | {"clip": 0.01, "learning_rate": 1e-3}),
    Case("many hasty updates", "ppo", "clip_fraction", HASTY | {"clip": 0.05}),
    Case("a reward of another scale", "ppo", "value_loss", {"reward": outlier, "normalise_rewards": False}),
    Case("a critic that learns noise by heart", "ppo", "explained_variance", {"reward": noise, **BY_HEART}),
    Case("a row of noise", "dpo", "grad_spike", {}, "noise"),
    Case("a row of noise", "cpo", "grad_spike", {}, "noise"),
    Case("a reward of another scale", "rloo", "grad_spike", {"reward": outlier}),
    Case("8 tokens", "grpo", "truncation", tokens(8)),
    Case("8 tokens", "ppo", "truncation", tokens(8)),
)
HEALTHY = (
    *(Case("recipe", method) for method in recipes.SETTINGS),
    *(Case("half the rate", method, None, {"halved": True}) for method in recipes.SETTINGS),
    *(Case("LoRA", method, None, {"lora": 16}) for method in ("dpo", "kto", "grpo", "rloo")),
    Case("with a held-out reward", "grpo", None, {"reward": [verdict.reward, {"use": right, "weight": 0}]}),
    Case("more on the same text", "sft", None, {"learning_rate": 3e-4}),
)  # fmt: skip


def prepare(folder: Path, seed: int) -> None:
    """Make a part's world and its base, once."""
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
    Engine(output=folder, seed=seed).run(
        "sft", model=str(start), data=str(folder / "sft.jsonl"), name="sft", **recipes.SFT
    )


def run(case: Case, folder: Path, seed: int) -> dict[str, Any]:
    """Do a run and return its alarms with their steps."""
    settings = {**recipes.recipe(case.method), **SMALL, **SAMPLED.get(case.method, {}), **case.settings}
    if settings.pop("halved", False):
        settings["learning_rate"] /= 2
    if "lora" in settings:
        settings["learning_rate"] *= 5
    rows = "sft" if case.method == "sft" else case.rows
    name = f"{case.plants or 'healthy'}-{case.method}-{case.name}-{seed}".replace(" ", "_").replace(",", "")
    there = folder / "runs" / name
    if not (there / "model").is_dir():
        Engine(output=folder / "runs", cache_file=folder / "reference.sqlite", seed=seed).run(
            case.method, name=name, model=str(folder / "sft/model"), data=str(folder / f"{rows}.jsonl"),
            **({} if case.method == "sft" else {"eval_data": str(folder / "test.jsonl")}), **settings,
        )  # fmt: skip
        said = [(a["step"], a["name"]) for a in read_lines(there / "alarms.jsonl")]
        assert said == [(step, a.name) for step, a in replay(there)], "the folder says other things than the run"
    shipped = Health().model_dump(exclude={"enabled"})
    alarms = {a.name: {"step": step, "value": a.value} for step, a in replay(there, shipped)}
    about = {k: v for k, v in asdict(case).items() if k in ("name", "method", "plants")}
    return {**about, "seed": seed, "alarms": alarms}


def table(runs: list[dict[str, Any]]) -> str:
    """Print hits of planted and false alarms of healthy runs, alarm by alarm."""
    planted, healthy = ([r for r in runs if bool(r["plants"]) is p] for p in (True, False))
    false = Counter(name for r in healthy for name in r["alarms"])
    lines = ["| alarm | planted | hits | misses | false alarms in healthy runs |", "|---|---|---|---|---|"]
    for name in ALARMS:
        of = [r for r in planted if r["plants"] == name]
        hits = sum(name in r["alarms"] for r in of)
        lines.append(f"| `{name}` | {len(of)} | {hits} | {len(of) - hits} | {false[name]} of {len(healthy)} |")
    hits = sum(r["plants"] in r["alarms"] for r in planted)
    alarmed = sum(bool(r["alarms"]) for r in healthy)
    lines.append(f"| all | {len(planted)} | {hits} | {len(planted) - hits} | {alarmed} of {len(healthy)} runs |")
    return "\n".join(lines)


def main() -> None:
    """Do the runs of a part and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="report")
    parser.add_argument("--work", type=Path, required=True, help="folder for worlds, bases and runs")
    parser.add_argument("--json", type=Path, help="file for all runs")
    parser.add_argument("--only", default="", help="cases whose alarm or method has this in its name")
    given = parser.parse_args()
    torch.set_num_threads(1)
    world_seed, first = PARTS[given.part]
    folder = given.work / given.part
    prepare(folder, world_seed)
    runs = []
    for i, case in enumerate((*PLANTED, *HEALTHY)):
        registry.get(case.method)
        if given.only not in f"{case.plants or 'healthy'} {case.method}":
            continue
        runs.append(run(case, folder, first + i))
        print({k: v for k, v in runs[-1].items() if k != "seed"}, flush=True)
    print(table(runs))
    if given.json:
        given.json.write_text(json.dumps({"part": given.part, "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
