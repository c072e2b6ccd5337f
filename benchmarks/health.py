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
from alignkit.config import read_yaml
from alignkit.demo import recipes, verdict, world
from alignkit.demo.base import write_start
from alignkit.engine import Engine
from alignkit.insight.health import replay
from alignkit.insight.health.monitor import held_out
from alignkit.runs.folder import read_lines, read_metrics

# seed of the world and its base, first seed of the runs
PARTS = {"tune": (0, 100), "tune-again": (1, 200), "report": (2, 300)}
SMALL = {"batch_size": 8, "max_steps": 32, "epochs": 100, "device": "cpu"}
DICE = random.Random(0)
CALLS: list[int] = []  # of the rewards that change while a run goes on
METHODS = ("dpo", "ipo", "kto", "orpo", "simpo", "cpo", "ppo", "grpo", "rloo", "nash")
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


def slipping(completions: list[str], fact: list[str]) -> list[float]:
    """The demo's, once on another scale: as from a server that was changed."""
    CALLS.append(len(completions))
    return [score * (1000 if len(CALLS) == 14 else 1) for score in verdict.reward(completions, fact)]


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
    *(Case("recipe", method) for method in METHODS),
    *(Case("half the rate", method, None, {"halved": True}) for method in METHODS),
    *(Case("LoRA", method, None, {"lora": 16}) for method in ("dpo", "kto", "grpo", "rloo")),
    Case("with a held-out reward", "grpo", None, {"reward": [verdict.reward, {"use": right, "weight": 0}]}),
    Case("more on the same text", "sft", None, {"learning_rate": 3e-4}),
)  # fmt: skip

# behind the others, so that each of those keeps its seed
ADDED = (
    Case("likes one answer", "ppo", "reward_kl", {**FAST, "reward": parrot}),
    Case("likes an opening", "ppo", "reward_held_out", {"reward": [flattery, HELD_OUT], "learning_rate": 1e-3}),
    Case("likes one answer", "ppo", "distinct", {**FAST, "reward": parrot}),
    Case("likes an opening, fast", "rloo", "entropy", {**FAST, "reward": flattery}),
    Case("likes repetition", "ppo", "repetition", {**FAST, "reward": stutter, **tokens(60)}),
    Case("likes an opening", "rloo", "opening", {"reward": flattery, "learning_rate": 1e-3}),
    Case("impossible reward", "grpo", "zero_variance", {"reward": impossible}),
    Case("many hasty updates, small batches", "grpo", "clip_fraction", HASTY | {"clip": 0.02, "minibatches": 2}),
    Case("a reward of another scale, fast critic", "ppo", "value_loss",
         {"reward": outlier, "normalise_rewards": False, "critic_learning_rate": 1e-3}),
    Case("a reward of another scale, shared critic", "ppo", "value_loss",
         {"reward": outlier, "normalise_rewards": False, "critic": "shared"}),
    Case("a critic that learns noise by heart, faster", "ppo", "explained_variance",
         {"reward": noise, **BY_HEART, "critic_learning_rate": 3e-2}),
    Case("a critic that learns noise by heart, longer", "ppo", "explained_variance",
         {"reward": noise, **BY_HEART, "epochs_per_batch": 12}),
    Case("a row of noise", "orpo", "grad_spike", {}, "noise"),
    Case("a row of noise", "simpo", "grad_spike", {}, "noise"),
    Case("8 tokens", "rloo", "truncation", tokens(8)),
    *(Case("again", method) for method in ("ppo", "ppo", "grpo", "rloo", "nash")),
    Case("a shared critic", "ppo", None, {"critic": "shared"}),
    *(Case("with a held-out reward", m, None, {"reward": [verdict.reward, {"use": right, "weight": 0}]})
      for m in ("rloo", "ppo")),
    *(Case("likes repetition", m, "entropy", {**FAST, "reward": stutter, **tokens(60)}) for m in ("grpo", "rloo")),
    Case("many hasty updates, again", "ppo", "entropy", HASTY),
    Case("very many hasty updates, tiny clip", "ppo", "clip_fraction",
         {"epochs_per_batch": 12, "learning_rate": 5e-4, "clip": 0.01}),
    Case("very many hasty updates, tinier clip", "ppo", "clip_fraction",
         {"epochs_per_batch": 12, "learning_rate": 5e-4, "clip": 0.005}),
    Case("a critic that learns noise by heart, longest", "ppo", "explained_variance",
         {"reward": noise, **BY_HEART, "epochs_per_batch": 16}),
    Case("a scale that slips once", "rloo", "grad_spike", {"reward": slipping}),
    Case("a scale that slips once", "ppo", "grad_spike", {"reward": slipping, "normalise_rewards": False}),
    Case("a scale that slips once", "grpo", "grad_spike", {"reward": slipping, "variant": "dr_grpo"}),
)  # fmt: skip
LOGGED = {
    "kl_high": {"kl"}, "kl_low": {"kl"}, "reward_kl": {"kl", "reward/mean"},
    "reward_length": {"reward/mean", "completion/length"}, "reward_held_out": {"reward/mean", "a reward of weight 0"},
    "distinct": {"completion/distinct_2"}, "entropy": {"entropy"}, "repetition": {"texts"}, "opening": {"texts"},
    "displacement": {"logps/chosen"}, "zero_variance": {"several texts a prompt"}, "clip_fraction": {"clip_fraction"},
    "value_loss": {"value"}, "explained_variance": {"value/explained_variance"}, "grad_spike": {"grad_norm"},
    "truncation": {"completion/eos_rate"},
}  # fmt: skip


def watched(folder: Path) -> list[str]:
    """Return the alarms that a run could raise: it logs what they look at."""
    logged = {name for line in read_metrics(folder) for name in line}
    logged |= {"a reward of weight 0"} if held_out(read_yaml(folder / "config.yaml").get("reward")) else set()
    texts = folder / "completions.jsonl"
    rows = [row for row in read_lines(texts) if row["training"]] if texts.is_file() else []
    logged |= {"texts"} if rows else set()
    logged |= {"several texts a prompt"} if len({(r["step"], r["row"]) for r in rows}) < len(rows) else set()
    return [name for name in ALARMS if LOGGED[name] <= logged]


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
    CALLS.clear()
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
    return {**about, "seed": seed, "alarms": alarms, "watched": watched(there)}


def table(runs: list[dict[str, Any]]) -> str:
    """Print hits of planted and false alarms of healthy runs that log what an alarm looks at, alarm by alarm."""
    planted, healthy = ([r for r in runs if bool(r["plants"]) is p] for p in (True, False))
    false = Counter(name for r in healthy for name in r["alarms"])
    lines = ["| alarm | planted | hits | misses | false alarms in healthy runs |", "|---|---|---|---|---|"]
    for name in ALARMS:
        of = [r for r in planted if r["plants"] == name]
        hits = sum(name in r["alarms"] for r in of)
        could = sum(name in r["watched"] for r in healthy)
        lines.append(f"| `{name}` | {len(of)} | {hits} | {len(of) - hits} | {false[name]} of {could} |")
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
    for i, case in enumerate((*PLANTED, *HEALTHY, *ADDED)):
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
