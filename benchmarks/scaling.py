"""How much the forest saves: DPO by the prompt's share of a row, GRPO by the size of the group, against padded rows.

    python benchmarks/scaling.py --json scaling.json --png scaling.png
    python benchmarks/scaling.py --trl-python path/to/its/python      TRL's trainers too, on the same rows
    python benchmarks/scaling.py --tiny              a tiny model, in seconds: does everything run?

Made-up rows of exact lengths, the 28 M-parameter Llama of engine.py in float32 on the CPU, and a reference that is
computed in each step. "prompt 0.5" is DPO on pairs whose rows, a prompt with one answer, have 256 tokens, half of them
the prompt's; "group 8" is GRPO on 2 prompts of 128 tokens with 8 completions of 32 each. Each has its own process, in
which `layout: forest` and `layout: padded` take turns, step by step, with the same model and rows; the first step of
each warms up, and figures are medians of the others. Learning is a step without sampling and scoring. "tokens" is what
a step would gain if its time were proportional to the tokens that it computes. TRL has a process for each, without
gradient checkpointing. A contender that fails is reported with its error, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import common
import contest
import dpo
import pictures
import sampled

KINDS = ("prompt", "group")
LAYOUTS = ("forest", "padded")
LETTERS = "etaoinshrdlcumwfgypbvk"


class Size(NamedTuple):
    """What is measured; tokens: `row` of a prompt with an answer, `prompt` and `completion` of GRPO."""

    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    groups: tuple[int, ...] = (2, 4, 8, 16)
    row: int = 256
    pairs: int = 4
    prompt: int = 128
    completion: int = 32


TINY = Size((0.2, 0.8), (2, 4), row=40, pairs=2, prompt=16, completion=4)


class Case(NamedTuple):
    """A prompt's share or a group's size. trees: prompts of a step. branches: their answers. prompt, answer: tokens."""

    name: str
    trees: int
    prompt: int
    answer: int
    branches: int

    @property
    def gain(self) -> float:
        """Tokens of padded rows, in units of the forest's."""
        return self.branches * (self.prompt + self.answer) / (self.prompt + self.branches * self.answer)


def cases(args: argparse.Namespace) -> list[Case]:
    """Return what is measured, in order."""
    size = TINY if args.tiny else Size()
    found = []
    for share in size.shares:
        prompt = round(share * size.row)
        found.append(Case(f"prompt:{share}", size.pairs, prompt, size.row - prompt, 2))
    found += [Case(f"group:{n}", sampled.PROMPTS, size.prompt, size.completion, n) for n in size.groups]
    return [case for case in found if case.name.split(":")[0] in args.only]


# ------------------------------------------------------------------------------------------------------ contenders


def prepare(args: argparse.Namespace, work: Path) -> None:
    """Write the model, and for each case a folder with its rows and the model."""
    draw = random.Random(0)

    def text(tokens: int) -> str:  # a letter is a token, with the space before it
        return " ".join(draw.choices(LETTERS, k=tokens))

    common.write_start(work / "start", [" ".join([*LETTERS, *LETTERS])], args.tiny)
    for case in cases(args):
        folder = work / case.name.replace(":", "-")
        folder.mkdir()
        (folder / "start").symlink_to(work / "start")
        rows = [{"prompt": text(case.prompt)} for _ in range(case.trees * (args.steps + 1))]
        if case.name.startswith("prompt"):
            for row in rows:  # the token that ends an answer is one of its tokens
                row |= {key: " " + text(case.answer - 1) for key in ("chosen", "rejected")}
        for name in ("rows.jsonl", "in-order.jsonl"):
            common.write_jsonl(folder / name, rows)


