"""GRPO and RLOO on real prompts: alignkit and TRL's trainers, phase by phase, in one run.

    python benchmarks/online.py --data gsm8k_train.jsonl --trl-python path/to/its/python --json online.json
    python benchmarks/online.py --tiny               made-up prompts and a tiny model, in seconds: does everything run?

Every contender has its own process, the same prompts in the same order, and the 28 M-parameter Llama of engine.py in
float32 on the CPU: a step has 2 prompts, 8 completions of exactly 64 tokens each, one update, and a reference. Sampling
is from prompts to text, scoring is the reward function, learning is the rest of a step: passes of policy and reference,
advantages, backward, optimiser. "...-bf16" is the same in bfloat16, compared with TRL in bf16; "alignkit-transformers"
samples by transformers' `generate`. The floor of sampling is the matrix products of its decode steps alone, in the same
process. Figures are medians over the steps after the first, which warms up; peak memory is the largest resident set of
the process. TRL takes part with --trl-python: with gradient checkpointing, its default, and
without, which is faster; the bars compare with the latter. A contender that fails is reported with its error, and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import contest
import sampled
from sampled import PHASES, PROMPTS

METHODS = ("grpo", "rloo")
CONTENDERS = ("trl", "alignkit", "trl-checkpointing", "alignkit-transformers", "trl-bf16", "alignkit-bf16")
GROUP, TOKENS = 8, 64  # completions of a prompt, tokens of a completion
TINY_GROUP, TINY_TOKENS = 2, 8
BARS = {"learning": 3.0, "step": 1.8, "peak_mib": 0.6}


def prepare(args: argparse.Namespace, work: Path) -> None:
    """Write the start model, the prompts, and the prompts in the order in which alignkit's seed 0 visits them."""
    rows = common.made_up_questions(8) if args.data is None else common.read_jsonl(args.data)
    prompts: list[Any] = [{"prompt": row["question"]} for row in rows]
    common.write_jsonl(work / "rows.jsonl", prompts)
    order = common.visited(len(prompts), PROMPTS, args.steps)
    common.write_jsonl(work / "in-order.jsonl", (prompts[i] for i in order))
    common.write_start(work / "start", [f"{row['question']}\n{row['answer']}" for row in rows], args.tiny)


def contend(name: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run one contender, METHOD:CONTENDER, in this process and return its figures."""
    method, contender = name.split(":")
    group, tokens = (TINY_GROUP, TINY_TOKENS) if args.tiny else (GROUP, TOKENS)
    which, _, kind = contender.partition("-")
    sizes, bf16 = (method, work, args.steps, group, tokens), kind == "bf16"
    if which == "trl":
        figures = sampled.run_trl(*sizes, bf16=bf16, gradient_checkpointing=kind == "checkpointing")
    else:
        how = {"precision": "bf16" if bf16 else "fp32"}
        backend = "transformers" if kind == "transformers" else "generate"
        figures = sampled.run_alignkit(*sizes, rollout={"backend": backend}, **how)
        figures["floor"] = common.products_alone(work / "start", PROMPTS * group, tokens, bf16)
    if set(figures["length"]) != {tokens}:
        raise RuntimeError(f"learned from completions of {figures['length']} tokens; all must have {tokens}")
    return figures


def summary(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Return the medians of one contender's rounds; each round's first step is left out."""
    steps = [step for figures in rounds for step in figures["seconds"][1:]]
    medians = {phase: statistics.median(step[phase] for step in steps) for phase in PHASES}
    if "floor" in rounds[0]:
        medians["floor"] = statistics.median(figures["floor"] for figures in rounds)
    return {**medians, "peak_mib": statistics.median(figures["peak_mib"] for figures in rounds)}


def is_missed(name: str, value: float | None, bar: float) -> bool:
    """Return whether a ratio misses its bar: memory must be at most the bar, speed at least."""
    return value is None or (value > bar if name == "peak_mib" else value < bar)


def report(rows: dict[str, dict[str, float]], bars: bool) -> list[str]:
    """Lay out the table, with ratios to TRL without gradient checkpointing, and the verdict on alignkit's bars."""
    head = [
        "method",
        "contender",
        *PHASES[:-1],
        "step s",
        "peak MiB",
        "x learning",
        "x step",
        "memory/trl",
        "sampling/floor",
    ]
    cells, verdicts = [], []
    for name, row in rows.items():
        method, contender = name.split(":")
        trl = rows.get(f"{method}:trl{'-bf16' * contender.endswith('-bf16')}", {})
        to = {phase: common.ratio(trl.get(phase), row[phase]) for phase in ("learning", "step")}
        to["peak_mib"] = common.ratio(row["peak_mib"], trl.get("peak_mib"))
        figures = [f"{row[phase]:.{3 if phase == 'scoring' else 2}f}" for phase in PHASES]
        ratios = [
            common.shown(value, ".2f") for value in (*to.values(), common.ratio(row["sampling"], row.get("floor")))
        ]
        cells.append([method, contender, *figures, f"{row['peak_mib']:.0f}", *ratios])
        if contender == "alignkit" and trl:
            missed = [name for name, bar in BARS.items() if is_missed(name, to[name], bar)]
            verdicts.append(f"{method}: {'missed: ' + ', '.join(missed) if missed else 'all bars met'}")
    lines = [common.table(head, cells, names=2)]
    if bars and verdicts:
        form = (
            "bars: learning {learning:g} times as fast as TRL, step {step:g} times, at most {peak_mib:g} of its memory"
        )
        lines += [form.format(**BARS), *verdicts]
    return lines


def main() -> int:
    """Parse arguments, run the contenders in turn, print and write."""
    parser = common.parser_of(__doc__, trl=True)
    parser.add_argument("--data", type=Path, help="JSONL with the columns question and answer (tiny: made-up rows)")
    parser.add_argument("--steps", type=int, help="steps of a round, the first not counted (default 6, tiny 2)")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; medians are over the steps of all (default 1)")
    parser.add_argument("--methods", help=f"comma-separated, of {', '.join(METHODS)}")
    parser.add_argument("--only", help=f"contenders, comma-separated, of {', '.join(CONTENDERS)}")
    args = common.parsed(parser)
    args.steps = args.steps or (2 if args.tiny else 6)
    if args.child:
        return contest.answer(args, prepare, contend)
    if args.steps < 2 or (args.data is None and not args.tiny):
        parser.error("--data is needed, a JSONL file with the columns question and answer, and at least 2 --steps")
    methods = common.chosen(parser, "--methods", args.methods, METHODS)
    names = common.contenders(parser, args, CONTENDERS)
    with tempfile.TemporaryDirectory() as folder:
        ran = contest.Contest(__file__, args, Path(folder))
        for i in range(args.repeat):
            ran.run([f"{method}:{name}" for method in methods for name in names], i)
    rows = {name: summary(rounds) for name, rounds in ran.runs.items()}
    found = {"steps": args.steps, "rounds": args.repeat, "table": rows, "runs": ran.runs}
    return common.finish(args, report(rows, bars=not args.tiny), ran.failed, found)


if __name__ == "__main__":
    sys.exit(main())