def contend(name: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run both layouts, or TRL for a name that ends in it; return the seconds of the steps by contender."""
    kind, value, *rival = name.split(":")
    case = next(case for case in cases(args) if case.name == f"{kind}:{value}")
    run = run_trl if rival else run_layouts
    return {"seconds": run(case, args.steps, work / f"{kind}-{value}")}


def run_layouts(case: Case, steps: int, work: Path) -> dict[str, list[dict[str, float]]]:
    """Train with each layout, in turns of a step."""
    runs = {layout: opened(case, steps, work, layout) for layout in LAYOUTS}
    seconds: dict[str, list[dict[str, float]]] = {layout: [] for layout in LAYOUTS}
    for i in range(steps + 1):
        for layout, run in runs.items():
            started = time.perf_counter()
            values = run.loop.step(i, steps + 1)
            took = time.perf_counter() - started
            spent = {phase: values.get(f"seconds/{phase}", 0.0) for phase in ("sampling", "scoring")}
            seconds[layout].append({**spent, "learning": took - sum(spent.values()), "step": took})
            if values.get("completion/length", case.answer) != case.answer:
                raise RuntimeError(f"sampled {values['completion/length']} tokens; all must have {case.answer}")
    for run in runs.values():
        if run.state.parts.online is not None:
            run.state.parts.online.close()
    return {layout: taken[1:] for layout, taken in seconds.items()}


def opened(case: Case, steps: int, work: Path, layout: str) -> Any:
    """Return a run of alignkit that is ready for its first step."""
    from alignkit.engine.phases import Run

    # not "cached": every step must have a pass of the reference, as TRL's has
    changes: dict[str, Any] = {"layout": layout, "reference": "full", "name": layout, "rows_cache": False, "epochs": 2}
    method = "grpo" if case.name.startswith("group") else "dpo"
    settings = sampled.settings_of("grpo", work, steps + 1, case.branches, case.answer, **changes)
    if method == "dpo":
        unused = ("group_size", "kl", "reward", "sampling")
        settings = {name: value for name, value in settings.items() if name not in unused}
        settings |= {"batch_size": case.trees, "max_completion_tokens": None, "beta": 0.1}
    run = Run(method, **settings)
    tokens = case.prompt + case.branches * case.answer if method == "dpo" else case.prompt
    if found := {example.n_tokens for example in run.read().train} - {tokens}:
        raise RuntimeError(f"rows have {sorted(found)} tokens; all must have {tokens}")
    online = run.build().parts.online
    if online is not None:
        online.open(run.state.folder, 0, -1)
    return run


def run_trl(case: Case, steps: int, work: Path) -> dict[str, list[dict[str, float]]]:
    """Train with TRL's trainer of the method; DPO's steps are timed together, in the second of two epochs."""
    if case.name.startswith("group"):
        found = sampled.run_trl("grpo", work, steps + 1, case.branches, case.answer)
        if set(found["length"]) != {case.answer}:
            raise RuntimeError(f"sampled {found['length']} tokens; all must have {case.answer}")
        return {"trl": found["seconds"][1:]}
    found = dpo.run_trl(work, rounds=2, per_device_train_batch_size=case.trees)
    one = found["seconds"] / (found["pairs"] / case.trees)
    return {"trl": [{"sampling": 0.0, "scoring": 0.0, "learning": one, "step": one}]}


# ---------------------------------------------------------------------------------------------------------- report


def summarise(known: list[Case], runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the medians of each case's contenders over steps and rounds, with ratios to padded rows."""
    rows: dict[str, dict[str, Any]] = {}
    for case in known:
        rounds = [*runs.get(case.name, []), *runs.get(f"{case.name}:trl", [])]
        units = case.trees * (1 if case.name.startswith("prompt") else case.branches)
        found: dict[str, dict[str, Any]] = {}
        for contender in (*LAYOUTS, "trl"):
            if steps := [step for figures in rounds for step in figures["seconds"].get(contender, [])]:
                row = {phase: statistics.median(step[phase] for step in steps) for phase in sampled.PHASES}
                found[contender] = {**row, "units_per_second": units / row["learning"], "tokens": case.gain}
        padded = found.get("padded", {})
        for contender, row in found.items():
            ratios = {f"{p}_to_padded": common.ratio(padded.get(p), row[p]) for p in ("learning", "step")}
            rows[f"{case.name}:{contender}"] = row | ratios
    return rows


def report(rows: dict[str, dict[str, Any]]) -> str:
    """Lay out the table; ratios above 1 are faster than padded rows."""
    head = ["case", "contender", "sampling s", "learning s", "learned/s", "x padded", "x padded, step", "tokens"]
    cells = []
    for name, row in rows.items():
        case, contender = name.rsplit(":", 1)
        figures = [f"{row['sampling']:.2f}" if row["sampling"] else "-", f"{row['learning']:.3f}"]
        figures.append(f"{row['units_per_second']:.2f}")
        figures += [common.shown(row[f"{phase}_to_padded"], ".2f") for phase in ("learning", "step")]
        cells.append([case.replace(":", " "), contender, *figures, f"{row['tokens']:.2f}"])
    return common.table(head, cells, names=2)


def panels(rows: dict[str, dict[str, Any]]) -> list[pictures.Panel]:
    """Return what the picture shows: speed in units of padded rows, against the share and against the group's size."""

    def line(kind: str, contender: str, key: str) -> list[tuple[float, float]]:
        named = {tuple(name.split(":")): row for name, row in rows.items()}
        return [(float(v), row[key]) for (k, v, c), row in named.items() if (k, c) == (kind, contender) and row[key]]

    found = []
    for kind, label in (("prompt", "prompt's share of a row (DPO)"), ("group", "completions of a prompt (GRPO)")):
        lines = {"alignkit, learning": line(kind, "forest", "learning_to_padded")}
        if kind == "group":
            lines["whole step, sampling included"] = line(kind, "forest", "step_to_padded")
        lines |= {"TRL, learning": line(kind, "trl", "learning_to_padded")}
        lines |= {"tokens alone": line(kind, "forest", "tokens")}
        scale = "log2" if kind == "group" else "linear"
        found.append(pictures.Panel(label, "speed, padded rows = 1", lines, scale))
    return found


def main() -> int:
    """Parse arguments, run the cases in turn, print and write."""
    parser = common.parser_of(__doc__, trl=True, png=True)
    parser.add_argument("--steps", type=int, help="steps of a round that count (default 4, tiny 1)")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; medians are over the steps of all (default 1)")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(KINDS)}")
    args = common.parsed(parser)
    args.steps, args.only = args.steps or (1 if args.tiny else 4), common.chosen(parser, "--only", args.only, KINDS)
    if args.child:
        return contest.answer(args, prepare, contend)
    known = cases(args)
    names = [f"{case.name}{end}" for end in ("", ":trl")[: 1 + bool(args.trl_python)] for case in known]
    with tempfile.TemporaryDirectory() as folder:
        ran = contest.Contest(__file__, args, Path(folder), steps=args.steps)
        for i in range(args.repeat):
            ran.run(names, i)
    rows = summarise(known, ran.runs)
    lines = [report(rows), *pictures.drawn(args, "The forest against padded rows", panels(rows))]
    return common.finish(args, lines, ran.failed, {"steps": args.steps, "table": rows, "runs": ran.runs})


if __name__ == "__main__":
    sys.exit(main())
